"""The picture of the house: rooms on their floors, and who imports whom, read from the source."""

import ast
import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "subspan"
WIDTH, HEIGHT, GAP, STEP = 108, 46, 14, 76


def floors():
    """Rooms by floor, from the ground up, as the layering test has them; those that stand."""
    tree = ast.parse((ROOT / "tests" / "test_layering.py").read_text(encoding="utf-8"))
    listed = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "FLOORS"
    )
    stands = [sorted(room for room in floor if room and files(room)) for floor in ast.literal_eval(listed)]
    return [floor for floor in stands if floor and floor != ["__main__"]]


def files(room):
    """The modules of a room."""
    folder = SOURCE / room
    return (
        sorted(folder.rglob("*.py")) if folder.is_dir() else [path for path in [SOURCE / f"{room}.py"] if path.exists()]
    )


def uses(room):
    """The other rooms that a room imports."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in files(room))
    found = set(re.findall(r"^\s*from subspan\.(\w+)", source, re.MULTILINE))
    for names in re.findall(r"^\s*from subspan import \(?([\w, \n]+)", source, re.MULTILINE):
        found |= set(re.findall(r"\w+", names))
    return found - {room}


def picture():
    """The house as an SVG; a room's title says what it imports."""
    stands = floors()
    widest = max(map(len, stands))
    width = widest * (WIDTH + GAP) - GAP
    height = len(stands) * STEP - (STEP - HEIGHT)
    place = {}
    for level, rooms in enumerate(stands):
        left = (width - len(rooms) * (WIDTH + GAP) + GAP) / 2
        for number, room in enumerate(rooms):
            place[room] = (left + number * (WIDTH + GAP), height - HEIGHT - level * STEP)
    lines, boxes = [], []
    for room, (x, y) in place.items():
        below = sorted(uses(room) & place.keys(), key=lambda other: (place[other][1], other))
        for other in below:
            x2, y2 = place[other]
            lines.append(f'<path d="M{x + WIDTH / 2:g} {y + HEIGHT:g} L{x2 + WIDTH / 2:g} {y2:g}"/>')
        size = sum(path.read_text(encoding="utf-8").count("\n") for path in files(room))
        boxes.append(
            f"<g><title>{escape(room)} imports {escape(', '.join(below) or 'no other room')}</title>"
            f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
            f'<text x="{x + WIDTH / 2:g}" y="{y + 20:g}" font-weight="600">{escape(room)}</text>'
            f'<text x="{x + WIDTH / 2:g}" y="{y + 37:g}" font-size="11" opacity="0.7">{size:,} lines</text></g>'
        )
    return (
        f'<svg viewBox="-2 -2 {width + 4:g} {height + 4:g}" role="img" aria-label="Rooms of subspan and their imports" '
        'style="width:100%;height:auto" font-family="inherit" font-size="14" text-anchor="middle">'
        f'<g fill="none" stroke="currentColor" stroke-width="1" opacity="0.18">{"".join(lines)}</g>'
        '<g fill="currentColor"><style>.house rect{fill:var(--md-default-bg-color,#fff);stroke:currentColor}</style>'
        f'<g class="house">{"".join(boxes)}</g></g></svg>'
    )
