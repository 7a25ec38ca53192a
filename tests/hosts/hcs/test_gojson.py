from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utilityvm.errors import InvalidRequest
from utilityvm.hosts.hcs.gojson import encode

SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def as_go(text: str, *, escape_html: bool) -> str:
    """The rules of Go's encoder, one character at a time."""
    always = "\u2028\u2029"
    escaped = always + ("&<>" if escape_html else "")
    return "".join(
        SHORT.get(character) or (f"\\u{ord(character):04x}" if character < " " or character in escaped else character)
        for character in text
    )


@given(st.text(st.characters(exclude_categories=["Cs"])), st.booleans())
def test_any_text_is_escaped_as_go_does(text: str, escape_html: bool) -> None:
    assert encode(text, escape_html=escape_html) == f'"{as_go(text, escape_html=escape_html)}"'


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text('&<>\u2028\u2029\\"u0026')))
def test_escaping_changes_no_meaning(document: dict[str, str]) -> None:
    assert json.loads(encode(document)) == document
    assert json.loads(encode(document, escape_html=False)) == document


def test_html_is_escaped_for_hcs_and_not_for_the_bridge() -> None:
    assert encode("a&b<c>\u2028") == '"a\\u0026b\\u003cc\\u003e\\u2028"'
    assert encode("a&b<c>\u2028", escape_html=False) == '"a&b<c>\\u2028"'


@pytest.mark.parametrize("text", ["\ud800", "C:\\a\udcff.vhdx", "\udfff\ud800"])
def test_a_lone_surrogate_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode") as caught:
        encode({"Path": text})
    assert caught.value.remedy
