"""Refresh the README's table of systems from the recorded reproductions (--check: only say whether it is fresh)."""

import re
import sys

from hooks import ROOT, summary

README = ROOT / "README.md"


def refreshed(text: str) -> str:
    """The README with the table as the records give it now."""
    table = summary().replace("(systems/", "(docs/systems/")
    return re.sub(
        r"<!-- systems -->.*<!-- /systems -->",
        lambda _: f"<!-- systems -->\n{table}\n<!-- /systems -->",
        text,
        flags=re.S,
    )


if __name__ == "__main__":
    now = README.read_text(encoding="utf-8")
    new = refreshed(now)
    if "--check" in sys.argv:
        sys.exit(0 if new == now else "README.md: the table of systems is stale; run python docs/tables.py")
    README.write_text(new, encoding="utf-8")
