"""`python -m subspan`: the same as the command `subspan`."""

from subspan.cli import main

if __name__ == "__main__":
    main()
