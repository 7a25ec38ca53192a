from __future__ import annotations

import gzip
import lzma
import stat
from pathlib import Path

import pytest

from utilityvm.errors import SetupError
from utilityvm.guestimage import initramfs
from utilityvm.machine.programs import find_program, run


def module(depends: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0retpoline=Y\0"


def write(tree: Path, modules: dict[str, str]) -> dict[str, Path]:
    for name, depends in modules.items():
        (tree / f"{name}.ko").write_bytes(module(depends))
    return initramfs.module_files(tree)


def test_a_module_comes_after_what_it_needs(tmp_path: Path) -> None:
    files = write(tmp_path, {"ext4": "jbd2,mbcache", "jbd2": "crc", "mbcache": "", "crc": ""})
    order = list(initramfs.in_load_order(["ext4"], files, frozenset()))
    assert sorted(order) == ["crc", "ext4", "jbd2", "mbcache"]
    assert order.index("crc") < order.index("jbd2") < order.index("ext4")
    assert order.index("mbcache") < order.index("ext4")


def test_a_module_is_loaded_once(tmp_path: Path) -> None:
    files = write(tmp_path, {"a": "c", "b": "c", "c": ""})
    assert list(initramfs.in_load_order(["a", "b", "a"], files, frozenset())) == ["c", "a", "b"]


def test_a_dash_in_a_name_is_an_underscore(tmp_path: Path) -> None:
    files = write(tmp_path, {"virtio-rng": "rng-core", "rng-core": ""})
    assert list(initramfs.in_load_order(["virtio_rng"], files, frozenset())) == ["rng_core", "virtio_rng"]


def test_what_is_in_the_kernel_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio-ring.ko\nkernel/fs/ext4/ext4.ko\n")
    builtin = initramfs.builtin_modules(tmp_path)
    files = write(tmp_path, {"virtio": "virtio_ring"})
    assert list(initramfs.in_load_order(["virtio", "ext4"], files, builtin)) == ["virtio"]


def test_a_module_that_the_kernel_lacks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no module missing"):
        initramfs.in_load_order(["a"], write(tmp_path, {"a": "missing"}), frozenset())


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress)])
def test_packed_modules_are_unpacked(tmp_path: Path, suffix: str, pack: object) -> None:
    path = tmp_path / f"a.ko{suffix}"
    path.write_bytes(pack(module("")))  # type: ignore[operator]
    assert initramfs.in_load_order(["a"], initramfs.module_files(tmp_path), frozenset()) == {"a": module("")}


def test_an_unknown_packing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.ko.zst").write_bytes(b"(packed)")
    with pytest.raises(SetupError, match=r"\.zst"):
        initramfs.in_load_order(["a"], initramfs.module_files(tmp_path), frozenset())


@pytest.mark.parametrize("size", range(9))
def test_cpio_unpacks_what_we_pack(tmp_path: Path, size: int) -> None:
    content = bytes(range(size))
    archive = initramfs.build(busybox=b"(busybox)" + content, modules={"a": content}, script="#!/bin/sh\n")
    run([find_program("cpio", package="cpio"), "-id", "--quiet", "--nonmatching", "dev/console"], cwd=tmp_path,
        stdin=archive)  # fmt: skip
    assert (tmp_path / "bin/busybox").read_bytes() == b"(busybox)" + content
    assert (tmp_path / "modules/a.ko").read_bytes() == content
    assert (tmp_path / "init").read_text() == "#!/bin/sh\n"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "proc").is_dir()


def test_the_console_is_in_the_archive() -> None:
    """The kernel gives init its output by it; nothing has mounted /dev then."""
    archive = initramfs.build(busybox=b"", modules={}, script="")
    listed = run([find_program("cpio", package="cpio"), "-itv", "--quiet"], stdin=archive).decode().splitlines()
    (line,) = (line for line in listed if line.endswith(" dev/console"))
    assert line.startswith(stat.filemode(stat.S_IFCHR | 0o600))
    assert "5,   1" in line
