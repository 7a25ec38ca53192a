"""The initramfs: a busybox, a handful of kernel modules, and the script that mounts the root disk."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from utilityvm.errors import SetupError


def module_files(tree: Path) -> dict[str, Path]:
    """Every kernel module below `tree`, by its name with `_` for `-`."""
    return {path.name.partition(".")[0].replace("-", "_"): path for path in sorted(tree.rglob("*.ko*"))}


def module_bytes(path: Path) -> bytes:
    """The module as the kernel's loader takes it.

    Raises:
        SetupError: it is packed in a way that Python's standard library does not know.
    """
    data = path.read_bytes()
    if path.suffix == ".ko":
        return data
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    raise SetupError(f"{path.name}: kernel modules packed as {path.suffix} are not supported")


def _depends(data: bytes) -> list[str]:
    # .modinfo is a run of NUL-terminated key=value strings.
    begin = data.find(b"\0depends=")
    if begin < 0:
        return []
    text = data[begin + 9 : data.index(b"\0", begin + 1)].decode()
    return [name.replace("-", "_") for name in text.split(",") if name]


def builtin_modules(tree: Path) -> frozenset[str]:
    """What is in the kernel itself, of the kernel whose modules are in `tree`."""
    paths = (tree / "modules.builtin").read_text().split()
    return frozenset(path.rpartition("/")[2].removesuffix(".ko").replace("-", "_") for path in paths)


def in_load_order(wanted: Iterable[str], files: Mapping[str, Path], builtin: Container[str]) -> dict[str, bytes]:
    """The modules and all that they depend on, each after what it needs. Those built into the kernel are left out.

    Raises:
        SetupError: the kernel has no such module.
    """
    ordered: dict[str, bytes] = {}

    def visit(name: str) -> None:
        if name in ordered or name in builtin:
            return
        if name not in files:
            raise SetupError(f"this kernel has no module {name}", remedy="report this, with the version of the kernel")
        data = module_bytes(files[name])
        for needed in _depends(data):
            visit(needed)
        ordered[name] = data

    for name in wanted:
        visit(name.replace("-", "_"))
    return ordered


class CpioArchive:
    """An archive in cpio's `newc` form, which the kernel unpacks. Source: the kernel's initramfs buffer format."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0

    def _entry(self, name: str, mode: int, content: bytes, *, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        numbers = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
        self._data += b"070701" + b"".join(b"%08X" % number for number in numbers) + path
        self._pad()
        self._data += content
        self._pad()

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)

    def folder(self, name: str) -> None:
        self._entry(name, 0o040755, b"")

    def file(self, name: str, content: bytes, *, mode: int = 0o644) -> None:
        self._entry(name, 0o100000 | mode, content)

    def character_device(self, name: str, major: int, minor: int) -> None:
        self._entry(name, 0o020600, b"", device=(major, minor))

    def close(self) -> bytes:
        self._entry("TRAILER!!!", 0, b"")
        return bytes(self._data)


def build(*, busybox: bytes, modules: Mapping[str, bytes], script: str) -> bytes:
    """The initramfs. It is not packed: unpacking costs an emulated CPU more than reading 4 MB."""
    archive = CpioArchive()
    for folder in ("bin", "dev", "lower", "modules", "proc", "root", "rw", "sys"):
        archive.folder(folder)
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", busybox, mode=0o755)
    for name, data in modules.items():
        archive.file(f"modules/{name}.ko", data)
    archive.file("init", script.encode(), mode=0o755)
    return archive.close()
