"""The picture of the rooms, made from the imports in the source. Called by generate.py."""

from __future__ import annotations

import ast
import graphlib
import html
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src/utilityvm"
# Whom every room may import, and an old name: no arrow of theirs says anything.
LEFT_OUT = {"errors", "log", "tasks", "text", "hcs"}
FACE = "utilityvm"  # the public names, `from utilityvm import ...`
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 128, 40, 36, 44, 20


def imports() -> dict[str, set[str]]:
    """Which rooms each room imports."""
    names = {path.stem for path in SOURCE.iterdir() if path.is_dir() and (path / "__init__.py").exists()} - LEFT_OUT
    found: dict[str, set[str]] = {name: set() for name in (*sorted(names), FACE)}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).parts
        room = FACE if parts == ("__init__.py",) else parts[0]
        if room not in found:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                top, _, inner = module.partition(".")
                target = (inner.partition(".")[0] or FACE) if top == "utilityvm" else ""
                if target in found and target != room:
                    found[room].add(target)
    return found


def below(room: str, arrows: dict[str, set[str]]) -> set[str]:
    """Every room that is imported by the room, and by those that it imports."""
    found: set[str] = set()
    todo = [*arrows[room]]
    while todo:
        other = todo.pop()
        if other not in found:
            found.add(other)
            todo += arrows[other]
    return found


def rows(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The rooms by height: each above all that it imports.

    Raises:
        SystemExit: rooms import one another in a circle; names them.
    """
    try:
        upwards = [*graphlib.TopologicalSorter(arrows).static_order()]
    except graphlib.CycleError as error:
        raise SystemExit(f"rooms import one another in a circle: {' <- '.join(error.args[1])}") from None
    height: dict[str, int] = {}
    for room in upwards:
        height[room] = 1 + max((height[other] for other in arrows[room]), default=-1)
    highest = max(height.values())
    return [sorted(room for room in arrows if height[room] == level) for level in range(highest, -1, -1)]


def svg() -> str:
    """The picture: an arrow for each import that no longer way says already."""
    arrows = imports()
    lines = rows(arrows)
    widest = max(map(len, lines))
    width = 2 * MARGIN + widest * WIDTH + (widest - 1) * GAP_X
    height = 2 * MARGIN + len(lines) * HEIGHT + (len(lines) - 1) * GAP_Y
    at: dict[str, tuple[float, float]] = {}
    for number, line in enumerate(lines):
        left = (width - len(line) * WIDTH - (len(line) - 1) * GAP_X) / 2
        for column, room in enumerate(line):
            at[room] = (left + column * (WIDTH + GAP_X), MARGIN + number * (HEIGHT + GAP_Y))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        "<title>The rooms of utilityvm; an arrow leads to what is imported</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#57606a"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for room, others in arrows.items():
        direct = others - {far for other in others for far in below(other, arrows)}
        for other in sorted(direct):
            (x, y), (to_x, to_y) = at[room], at[other]
            parts.append(
                f'<path d="M{x + WIDTH / 2:g} {y + HEIGHT:g} {to_x + WIDTH / 2:g} {to_y:g}" stroke="#57606a" '
                'fill="none" marker-end="url(#tip)"/>'
            )
    for room, (x, y) in at.items():
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#ddf4ff" stroke="#0969da"/>'
        )
        parts.append(
            f'<text x="{x + WIDTH / 2:g}" y="{y + HEIGHT / 2 + 5:g}" text-anchor="middle" font-size="15">'
            f"{html.escape(room)}</text>"
        )
    return "\n".join([*parts, "</svg>"])


def table() -> str:
    """What each room says of itself in the first line of its `__init__`."""
    found = []
    for line in rows(imports()):
        for room in line:
            path = SOURCE / "__init__.py" if room == FACE else SOURCE / room / "__init__.py"
            said = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0].replace("\n", " ")
            if not said:
                raise SystemExit(f"{path}: a room says in its first line what it is")
            found.append(f"| `{room}` | {said} |")
    return "\n".join(["| room | what it is |", "|---|---|", *found])
