"""A sender that lies reaches nothing outside of the destination, and leaves nothing half done."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from utilityvm.files import receive
from utilityvm.files.receive import NewFile, Receiver, Rules, leads_out
from utilityvm.files.records import (
    DATA,
    DATA_BYTES,
    DONE,
    FILE,
    FILE_END,
    FOLDER,
    FOLDER_END,
    HEADER,
    LINK,
    MAX_DEPTH,
    OFFSET,
    SKIPPED,
    CopyFault,
    Counts,
    Head,
    headed,
    record,
)

HEAD = Head(0o755, os.geteuid(), os.getegid(), 1)
TOP = headed(FOLDER, HEAD, b"")
END = record(FOLDER_END)
ALL = record(DONE)
OPENED = headed(FILE, HEAD, b"a")


def file(name: bytes, data: bytes = b"data", head: Head = HEAD) -> bytes:
    return headed(FILE, head, name) + record(DATA, OFFSET.pack(0) + data) + record(FILE_END, OFFSET.pack(len(data)))


def link(name: bytes, target: bytes) -> bytes:
    return headed(LINK, HEAD, name, target)


def take(target: Path, *stream: bytes, base: str = "x", **rules: object) -> Counts:
    receiver = Receiver(str(target), base=base, contents=False, rules=Rules(**rules))  # type: ignore[arg-type]
    try:
        for piece in stream:
            receiver.feed(piece)
        return receiver.finish()
    finally:
        receiver.close()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A destination. Beside it nothing changes, and in it is nothing afterwards, for none of these is complete."""
    (tmp_path / "beside").write_text("beside")
    (tmp_path / "target").mkdir()
    before = sorted(tmp_path.rglob("*"))
    yield tmp_path / "target"
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "beside").read_text() == "beside"


@pytest.mark.parametrize(
    "name", [b"..", b".", b"../beside", b"/etc/passwd", b"a/b", b"a\0b", b"", b"../../../../tmp/planted"]
)
def test_a_name_is_one_component(target: Path, name: bytes) -> None:
    for entry in (file(name), headed(FOLDER, HEAD, name), link(name, b"inside")):
        with pytest.raises(CopyFault) as raised:
            take(target, TOP, entry, END, ALL)
        assert raised.value.kind in ("unsafe", "broken")


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ((file(b"a"), file(b"a")), "comes twice"),
        ((file(b"b"), file(b"a")), "out of order"),
        ((link(b"a", b"."), headed(FOLDER, HEAD, b"a") + file(b"planted")), "comes twice"),
        ((headed(b"c", HEAD, b"device"),), "where that cannot be"),
        ((OPENED + record(DATA, OFFSET.pack(9) + b"x") + record(DATA, OFFSET.pack(3) + b"x"),), "order"),
        ((OPENED + record(DATA, OFFSET.pack(9) + b"x") + record(FILE_END, OFFSET.pack(3)),), "before"),
        ((OPENED + record(DATA, OFFSET.pack(1 << 63) + b"x"),), "order"),
        ((OPENED + record(DATA, OFFSET.pack(0)),), "order, or none"),  # nothing, for ever
        ((OPENED + record(FILE_END, OFFSET.pack(1 << 63)),), "before"),
        ((OPENED + file(b"b"),), "leaves a file"),
        ((record(FILE, b"short"),), "no head"),
        ((headed(FILE, HEAD._replace(mtime_ns=(1 << 63) - 1), b"a"),), "no time"),
        ((HEADER.pack(FILE, 1 << 31),), "a record of"),
        ((END, END, ALL), "where that cannot be"),
        ((END, TOP), "two first"),
        ((END, ALL, ALL), "after its end"),
        ((ALL,), "where that cannot be"),
        ((END,), "ended before"),
        ((file(b"a")[:-3],), "ended before"),
    ],
)  # fmt: skip
def test_a_stream_that_makes_no_sense_is_refused(target: Path, made: tuple[bytes, ...], why: str) -> None:
    with pytest.raises(CopyFault, match=why) as raised:
        take(target, TOP, *made)
    assert raised.value.kind == "broken"


def test_a_first_entry_with_a_name_or_no_entry_is_refused(target: Path) -> None:
    for stream in ((file(b"name"), ALL), (ALL,), (END,), ()):
        with pytest.raises(CopyFault):
            take(target, *stream)


@pytest.mark.parametrize(
    ("link_target", "depth", "out"),
    [
        (b"inside", 0, False),
        (b"a/b/c", 0, False),
        (b"./a", 0, False),
        (b"../a", 1, False),
        (b"../../a", 2, False),
        (b"/etc/passwd", 5, True),
        (b"..", 0, True),
        (b"../../a", 1, True),
        (b"a/../../b", 1, True),
        (b"a/../b", 0, True),  # `a` may be a link, and then it goes up from where that leads
        (b"./..//..", 1, True),
    ],
)
def test_a_link_that_may_lead_out_is_known(link_target: bytes, depth: int, out: bool) -> None:
    assert leads_out(link_target, depth=depth) == out


def test_a_link_that_leads_out_is_refused_or_left_out(target: Path) -> None:
    with pytest.raises(CopyFault, match="leads out of what is copied, to '/etc/passwd'") as raised:
        take(target, TOP, link(b"a", b"/etc/passwd"), END, ALL)
    assert raised.value.kind == "unsafe"
    with pytest.raises(CopyFault, match="leads out"):
        take(target, link(b"", b"../beside"), ALL)  # the one thing that is copied
    counts = take(target, link(b"", b"../beside"), ALL, links=receive.SKIP)
    assert counts.links == 0
    assert "leads out" in counts.skipped[0]


def test_links_that_were_there_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "target/x").mkdir(parents=True)
    (tmp_path / "target/x/a").symlink_to(tmp_path / "outside")
    with pytest.raises(CopyFault, match="a is there already, and is no folder"):
        take(tmp_path / "target", TOP, headed(FOLDER, HEAD, b"a") + file(b"planted") + END, END, ALL)
    (tmp_path / "target/y").symlink_to(tmp_path / "outside")
    with pytest.raises(CopyFault, match="y is there already, and is no folder"):
        take(tmp_path / "target", TOP, file(b"planted"), END, ALL, base="y")
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_folder_that_is_moved_away_meanwhile_leads_nowhere_else(tmp_path: Path) -> None:
    """Somebody on this side puts a link in place of a folder that is being filled."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "target/x/a").mkdir(parents=True)
    receiver = Receiver(str(tmp_path / "target"), base="x", contents=False, rules=Rules())
    receiver.feed(TOP + headed(FOLDER, HEAD, b"a"))
    (tmp_path / "target/x/a").rename(tmp_path / "moved")
    (tmp_path / "target/x/a").symlink_to(tmp_path / "outside")
    receiver.feed(file(b"f") + END + END + ALL)
    receiver.finish()
    receiver.close()
    assert list((tmp_path / "outside").iterdir()) == []
    assert (tmp_path / "moved/f").read_bytes() == b"data"


def test_set_user_id_is_dropped_unless_the_sender_is_trusted(tmp_path: Path) -> None:
    program = file(b"", head=HEAD._replace(mode=0o6755)) + ALL
    take(tmp_path, program, base="one")
    take(tmp_path, program, base="two", is_trusted=True)
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "two").stat().st_mode) == 0o6755


def test_an_endless_stream_ends_at_its_limits(target: Path) -> None:
    piece = b"x" * DATA_BYTES
    endless = (record(DATA, OFFSET.pack(at) + piece) for at in range(0, 1 << 40, len(piece)))
    with pytest.raises(CopyFault, match="more than 1000000 bytes") as raised:
        take(target, headed(FILE, HEAD, b""), *(next(endless) for _ in range(20)), max_bytes=1_000_000)
    assert raised.value.kind == "limit"
    many = [file(b"%07d" % number, b"d") for number in range(200)]
    with pytest.raises(CopyFault, match="more than 100 files"):
        take(target, TOP, *many, max_entries=100)
    with pytest.raises(CopyFault, match="more than 100 files"):
        take(target, TOP, *([record(SKIPPED, b"x")] * 200), max_entries=100)
    with pytest.raises(CopyFault, match=f"more than {MAX_DEPTH} folders"):
        take(target, TOP, *([headed(FOLDER, HEAD, b"d")] * 500))


@pytest.mark.parametrize("has_tmpfile", [True, False])
def test_a_stream_that_ends_in_the_middle_leaves_nothing(
    target: Path, monkeypatch: pytest.MonkeyPatch, has_tmpfile: bool
) -> None:
    """Wherever it is cut: also on a file system without files that have no name."""
    if not has_tmpfile:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)  # EISDIR, as where there are none
    for stream in (TOP + headed(FOLDER, HEAD, b"a") + file(b"f") + END + END + ALL, file(b"", b"x" * 1000) + ALL):
        for end in (*range(0, len(stream), 3), len(stream) - 1):
            with pytest.raises(CopyFault, match="ended before"):
                take(target, stream[:end])
            assert list(target.iterdir()) == []


@pytest.mark.parametrize("has_tmpfile", [True, False])
def test_a_file_is_replaced_at_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_tmpfile: bool
) -> None:
    if not has_tmpfile:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)
    (tmp_path / "f").write_text("old")
    folder = os.open(tmp_path, os.O_RDONLY)
    dropped, kept = NewFile(folder, b"f"), NewFile(folder, b"f")
    dropped.write(b"half", 0)
    kept.write(b"new", 0)
    assert (tmp_path / "f").read_text() == "old"
    dropped.drop()
    kept.named(is_durable=True)
    kept.drop()
    os.close(folder)
    assert (tmp_path / "f").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
