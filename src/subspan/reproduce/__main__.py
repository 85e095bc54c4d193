"""`python -m subspan.reproduce`: the same as `subspan reproduce`."""

import sys

from ..cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "reproduce")
    main()
