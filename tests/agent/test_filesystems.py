"""Making file systems, with the real tools on files: what refuses comes before the first write; blank means blank."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from filesystem_devices import MIB, device, digest, make, needs_xfs, soon, write
from utilityvm.agent import content, filesystems, tools
from utilityvm.agent.faults import Fault
from utilityvm.agent.filesystems import Below, check_grow, ensure, grow, is_blank, places_to_read

GIB = 1 << 30


@pytest.fixture
def node(tmp_path: Path) -> str:
    """A blank device of 32 MiB."""
    return device(tmp_path / "device")


@pytest.fixture
def full(tmp_path: Path) -> str:
    """A device that holds an ext4."""
    node = device(tmp_path / "full")
    subprocess.run(["mkfs.ext4", "-q", "-F", node], check=True)
    return node


# What is made.


def test_a_blank_device_gets_a_file_system_which_then_stays(node: str) -> None:
    make(node)
    assert content.of(node, soon()).filesystem == "ext4"
    before = digest(node)
    make(node)
    assert digest(node) == before


def test_a_file_system_that_is_there_stays_whoever_uses_it(full: str) -> None:
    before = digest(full)
    make(full, users=("mounted at /a",))
    assert digest(full) == before


@needs_xfs
def test_reformatting_makes_it_whatever_is_there(tmp_path: Path) -> None:
    node = device(tmp_path / "device", 320)
    subprocess.run(["mkfs.ext4", "-q", "-F", node], check=True)
    make(node, "xfs", reformat=True)
    assert content.of(node, soon()).filesystem == "xfs"


def test_what_signed_the_device_at_either_end_is_gone_after_reformatting(node: str) -> None:
    write(node, 0, b"boot code")
    write(node, 512, b"EFI PART")
    write(node, 32 * MIB - 512, b"EFI PART")
    make(node, reformat=True)
    data = Path(node).read_bytes()
    assert b"EFI PART" not in data
    assert b"boot code" not in data


# What is refused has written nothing.


@pytest.mark.parametrize("reformat", [False, True])
def test_a_device_in_use_is_not_written_to(full: str, reformat: bool) -> None:
    before = digest(full)
    with pytest.raises(Fault, match=r"in use: mounted at /a, and 1 more; it was not formatted") as caught:
        make(full, "xfs", users=("mounted at /a", "swap on it"), reformat=reformat)
    assert caught.value.remedy
    assert digest(full) == before


@pytest.mark.parametrize("reformat", [False, True])
def test_a_device_that_somebody_takes_meanwhile_is_not_written_to(
    full: str, reformat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest(full)
    opened = filesystems.os.open  # type: ignore[attr-defined]

    def busy(path: str, flags: int) -> int:
        if flags & filesystems.os.O_EXCL:  # type: ignore[attr-defined]
            raise OSError(16, "Device or resource busy")
        return int(opened(path, flags))

    monkeypatch.setattr("os.open", busy)
    with pytest.raises(Fault, match="cannot be had alone: Device or resource busy; it was not formatted"):
        make(full, "ext4" if reformat else "xfs", reformat=reformat)
    assert digest(full) == before


@needs_xfs
def test_what_is_too_small_for_the_file_system_is_not_written_to(full: str) -> None:
    before = digest(full)
    with pytest.raises(Fault, match=r"mkfs\.xfs failed: Filesystem must be larger than 300MB\.; nothing was written"):
        make(full, "xfs", reformat=True)
    assert digest(full) == before


def test_what_is_too_small_for_ext4_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"x" * 4096)
    with pytest.raises(Fault, match="nothing was written"):
        make(str(path), reformat=True)
    assert path.read_bytes() == b"x" * 4096


def test_a_tool_that_is_not_there_is_told_before_anything_is_written(
    full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(filesystems._MAKERS, "ext4", ("mkfs.none",))
    before = digest(full)
    with pytest.raises(Fault, match=r"mkfs\.none is not in the guest image"):
        make(full, reformat=True)
    assert digest(full) == before


def test_a_file_system_that_we_do_not_make_is_invalid(node: str) -> None:
    with pytest.raises(Fault, match="cannot make a vfat") as caught:
        make(node, "vfat")
    assert caught.value.kind == "invalid"


@pytest.mark.parametrize("offset", [0, 4096, 16 * MIB + 512, 31 * MIB, 32 * MIB - 512])
def test_a_device_with_one_sector_of_data_anywhere_is_not_formatted(node: str, offset: int) -> None:
    write(node, offset, b"x" * 512)
    before = digest(node)
    with pytest.raises(Fault, match="not blank: it holds something that we do not know; it was not formatted"):
        make(node)
    assert digest(node) == before


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("mkfs.ext4 -q -F", "an ext4 file system"),
        ("mkfs.vfat", "a vfat file system"),
        ("mkswap", "swap space"),
        ("sfdisk -q", "a partition table (GPT) with partitions 1 and 2"),
    ],
)
def test_what_keeps_a_device_from_being_formatted_is_named(node: str, command: str, what: str) -> None:
    if not shutil.which(command.split()[0]):
        pytest.skip(f"{command.split()[0]} is not installed")
    subprocess.run([*command.split(), node], check=True, input=b"label: gpt\n,8M\n,8M\n", capture_output=True)
    with pytest.raises(Fault) as caught:
        make(node, "xfs")
    assert f"it holds {what};" in caught.value.message


@pytest.mark.parametrize(("offset", "sign"), [(0, b"XFSB"), (512, b"EFI PART"), (4086, b"SWAPSPACE2")])
def test_a_signature_without_the_rest_is_data_like_any_other(node: str, offset: int, sign: bytes) -> None:
    write(node, offset, sign)
    with pytest.raises(Fault, match="not blank"):
        make(node)


def test_what_is_below_the_mapping_has_to_be_blank_too(node: str, tmp_path: Path) -> None:
    """Through a wrong key everything looks like noise; and a blank device may look blank through none."""
    mapped = device(tmp_path / "mapped")
    write(node, 5 * MIB, b"noise")
    with pytest.raises(Fault, match="data, and no file system shows with this key"):
        ensure(mapped, "ext4", below=Below(node, list), reformat=False, deadline=soon())
    assert not any(Path(mapped).read_bytes())


@needs_xfs
def test_an_xfs_whose_making_was_cut_short_is_none(tmp_path: Path) -> None:
    node = device(tmp_path / "device", 320)
    make(node, "xfs")
    make(node, "xfs")
    write(node, 126, b"\1")
    with pytest.raises(Fault, match="cut short") as caught:
        make(node, "xfs")
    assert "reformat" in str(caught.value.remedy)
    make(node, "xfs", reformat=True)
    make(node, "xfs")


# Blank is blank.


@pytest.mark.parametrize("size", [512, 4096, MIB - 512, MIB, MIB + 512, 300 * MIB, 40 * GIB + 512])
def test_a_device_is_read_whole(size: int) -> None:
    places = list(places_to_read(size, None))
    assert places == list(range(0, size, MIB))


@pytest.mark.parametrize(
    ("may_hold", "mibs"),
    [
        ([], {0, 99}),
        ([(5 * MIB, 1)], {0, 5, 99}),
        ([(5 * MIB - 1, 2)], {0, 4, 5, 99}),
        ([(5 * MIB, 2 * MIB), (6 * MIB, MIB), (98 * MIB, 2 * MIB)], {0, 5, 6, 98, 99}),
        ([(0, 100 * MIB)], set(range(100))),
        ([(99 * MIB, 10 * GIB)], {0, 99}),
        ([(7 * MIB, 0)], {0, 99}),
    ],
)
def test_of_a_device_whose_host_could_tell_what_may_hold_data_and_both_ends_are_read(
    may_hold: list[tuple[int, int]], mibs: set[int]
) -> None:
    places = list(places_to_read(100 * MIB - 512, may_hold))
    assert places == sorted(mib * MIB for mib in mibs)


def test_what_the_host_names_is_looked_at(node: str) -> None:
    assert is_blank(node, soon())
    write(node, 20 * MIB + 4096, b"x")
    assert not is_blank(node, soon())
    assert not is_blank(node, soon(), [(20 * MIB, 8192)])
    assert is_blank(node, soon(), [(10 * MIB, 8192)])


def test_a_device_that_takes_too_long_to_read_is_not_formatted_and_the_error_says_how_far_it_came(node: str) -> None:
    with pytest.raises(Fault, match="0 of 32 MiB were read; it was not formatted") as caught:
        is_blank(node, time.monotonic() - 1)
    assert "timeout_s" in str(caught.value.remedy)


# What grows.


@pytest.mark.parametrize("filesystem", ["vfat", "exfat", "squashfs", "iso9660"])
def test_what_cannot_grow_is_refused_before(node: str, filesystem: str) -> None:
    with pytest.raises(Fault, match=f"/data is a {filesystem} file system.*nothing was changed") as caught:
        check_grow(node, "/data", filesystem, 64 * MIB)
    assert caught.value.remedy
    with pytest.raises(Fault, match="cannot be grown"):
        grow(node, "/data", filesystem, soon())


@pytest.mark.parametrize("filesystem", ["xfs", "btrfs"])
def test_what_can_grow_is_not_refused(node: str, filesystem: str) -> None:
    check_grow(node, "/data", filesystem, 1 << 50)


@pytest.mark.parametrize(("block", "most"), [(1024, 4 << 40), (4096, 16 << 40)])
@pytest.mark.parametrize("filesystem", ["ext4", "ext3", "ext2"])
def test_an_ext_without_64bit_does_not_grow_beyond_its_numbers(
    tmp_path: Path, filesystem: str, block: int, most: int
) -> None:
    node = device(tmp_path / "device")
    subprocess.run(["mkfs.ext4", "-q", "-F", "-b", str(block), "-O", "^64bit", node], check=True)
    check_grow(node, "/data", filesystem, most - block)
    with pytest.raises(Fault, match=rf"/data is a {filesystem} .* of {most - block} bytes at the most"):
        check_grow(node, "/data", filesystem, most)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-b", str(block), "-O", "64bit", node], check=True)
    check_grow(node, "/data", filesystem, most * 100)


@pytest.mark.parametrize(
    ("filesystem", "command"), [("ext4", ["resize2fs", "NODE"]), ("xfs", ["xfs_growfs", "-d", "/data"])]
)
def test_each_grows_by_its_own_tool(
    node: str, filesystem: str, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(tools, "run", lambda words, deadline: ran.append(words))
    grow(node, "/data", filesystem, soon())
    assert ran == [[node if word == "NODE" else word for word in command]]
