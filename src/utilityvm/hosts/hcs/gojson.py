"""JSON as Go's encoding/json writes it, to the byte.

Go differs from others in one thing: `json.Marshal` writes `&`, `<` and `>` as escapes (so that the text may stand in
HTML), and U+2028 and U+2029 as escapes always. None of the five can stand outside a string in JSON, so replacing them
in the finished text is exact. The rest is the same on both sides: short escapes for quote, backslash, \\b, \\f, \\n,
\\r and \\t, \\u00xx for the other control characters, everything else as it is, no blanks.

Text with lone surrogates is refused: Go writes U+FFFD for bytes that are no UTF-8, in one of two spellings depending on
its version, and a path changed like that names another file.

Source: Go encoding/json, since 1.22 (\\b and \\f); recorded with 1.27.
"""

from __future__ import annotations

from typing import Final

import msgspec

from utilityvm.errors import InvalidRequest

_ALWAYS: Final = (("\u2028", "\\u2028"), ("\u2029", "\\u2029"))
_HTML: Final = (("&", "\\u0026"), ("<", "\\u003c"), (">", "\\u003e"))


def encode(document: object, *, escape_html: bool = True) -> str:
    """The document as `json.Marshal` writes it; as an encoder with `SetEscapeHTML(false)`, if not `escape_html`.

    Raises:
        InvalidRequest: a text in it is not valid Unicode.
    """
    try:
        text = msgspec.json.encode(document).decode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{error.object!r} is not valid Unicode: JSON cannot carry it",
            remedy="rename the file, or mount it under another path",
        ) from error
    for plain, escaped in (*_ALWAYS, *(_HTML if escape_html else ())):
        if plain in text:
            text = text.replace(plain, escaped)
    return text
