"""Text for people: foreign words made fit to be shown, sizes and counts.

What a guest, a hypervisor or a file says may be meant for the terminal.
"""

from __future__ import annotations

import re
from typing import Final

LIMIT: Final = 4096  # characters

# ECMA-48 control sequences (CSI), and strings such as OSC and DCS with all that is in them.
_SEQUENCE: Final = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
)
_KEPT: Final = frozenset("\n\t")


def clean(text: str, limit: int = LIMIT) -> str:
    """`text` without what a terminal would obey, and not longer than `limit` characters.

    Escape sequences go; other control characters, signs that change the direction of what follows, and halves of a
    surrogate pair become U+FFFD. Line ends and tabs stay. What was cut ends with an ellipsis.
    """
    is_cut = len(text) > limit
    text = _SEQUENCE.sub("", text[:limit].replace("\r\n", "\n"))
    if not text.isprintable():
        text = "".join(sign if sign.isprintable() or sign in _KEPT else "\N{REPLACEMENT CHARACTER}" for sign in text)
    return f"{text}…" if is_cut else text


def size(count: int) -> str:
    """A number of bytes in a unit that keeps it short."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def count(number: int, thing: str) -> str:
    """`1 disk`, `2 disks`, `no disks`."""
    return f"{number or 'no'} {thing}{'' if number == 1 else 's'}"
