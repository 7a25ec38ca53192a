"""Images and paths that somebody made to harm: each rule for images, broken, and what goes beyond the rules.

`made` makes all of them in a folder, by qemu-img and by hand. `secret` is a file there that everybody may read, and
that no image may lead to. What each has to be is in `must`: refused, or data (its bytes are the disk's).
"""

from __future__ import annotations

import functools
import os
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from utilityvm.scsi.ports import DiskFormat

MIB: Final = 1 << 20
SECRET: Final = b"A SECRET OF THE HOST\n" * 3000
_QCOW2_BACKING, _QCOW2_CRYPT, _QCOW2_L1, _QCOW2_FEATURES, _QCOW2_NAME = 8, 32, 36, 72, 1024


@dataclass(frozen=True, slots=True)
class Hostile:
    """One of them. `path` is what a user is told to attach."""

    name: str
    path: str
    must: Literal["refused", "data", "either"] = "refused"
    format: DiskFormat | None = None  # that the user names


@functools.cache
def _seed(kind: str, options: tuple[str, ...]) -> bytes:
    """What qemu-img makes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "seed")
        words = ["qemu-img", "create", "-q", "-f", kind, *options, str(path), "1M"]
        subprocess.run(words, check=True, capture_output=True)
        return path.read_bytes()


def _create(path: Path, kind: str, *options: str, over: object = None) -> Path:
    """An image of that kind; a qcow2 may be `over` a name."""
    path.write_bytes(_seed(kind, options))
    if over is not None:
        name = str(over).encode()
        _put(path, _QCOW2_BACKING, ">QI", _QCOW2_NAME, len(name))
        _put(path, _QCOW2_NAME, f"{len(name)}s", name)
    return path


def _put(path: Path, at: int, layout: str, *values: object) -> Path:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        file.write(struct.pack(layout, *values))
    return path


def _sealed_vhd(path: Path) -> Path:
    """With the checksum of its footer, and of the copy at its beginning, made anew."""
    data = bytearray(path.read_bytes())
    for at in {0 if data[:8] == b"conectix" else len(data) - 512, len(data) - 512}:
        data[at + 64 : at + 68] = bytes(4)
        struct.pack_into(">I", data, at + 64, ~sum(data[at : at + 512]) & 0xFFFFFFFF)
    path.write_bytes(data)
    return path


def _names(secret: Path) -> Iterator[tuple[str, str]]:
    """What a header may name instead of a file that the user gave."""
    yield "a path", str(secret)
    yield "a relative path", secret.name
    yield "a way up", f"../../../../../../..{secret}"
    yield "a link of the kernel's", "/proc/self/fd/0"
    yield "a device", "/dev/zero"
    yield "json:", f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{secret}"}}}}'
    yield "json: over the network", 'json:{"driver":"nbd","server":{"type":"inet","host":"127.0.0.1","port":"1"}}'
    for protocol in ("nbd:127.0.0.1:1", "nbd+unix:///x?socket=/x", "ssh://x@127.0.0.1/x", "http://127.0.0.1:1/x"):
        yield protocol.partition(":")[0], protocol
    yield "file:", f"file:{secret}"
    yield "fat:rw:", "fat:rw:/etc"
    yield "blkdebug:", f"blkdebug::{secret}"
    yield "host_device:", "host_device:/dev/sda"
    yield "fd:", "fd:0"


def _qcow2(folder: Path, secret: Path) -> Iterator[Hostile]:
    for number, (what, name) in enumerate(_names(secret)):
        path = _create(folder / f"backing{number}.qcow2", "qcow2", over=name)
        yield Hostile(f"qcow2 over {what}", str(path))
        yield Hostile(f"qcow2 over {what}, called raw", str(path), "either", DiskFormat.RAW)
        path = _create(folder / f"data{number}.qcow2", "qcow2")
        data = name.encode()
        extension = struct.pack(">II", 0x44415441, len(data)) + data + bytes(-len(data) % 8)
        for bit in (4, 0):  # with the feature, and without
            _put(path, _QCOW2_FEATURES, ">Q", bit)
            _put(path, 112, f"{len(extension)}s", extension)
            copy = path.with_name(f"data{number}-{bit}.qcow2")
            copy.write_bytes(path.read_bytes())
            yield Hostile(f"qcow2 with its data in {what}, bit {bit}", str(copy))
    path = folder / "self.qcow2"
    yield Hostile("qcow2 over itself", str(_create(path, "qcow2", over=path)))
    for bit in (*range(5, 12), 31, 62, 63):
        path = _put(_create(folder / f"bit{bit}.qcow2", "qcow2"), _QCOW2_FEATURES, ">Q", 1 << bit)
        yield Hostile(f"qcow2 with feature {bit}", str(path))
    for method in (1, 2, 255):
        path = _put(_create(folder / f"crypt{method}.qcow2", "qcow2"), _QCOW2_CRYPT, ">I", method)
        yield Hostile(f"qcow2 encrypted by method {method}", str(path))
    for what, at, layout, values in (
        ("a disk of 2^63 bytes", 24, ">Q", (1 << 63,)),
        ("a disk of 64 PiB", 24, ">Q", (1 << 56,)),
        ("clusters of 2^63 bytes", 20, ">I", (63,)),
        ("clusters of 4 bytes", 20, ">I", (2,)),
        ("an L1 table of 32 GiB", _QCOW2_L1, ">I", (0xFFFFFFFF,)),
        ("an L1 table at the end of the world", 40, ">Q", (1 << 62,)),
        ("a refcount table of 2^32 clusters", 56, ">I", (0xFFFFFFFF,)),
        ("refcounts of 2^255 bits", 96, ">I", (255,)),
        ("4 billion snapshots", 60, ">IQ", (0xFFFFFFFF, 65536)),
        ("a header of 4 GiB", 100, ">I", (0xFFFFFFF8,)),
        ("a backing name of 4 GiB", _QCOW2_BACKING, ">QI", (512, 0xFFFFFFFF)),
        ("version 4", 4, ">I", (4,)),
    ):
        path = _create(folder / f"bomb{at}-{values[0]}.qcow2", "qcow2")
        yield Hostile(f"qcow2 with {what}", str(_put(path, at, layout, *values)))


def _vmdk(folder: Path, secret: Path) -> Iterator[Hostile]:
    head = '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="{}"\n'
    for number, (kind, extent) in enumerate(
        (
            ("monolithicFlat", f'RW 2048 FLAT "{secret}" 0'),
            ("monolithicFlat", f'RW 2048 FLAT "{secret.name}" 0'),
            ("vmfs", f'RW 2048 VMFS "{secret}"'),
            ("twoGbMaxExtentSparse", 'RW 2048 SPARSE "x.vmdk"'),
            ("fullDevice", 'RW 2048 FLAT "/dev/zero" 0'),
            ("monolithicFlat", 'RW 2048 FLAT "json:{}" 0'),
            ("custom", f'RW 2048 ZERO\nRW 2048 FLAT "{secret}" 0'),
        )
    ):
        text = head.format(kind) + extent + "\n"
        for suffix, named in ((".vmdk", None), (".vmdk", DiskFormat.VMDK), (".img", DiskFormat.VMDK)):
            path = folder / f"descriptor{number}-{named}{suffix}"
            path.write_text(text.ljust(MIB, "\0"))
            yield Hostile(f"VMDK descriptor {number}: {kind}, asked for as {named}", str(path), format=named)
    for number, (before, after) in enumerate(
        (
            (b"parentCID=ffffffff", b"parentCID=12345678"),
            (b"# The Disk", f'parentFileNameHint="{secret}"\n#'.encode()),
            (b"monolithicSparse", b"monolithicFlat"),
            (b"# The Disk", f'RW 2048 FLAT "{secret}" 0\n#'.encode()),
        )
    ):
        path = _create(folder / f"embedded{number}.vmdk", "vmdk")
        whole = path.read_bytes()
        inside = whole[512 : 21 * 512].replace(before, after)[: 20 * 512].ljust(20 * 512, b"\0")
        path.write_bytes(whole[:512] + inside + whole[21 * 512 :])
        yield Hostile(f"VMDK with {after.decode().partition(' ')[0].strip()[:20]} inside", str(path))
    for what, at, layout, value in (
        ("a disk of 2^63 sectors", 12, "<Q", 1 << 63),
        ("grains of 2^40 sectors", 20, "<Q", 1 << 40),
        ("4 billion entries a table", 44, "<I", 0xFFFFFFFF),
        ("a directory far outside", 56, "<Q", 1 << 50),
    ):
        yield Hostile(f"VMDK with {what}", str(_put(_create(folder / f"bomb{at}.vmdk", "vmdk"), at, layout, value)))


def _vhd(folder: Path, secret: Path) -> Iterator[Hostile]:
    path = _create(folder / "differencing.vhd", "vpc", "-o", "subformat=dynamic")
    for at in (60, -512 + 60):
        _put(path, at, ">I", 4)
    name = str(secret).encode("utf-16-be")
    _put(path, 512 + 64, f"{len(name)}s", name)
    yield Hostile("VHD with a parent", str(_sealed_vhd(path)))
    for what, at, layout, value in (
        ("a disk of 2^63 bytes", 48, ">Q", 1 << 63),
        ("4 billion blocks", 512 + 28, ">I", 0xFFFFFFFF),
        ("blocks of 2 GiB", 512 + 32, ">I", 1 << 31),
        ("its table far outside", 512 + 16, ">Q", 1 << 60),
    ):
        path = _create(folder / f"bomb{at}.vhd", "vpc", "-o", "subformat=dynamic")
        _put(path, at, layout, value)
        yield Hostile(f"VHD with {what}", str(_sealed_vhd(path)))
    path = _create(folder / "parent.vhdx", "vhdx")
    data = path.read_bytes()
    at = data.index(bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b"))  # the item "file parameters" of its metadata
    offset = struct.unpack_from("<I", data, at + 16)[0]
    metadata = data.index(b"metadata", 1 << 20) if b"metadata" in data[1 << 20 :] else 2 << 20
    yield Hostile("VHDX with a parent", str(_put(path, metadata + offset + 4, "<I", 2)))
    path = _create(folder / "region.vhdx", "vhdx")
    yield Hostile("VHDX with a damaged region table", str(_put(path, 196608 + 8, "<I", 0xFFFFFFFF)))


def _two_at_once(folder: Path, secret: Path) -> Iterator[Hostile]:
    """Files that are two things to two readers."""
    over_secret = _create(folder / "over.qcow2", "qcow2", over=secret).read_bytes()
    footer = _create(folder / "fixed.vhd", "vpc", "-o", "subformat=fixed,force_size").read_bytes()[-512:]
    sparse = _create(folder / "sparse.vmdk", "vmdk").read_bytes()

    def both(name: str, data: bytes) -> str:
        path = folder / name
        path.write_bytes(data)
        return str(path)

    yield Hostile("qcow2 with a VHD's footer", both("both1.qcow2", over_secret.ljust(MIB, b"\0") + footer))
    yield Hostile("qcow2 with a VHD's footer, called VHD", both("both1.vhd", over_secret.ljust(MIB, b"\0") + footer))
    yield Hostile("VMDK with a VHD's footer", both("both2.vmdk", sparse.ljust(MIB, b"\0") + footer))
    yield Hostile("a raw disk with a VHD's footer", both("both3.img", bytes(MIB) + footer), "either")
    yield Hostile("qcow2 called .raw", both("both4.raw", over_secret))
    iso = over_secret.ljust(32769, b"\0") + b"CD001" + bytes(MIB)
    yield Hostile("an ISO with a qcow2 in front", both("both5.iso", iso))
    yield Hostile("a GPT disk with a qcow2 in front", both("both6.img", over_secret[:512] + b"EFI PART" + bytes(MIB)))
    for name, magic in (
        ("qcow1", b"QFI\xfb\0\0\0\1"), ("QED", b"QED\0"), ("VDI", b"<<< Oracle VM VirtualBox Disk Image >>>\n"),
        ("Parallels", b"WithoutFreeSpace"), ("Parallels 2", b"WithouFreSpacExt"), ("Bochs", b"Bochs Virtual HD Image"),
        ("COWD", b"COWD\1\0\0\0"), ("cloop", b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount"),
        ("gzip", b"\x1f\x8b\x08\0"), ("xz", b"\xfd7zXZ\0"), ("zstd", b"\x28\xb5\x2f\xfd"), ("zip", b"PK\3\4"),
    ):  # fmt: skip
        head = (magic + (secret.name.encode() if name == "qcow1" else b"")).ljust(MIB, b"\0")
        yield Hostile(f"{name}'s magic", both(f"magic-{name}.img", head), "either")
        yield Hostile(f"{name}'s magic, called raw", both(f"magic-{name}.raw", head), "either", DiskFormat.RAW)


def _paths(folder: Path, secret: Path) -> Iterator[Hostile]:
    for what, name in _names(secret):
        if what not in ("a path", "a relative path", "a way up"):
            yield Hostile(f"the path {what}", name)
    (folder / "pipe").unlink(missing_ok=True)
    os.mkfifo(folder / "pipe")
    yield Hostile("a pipe", str(folder / "pipe"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.close()
    yield Hostile("a socket", str(folder / "socket"))
    yield Hostile("a folder", str(folder))
    for device in ("/dev/null", "/dev/zero", "/dev/tty", "/dev/mem", "/dev/kvm"):
        if Path(device).exists():
            yield Hostile(device, device)
    for path in ("/proc/self/mem", "/proc/kcore", "/proc/self/fd/0", "/sys/kernel/notes", "/dev/fd/0", "/dev/stdin"):
        yield Hostile(path, path)
    links = {"loop": folder / "loop", "dangling": folder / "nowhere", "to-proc": Path("/proc/self/environ")}
    for name, target in links.items():
        (folder / name).symlink_to(target)
        yield Hostile(f"a link: {name}", str(folder / name))
    hole = folder / "hole.img"
    with hole.open("wb") as file:
        file.truncate(1 << 43)
    yield Hostile("a hole of 8 TiB", str(hole), "either")
    (folder / "empty.img").write_bytes(b"")
    yield Hostile("an empty file", str(folder / "empty.img"))
    (folder / "odd.img").write_bytes(bytes(511))
    yield Hostile("511 bytes", str(folder / "odd.img"), "either")
    if os.geteuid() == 0:
        theirs = folder / "theirs"
        theirs.mkdir()
        (theirs / "disk.img").symlink_to(secret)
        for one in (theirs, theirs / "disk.img"):
            os.lchown(one, 65534, 65534)
        yield Hostile("another user's link", str(theirs / "disk.img"))
        shared = folder / "shared"
        shared.mkdir()
        shared.chmod(0o1777)
        (shared / "hard.img").hardlink_to(secret)
        yield Hostile("a hard link in a shared folder", str(shared / "hard.img"))


def made(folder: Path) -> Iterator[Hostile]:
    """All of them, in `folder`, which is empty; `folder/secret` is the file that none may lead to."""
    secret = folder / "secret"
    secret.write_bytes(SECRET)
    kinds: tuple[Callable[[Path, Path], Iterator[Hostile]], ...] = (_qcow2, _vmdk, _vhd, _two_at_once, _paths)
    for make in kinds:
        yield from make(folder, secret)
