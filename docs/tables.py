"""Refresh the README's table of what is reached from the records (--check: only say whether it is fresh)."""

import re
import sys

from hooks import ROOT, reached

README = ROOT / "README.md"


def refreshed(text: str) -> str:
    """The README with the table as the records give it now."""
    table = re.sub(r"\]\((?=systems/|guides/)", "](docs/", reached())
    return re.sub(
        r"<!-- reached -->.*<!-- /reached -->",
        lambda _: f"<!-- reached -->\n{table}\n<!-- /reached -->",
        text,
        flags=re.S,
    )


if __name__ == "__main__":
    now = README.read_text(encoding="utf-8")
    new = refreshed(now)
    if "--check" in sys.argv:
        sys.exit(0 if new == now else "README.md: the table of what is reached is stale; run python docs/tables.py")
    README.write_text(new, encoding="utf-8")
