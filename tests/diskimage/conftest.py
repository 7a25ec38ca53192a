"""Images made by qemu-img, and images in memory whose bytes are counted."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import pytest

from utilityvm.diskimage import headers
from utilityvm.diskimage.source import Source
from utilityvm.scsi.ports import DiskFormat

PAGE = 4096


class Bytes:
    """A sparse file in memory. It counts what is read of it, and holds no more than was written."""

    def __init__(self, size: int, pages: dict[int, bytearray] | None = None) -> None:
        self.size = size
        self.pages = pages if pages is not None else {}
        self.bytes_read = 0
        self.reads = 0

    def __repr__(self) -> str:
        return f"<{self.size} bytes>"

    @classmethod
    def of(cls, data: bytes, *, at: int = 0, size: int | None = None) -> Bytes:
        made = cls(size if size is not None else at + len(data))
        made.write(at, data)
        return made

    @classmethod
    def of_file(cls, path: Path) -> Bytes:
        made = cls(path.stat().st_size)
        with path.open("rb") as file:
            for number in range(-(-made.size // PAGE)):
                page = file.read(PAGE)
                if page.strip(b"\0"):
                    made.pages[number] = bytearray(page.ljust(PAGE, b"\0"))
        return made

    def copy(self) -> Bytes:
        return Bytes(self.size, {number: bytearray(page) for number, page in self.pages.items()})

    def get(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        first, last = offset // PAGE, -(-(offset + length) // PAGE)
        data = b"".join(self.pages.get(number, bytes(PAGE)) for number in range(first, last))
        return data[offset - first * PAGE :][:length]

    def write(self, offset: int, data: bytes) -> Bytes:
        for at, byte in enumerate(data, offset):
            self.pages.setdefault(at // PAGE, bytearray(PAGE))[at % PAGE] = byte
        self.size = max(self.size, offset + len(data))
        return self

    def put(self, offset: int, layout: str, *values: object) -> Bytes:
        return self.write(offset, struct.pack(layout, *values))

    def pread(self, length: int, offset: int) -> bytes:
        assert length >= 0
        assert offset >= 0
        data = self.get(offset, length)
        self.reads += 1
        self.bytes_read += len(data)
        return data

    def source(self) -> Source:
        return Source(self.pread, size_bytes=self.size, name="image")

    def read(self, expected: DiskFormat | None = None) -> headers.ImageHeader:
        return headers.read_source(self.source(), expected=expected)

    def save(self, path: Path) -> Path:
        with path.open("wb") as file:
            for number, page in sorted(self.pages.items()):
                file.seek(number * PAGE)
                file.write(page)
            file.truncate(self.size)
        return path


def vhd_checksum(data: bytes, at: int) -> int:
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


def _shifted(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


SHIFTED = [_shifted(value) for value in range(256)]


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = SHIFTED[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def reseal_vhd(image: Bytes) -> Bytes:
    """Make the checksums of a VHD right again: of the copy, the footer and the dynamic header."""
    for at in (0, image.size - 512):
        footer = image.get(at, 512)
        if footer.startswith(b"conectix"):
            image.put(at + 64, ">I", vhd_checksum(footer, 64))
    (dynamic_at,) = struct.unpack(">Q", image.get(16, 8))
    dynamic = image.get(dynamic_at, 1024) if dynamic_at < image.size - 1024 else b""
    if dynamic.startswith(b"cxsparse"):
        image.put(dynamic_at + 36, ">I", vhd_checksum(dynamic, 36))
    return image


def reseal_vhdx(image: Bytes) -> Bytes:
    """Make the checksums of a VHDX right again: of both headers and the first region table."""
    for at, length in ((64 << 10, 4096), (128 << 10, 4096), (192 << 10, 64 << 10)):
        image.put(at + 4, "<I", 0)
        image.put(at + 4, "<I", crc32c(image.get(at, length)))
    return image


class Maker:
    """qemu-img, in a folder of its own."""

    def __init__(self, folder: Path, program: str) -> None:
        self.folder = folder
        self._program = program
        self._count = 0

    def path(self, suffix: str = "img") -> Path:
        self._count += 1
        return self.folder / f"{self._count}.{suffix}"

    def run(self, *words: str | Path) -> str:
        done = subprocess.run(
            [self._program, *map(str, words)], cwd=self.folder, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def create(
        self,
        format: str,
        size: str = "64M",
        options: Mapping[str, str] = MappingProxyType({}),
        *,
        backing: Path | None = None,
    ) -> Path:
        path = self.path(format)
        words: list[str | Path] = ["create", "-q", "-f", format]
        if options:
            words += ["-o", ",".join(f"{key}={value}" for key, value in options.items())]
        if backing is not None:
            words += ["-b", backing, "-F", "qcow2"]
        self.run(*words, path, size)
        return path

    @property
    def version(self) -> int:
        """QEMU's major version."""
        return int(self.run("--version").split("version ")[1].split(".")[0])

    def info(self, path: Path, format: str) -> dict[str, Any]:
        """What QEMU says of the image: the judge of these tests."""
        told: dict[str, Any] = json.loads(self.run("info", "--output=json", "-f", format, path))
        return told

    def try_info(self, path: Path, format: str) -> dict[str, Any] | None:
        """The same; None if QEMU refuses to open it."""
        done = subprocess.run(
            [self._program, "info", "--output=json", "-f", format, str(path)],
            capture_output=True,
            check=False,
            timeout=60,
        )
        told: dict[str, Any] | None = json.loads(done.stdout) if done.returncode == 0 else None
        return told


def read_file(path: Path, expected: DiskFormat | None = None) -> headers.ImageHeader:
    fd = os.open(path, os.O_RDONLY)
    try:
        return headers.read(fd, name=str(path), expected=expected)
    finally:
        os.close(fd)


class Reader(Protocol):
    def __call__(self, path: Path, expected: DiskFormat | None = None) -> headers.ImageHeader: ...


@pytest.fixture(scope="session")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    program = shutil.which("qemu-img")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("qemu-img is missing; install qemu-utils")
        pytest.skip("qemu-img is missing")
    return Maker(tmp_path_factory.mktemp("images"), program)


@pytest.fixture(scope="session")
def read() -> Reader:
    return read_file


@pytest.fixture(scope="session")
def memory() -> type[Bytes]:
    return Bytes


@pytest.fixture(scope="session")
def reseal() -> dict[str, Callable[[Bytes], Bytes]]:
    return {"vpc": reseal_vhd, "vhdx": reseal_vhdx, "qcow2": lambda image: image, "vmdk": lambda image: image}


@pytest.fixture(scope="session")
def crc() -> Callable[[bytes], int]:
    return crc32c


@pytest.fixture(scope="session")
def seeds(maker: Maker) -> dict[str, Bytes]:
    """One small image of each kind, as qemu-img makes it; tests change copies."""
    base = maker.create("qcow2", "16M")
    return {
        "qcow2": Bytes.of_file(maker.create("qcow2", "16M")),
        "qcow2-v2": Bytes.of_file(maker.create("qcow2", "16M", {"compat": "0.10"})),
        "qcow2-backing": Bytes.of_file(maker.create("qcow2", "16M", backing=base)),
        "vpc-dynamic": Bytes.of_file(maker.create("vpc", "16M", {"force_size": "on"})),
        "vpc-fixed": Bytes.of_file(maker.create("vpc", "1M", {"subformat": "fixed", "force_size": "on"})),
        "vhdx": Bytes.of_file(maker.create("vhdx", "16M")),
        "vmdk": Bytes.of_file(maker.create("vmdk", "16M")),
        "vmdk-stream": Bytes.of_file(maker.create("vmdk", "16M", {"subformat": "streamOptimized"})),
    }
