"""`uvm cp` on the command line: what is meant by its two words, and what is refused before a VM is looked for."""

from __future__ import annotations

import pytest

from utilityvm.cli.copy import place

from .conftest import Uvm


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("worker:/srv", ("worker", "/srv")),
        ("worker:/a:b", ("worker", "/a:b")),
        ("a.b-c:/", ("a.b-c", "/")),
        ("file", (None, "file")),
        ("/a/b:c", (None, "/a/b:c")),
        ("./a:b", (None, "./a:b")),
        ("../a:b", (None, "../a:b")),
        ("dir/a:b", (None, "dir/a:b")),
        ("-", (None, "-")),
        (":/x", (None, ":/x")),
    ],
)
def test_a_place_is_of_a_vm_or_of_this_host(text: str, meant: tuple[str | None, str]) -> None:
    assert place(text) == meant


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("cp a b", 2, "none is in a VM"),
        ("cp v:/a w:/b", 2, "both are in VMs"),
        ("cp v:/a - --json", 2, "--json"),
        ("cp v:/a b --links=all", 2, "--links"),
        ("cp v:/a b --max-size=lots", 2, "--max-size"),
        ("cp v:/a b", 3, "v"),
    ],
)
def test_what_cannot_be_is_said(uvm: Uvm, words: str, code: int, text: str) -> None:
    done = uvm(*words.split())
    assert done.exit_code == code, done.stderr
    assert text in done.stderr
