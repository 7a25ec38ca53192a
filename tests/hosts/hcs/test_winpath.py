from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utilityvm.hosts.hcs import winpath

SPELLINGS = [
    "C:\\a\\d.vhdx",
    "c:\\A\\D.VHDX",
    "C:\\a\\.\\d.vhdx",
    "C:\\a\\x\\..\\d.vhdx",
    "C:\\a\\\\d.vhdx",
    "C:/a/d.vhdx",
    "C:\\a\\d.vhdx.",
    "C:\\a\\d.vhdx ",
    "\\\\?\\C:\\a\\d.vhdx",
    "\\\\.\\C:\\a\\d.vhdx",
    "\\??\\C:\\a\\d.vhdx",
    "//?/C:/a/d.vhdx",
]


@pytest.mark.parametrize("path", SPELLINGS)
def test_each_spelling_of_a_path_is_one_file(path: str) -> None:
    assert winpath.same_file_key(path) == winpath.same_file_key(SPELLINGS[0])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("C:\\a\\d.vhdx", "D:\\a\\d.vhdx"),
        ("C:\\a\\d.vhdx", "C:\\a\\d.vhd"),
        ("C:\\a.b", "C:\\ab"),
        ("C:\\stra\u00dfe", "C:\\strasse"),
        ("C:\\\u0131", "C:\\i"),  # the dotless i
        ("C:\\\u017f", "C:\\s"),  # the long s
        ("C:\\\u00b5", "C:\\\u03bc"),  # the micro sign and the Greek letter
        ("C:\\\u00e9", "C:\\e\u0301"),  # composed and decomposed
        ("\\\\.\\PHYSICALDRIVE2", "\\\\.\\PHYSICALDRIVE21"),
        ("\\\\server\\share\\a", "\\\\server\\share2\\a"),
        ("\\\\?\\C:\\a.", "C:\\a."),
    ],
)
def test_two_files_are_two(one: str, other: str) -> None:
    assert winpath.same_file_key(one) != winpath.same_file_key(other)


def test_devices_and_shares_have_spellings_too() -> None:
    assert winpath.same_file_key("\\\\.\\physicaldrive2") == winpath.same_file_key("\\\\?\\PHYSICALDRIVE2")
    assert winpath.same_file_key("\\\\?\\UNC\\srv\\sh\\x") == winpath.same_file_key("\\\\SRV\\sh\\X")


@given(st.text("abAB\\/.: ?", min_size=1, max_size=20))
def test_case_makes_no_difference(path: str) -> None:
    assert winpath.same_file_key(path.swapcase()) == winpath.same_file_key(path)


@pytest.mark.parametrize("path", [*SPELLINGS, "\\\\srv\\sh\\x", "\\\\.\\PHYSICALDRIVE2"])
def test_absolute_paths(path: str) -> None:
    assert winpath.is_absolute(path)


@pytest.mark.parametrize("path", ["", "a", "a\\b", "C:a", "C:", "\\a", ".\\a"])
def test_relative_paths(path: str) -> None:
    assert not winpath.is_absolute(path)


def test_devices() -> None:
    assert winpath.is_device("\\\\.\\PHYSICALDRIVE2")
    assert winpath.is_device("\\\\?\\GLOBALROOT\\Device\\x")
    for path in ("C:\\a", "\\\\?\\C:\\a", "\\\\?\\UNC\\srv\\sh\\x", "\\\\srv\\sh", "a"):
        assert not winpath.is_device(path)


@pytest.mark.parametrize(
    ("path", "base"),
    [
        ("", "."),
        ("\\", "\\"),
        ("C:\\", "\\"),
        ("C:x", "x"),
        ("C:\\a\\b.vhdx", "b.vhdx"),
        ("C:\\a\\", "a"),
        ("C:/fwd/dir/z.vhdx", "z.vhdx"),
        ("\\\\s\\sh\\f.vhdx", "f.vhdx"),
        ("\\\\?\\C:\\a\\b.vhdx", "b.vhdx"),
        ("\\\\.\\PHYSICALDRIVE4", "\\"),
        ("a", "a"),
    ],
)
def test_base_is_gos(path: str, base: str) -> None:
    assert winpath.base(path) == base


@pytest.mark.parametrize(
    ("folder", "joined"),
    [
        ("C:\\c", "C:\\c\\x"),
        ("C:\\c\\", "C:\\c\\x"),
        ("C:/c/", "C:\\c\\x"),
        ("C:\\a\\..\\b\\.", "C:\\b\\x"),
        ("C:\\..", "C:\\x"),
        ("C:", "C:x"),
        ("", "x"),
        ("s\\..\\..", "..\\x"),
        ("\\\\srv\\sh", "\\\\srv\\sh\\x"),
    ],
)
def test_join_is_gos(folder: str, joined: str) -> None:
    assert winpath.join(folder, "x") == joined


def test_below_adds_one_separator() -> None:
    assert winpath.below("C:\\c", "x") == winpath.below("C:\\c\\", "x") == "C:\\c\\x"


@pytest.mark.parametrize(
    ("path", "known_as"),
    [
        ("/run/mounts/scsi/0_1_0", "C:\\run\\mounts\\scsi\\0_1_0"),
        ("/C:/data", "C:\\data"),
        ("D:\\data", "D:\\data"),
        ("D:/data/x", "D:\\data\\x"),
    ],
)
def test_guest_paths_as_windows_knows_them(path: str, known_as: str) -> None:
    assert winpath.guest_path(PurePosixPath(path)) == known_as
