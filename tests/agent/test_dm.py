"""Mappings, as the kernel's device-mapper is asked for them."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fake_mapper import FakeMapper, Table
from utilityvm.agent import dm
from utilityvm.agent.faults import Fault

KEY = bytes(range(64))
MIB = 1 << 20
DATA_BLOCKS = 16
HASHES_AT = DATA_BLOCKS * 4096
ROOT, SALT = "ab" * 32, "cd" * 4


@pytest.fixture
def mapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMapper:
    (tmp_path / "dev").mkdir()
    return FakeMapper(tmp_path / "dev").install(monkeypatch)


@pytest.fixture
def node(tmp_path: Path, mapper: FakeMapper) -> str:
    """A disk of 1 MiB with a hash tree behind its first 16 blocks."""
    path = tmp_path / "sdb"
    path.write_bytes(bytes(MIB))
    mapper.device(str(path), "8:16")
    put_superblock(path)
    return str(path)


def put_superblock(path: Path, at: int = HASHES_AT, **other: Any) -> None:
    fields = {
        "signature": b"verity\0\0",
        "algorithm": b"sha256",
        "block": 4096,
        "hash_block": 4096,
        "blocks": DATA_BLOCKS,
        "salt_size": 4,
        **other,
    }
    words = struct.pack(
        "<8sII16s32sIIQH6x256s168x",
        fields["signature"],
        1,
        1,
        b"u" * 16,
        fields["algorithm"],
        fields["block"],
        fields["hash_block"],
        fields["blocks"],
        fields["salt_size"],
        bytes.fromhex(SALT),
    )
    with path.open("r+b") as file:
        file.seek(at)
        file.write(words)


# Encrypted ones.


@pytest.mark.parametrize("read_only", [False, True])
def test_an_encrypted_disk_is_mapped_whole_through_its_key(mapper: FakeMapper, node: str, read_only: bool) -> None:
    opened = dm.open_crypt("one", node, MIB, KEY, read_only=read_only)
    assert opened == f"{mapper.folder}/dm-0"
    table = f"aes-xts-plain64 {KEY.hex()} 0 8:16 0 1 allow_discards"
    assert mapper.mappings["one"].table == Table("crypt", MIB // 512, table, read_only)
    assert not mapper.mappings["one"].is_suspended
    assert dm.open_crypt("two", node, MIB, KEY, read_only=False) == f"{mapper.folder}/dm-1"


def test_the_kernel_is_told_to_forget_what_carried_a_key(mapper: FakeMapper, node: str) -> None:
    dm.open_crypt("one", node, MIB, KEY, read_only=False)
    dm.grow("one", 2 * MIB)
    assert not mapper.told


@pytest.mark.parametrize("call", ["load", "suspend"])
def test_what_the_kernel_refuses_leaves_no_mapping(mapper: FakeMapper, node: str, call: str) -> None:
    mapper.refuses[call] = errno.EINVAL
    with pytest.raises(Fault, match="dm-crypt refused: Invalid argument"):
        dm.open_crypt("one", node, MIB, KEY, read_only=False)
    assert not mapper.mappings


def test_a_name_that_is_taken_leaves_its_owner_alone(mapper: FakeMapper, node: str) -> None:
    dm.open_crypt("one", node, MIB, KEY, read_only=False)
    with pytest.raises(Fault, match="device-mapper: Device or resource busy"):
        dm.open_crypt("one", node, MIB, KEY, read_only=False)
    assert mapper.mappings["one"].table


# Their end.


def test_a_mapping_is_removed_and_one_that_is_gone_is_so_already(mapper: FakeMapper, node: str) -> None:
    dm.open_crypt("one", node, MIB, KEY, read_only=False)
    dm.close("one")
    assert not mapper.mappings
    dm.close("one")


def test_a_used_mapping_stays_and_is_named(mapper: FakeMapper, node: str) -> None:
    dm.open_crypt("one", node, MIB, KEY, read_only=False)
    mapper.used.add("one")
    with pytest.raises(Fault, match="the mapping one is in use") as caught:
        dm.close("one")
    assert (caught.value.kind, caught.value.holders) == ("busy", ["something uses one"])
    assert "one" in mapper.mappings


def test_a_used_mapping_goes_later_if_that_is_asked_for(mapper: FakeMapper, node: str) -> None:
    dm.open_crypt("one", node, MIB, KEY, read_only=False)
    mapper.used.add("one")
    dm.close("one", deferred=True)
    mapper.unused("one")
    assert not mapper.mappings


def test_another_error_of_a_removal_is_told(mapper: FakeMapper) -> None:
    mapper.refuses["remove"] = errno.EPERM
    with pytest.raises(PermissionError):
        dm.close("one")


# Growing.


@pytest.mark.parametrize("read_only", [False, True])
def test_an_encrypted_mapping_grows_with_the_same_key(mapper: FakeMapper, node: str, read_only: bool) -> None:
    dm.open_crypt("one", node, MIB, KEY, read_only=read_only)
    before = mapper.mappings["one"].table
    assert before
    mapper.asked.clear()
    assert dm.grow("one", 3 * MIB)
    assert mapper.mappings["one"].table == before._replace(sectors=3 * MIB // 512)
    assert not mapper.mappings["one"].is_suspended
    assert mapper.asked == ["status", "load", "suspend", "suspend"]


def test_a_verified_mapping_stays_as_it_is(mapper: FakeMapper, node: str) -> None:
    dm.open_verity("one", node, MIB, {"RootHash": ROOT, "HashOffset": HASHES_AT})
    before = mapper.mappings["one"].table
    assert not dm.grow("one", 3 * MIB)
    assert mapper.mappings["one"].table == before


@pytest.mark.parametrize("call", ["load", "suspend"])
def test_a_mapping_that_does_not_grow_is_as_it_was(mapper: FakeMapper, node: str, call: str) -> None:
    dm.open_crypt("one", node, MIB, KEY, read_only=False)
    before = mapper.mappings["one"].table
    mapper.refuses[call] = errno.ENOMEM
    with pytest.raises(Fault, match="the mapping one does not grow: Cannot allocate memory"):
        dm.grow("one", 3 * MIB)
    assert mapper.mappings["one"].table == before
    assert not mapper.mappings["one"].is_suspended
    assert not mapper.mappings["one"].waiting


# Verified ones.


def test_a_tree_with_a_superblock_describes_itself(mapper: FakeMapper, node: str) -> None:
    opened = dm.open_verity("one", node, MIB, {"RootHash": ROOT, "HashOffset": HASHES_AT})
    assert opened == f"{mapper.folder}/dm-0"
    table = f"1 8:16 8:16 4096 4096 {DATA_BLOCKS} {DATA_BLOCKS + 1} sha256 {ROOT} {SALT}"
    assert mapper.mappings["one"].table == Table("verity", DATA_BLOCKS * 8, table, read_only=True)


def test_a_tree_without_a_superblock_is_described_by_the_caller(mapper: FakeMapper, node: str) -> None:
    told = {"DataBlocks": 8, "Salt": "", "Algorithm": "sha512", "BlockSize": 1024}
    dm.open_verity("one", node, MIB, {"RootHash": ROOT, "HashOffset": 8192, **told})
    assert mapper.mappings["one"].table == Table(
        "verity", 16, f"1 8:16 8:16 1024 1024 8 8 sha512 {ROOT} -", read_only=True
    )


def test_the_first_and_the_last_block_prove_the_root_hash(
    mapper: FakeMapper, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    plain = os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        read.append((offset, size))
        return plain(fd, size, offset)

    monkeypatch.setattr("os.pread", pread)
    dm.open_verity("one", node, MIB, {"RootHash": ROOT, "HashOffset": HASHES_AT})
    assert read[1:] == [(0, 4096), ((DATA_BLOCKS - 1) * 4096, 4096)]


def test_a_disk_that_does_not_hash_up_to_the_root_is_not_mapped(
    mapper: FakeMapper, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Callable[..., bytes] = os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        if size == 4096:
            raise OSError(errno.EIO, "Input/output error")
        return plain(fd, size, offset)

    monkeypatch.setattr("os.pread", pread)
    with pytest.raises(Fault, match="does not hash up to the root hash"):
        dm.open_verity("one", node, MIB, {"RootHash": ROOT, "HashOffset": HASHES_AT})
    assert not mapper.mappings


@pytest.mark.parametrize(
    ("verity", "said"),
    [
        ({}, "needs a RootHash in hex and a HashOffset"),
        ({"RootHash": "zz", "HashOffset": HASHES_AT}, "needs a RootHash in hex"),
        ({"RootHash": ROOT}, "needs a RootHash"),
        ({"RootHash": ROOT, "HashOffset": -1}, f"the hash offset -1 is outside the disk of {MIB} bytes"),
        ({"RootHash": ROOT, "HashOffset": MIB}, "is outside the disk"),
        ({"RootHash": ROOT, "HashOffset": HASHES_AT + 4096}, "there is no hash tree at byte 69632"),
        ({"RootHash": ROOT, "HashOffset": MIB - 511}, "there is no hash tree"),
        ({"RootHash": ROOT, "HashOffset": HASHES_AT, "DataBlocks": 15}, "superblock says DataBlocks 16, and not 15"),
        ({"RootHash": ROOT, "HashOffset": HASHES_AT, "Salt": "00"}, f"superblock says Salt {SALT}, and not 00"),
        (
            {"RootHash": ROOT, "HashOffset": 8191, "DataBlocks": 8, "Salt": "", "Algorithm": "x", "BlockSize": 1024},
            "protects itself",
        ),
    ],
)
def test_a_tree_that_cannot_be_is_invalid_and_nothing_is_mapped(
    mapper: FakeMapper, node: str, verity: dict[str, Any], said: str
) -> None:
    with pytest.raises(Fault, match=said) as caught:
        dm.open_verity("one", node, MIB, verity)
    assert caught.value.kind == "invalid"
    assert not mapper.asked


@pytest.mark.parametrize(
    "other", [{"block": 3000, "hash_block": 3000}, {"hash_block": 1024}, {"salt_size": 257}, {"blocks": 0}]
)
def test_a_superblock_that_makes_no_sense_is_invalid(mapper: FakeMapper, node: str, other: dict[str, int]) -> None:
    put_superblock(Path(node), **other)
    with pytest.raises(Fault, match="superblock makes no sense"):
        dm.open_verity("one", node, MIB, {"RootHash": ROOT, "HashOffset": HASHES_AT})


def test_a_salt_may_have_256_bytes_and_a_tree_may_follow_its_data_at_once(mapper: FakeMapper, node: str) -> None:
    put_superblock(Path(node), salt_size=256)
    dm.open_verity("one", node, MIB, {"RootHash": ROOT, "HashOffset": HASHES_AT})
    assert mapper.mappings["one"].table
    assert mapper.mappings["one"].table.text.endswith(f"{SALT}{'00' * 252}")


# The kernel's module.


def test_the_module_is_loaded_when_it_is_missing(
    mapper: FakeMapper, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = mapper.folder / "control"
    ran: list[list[str]] = []

    def run(command: list[str], **_how: object) -> SimpleNamespace:
        ran.append(command)
        control.touch()
        return SimpleNamespace(returncode=0, stderr=b"")

    monkeypatch.setattr(subprocess, "run", run)
    dm.open_crypt("one", node, MIB, KEY, read_only=False)
    assert not ran
    control.unlink()
    dm.open_crypt("two", node, MIB, KEY, read_only=False)
    assert ran == [["modprobe", "dm-mod"]]


@pytest.mark.parametrize(("code", "comes"), [(1, False), (1, True), (0, False)])
def test_a_kernel_without_the_module_is_told(
    mapper: FakeMapper, node: str, monkeypatch: pytest.MonkeyPatch, code: int, comes: bool
) -> None:
    control = mapper.folder / "control"
    control.unlink()

    def run(command: list[str], **_how: object) -> SimpleNamespace:
        if comes:
            control.touch()
        return SimpleNamespace(returncode=code, stderr=b"no such module\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(Fault, match=r"no device-mapper in this kernel: no such module$"):
        dm.open_crypt("one", node, MIB, KEY, read_only=False)


def test_a_device_is_named_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    number = os.makedev(8, 17)
    with monkeypatch.context() as patch:
        patch.setattr("os.stat", lambda path: SimpleNamespace(st_rdev=number))
        assert dm._number("/dev/sdb1") == "8:17"
