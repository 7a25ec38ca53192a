"""Foreign words are made fit to be shown."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utilityvm.cli import output
from utilityvm.text import clean


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünï", "plain, ünï"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("ends\r\n", "ends\n"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x9b2Jred", "red"),
        ("\x1b]0;title\x07a\x1b]52;c;cm0=\x1b\\b", "ab"),
        ("\x1bPq#0\x1b\\a\x9dx\x9cb", "ab"),
        ("\x1b]0;never ended", "�]0;never ended"),
        ("back\rspace\x08 \x7f \x00", "back�space� � �"),
        ("\u202eevil\u2066", "�evil�"),
        ("\ud800", "�"),
    ],
)
def test_what_a_terminal_would_obey_goes(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_it_is_cut() -> None:
    assert clean("abcd", 4) == "abcd"
    assert clean("abcde", 4) == "abcd…"
    assert len(clean("a" * 10_000)) == 4097


@given(st.text(st.characters()))
def test_nothing_is_left_that_cannot_be_printed(text: str) -> None:
    shown = clean(text)
    assert all(sign.isprintable() or sign in "\n\t" for sign in shown)
    assert clean(shown) == shown


def test_errors_and_warnings_of_the_command_line_are_clean(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they are made of: a file may have any name."""
    evil = "\x1b]52;c;cm0=\x07\x1b[2Ja\rb"
    for as_json in (True, False):
        output.begin(as_json=as_json)
        output.tell_errors([output.Told("GuestRefused", evil, evil)], 1)
    ours = logging.getLogger("utilityvm")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(ours, name, getattr(ours, name))
    output.log_to_stderr(debug=False)
    logging.getLogger("utilityvm.test").warning("%s", evil)
    printed = capsys.readouterr().err
    assert all(sign.isprintable() or sign == "\n" for sign in printed)
    assert "a\N{REPLACEMENT CHARACTER}b" in printed
