"""The way from a path to a file: what root does not follow, because another user decides where it leads."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from utilityvm.errors import AccessDenied, InvalidRequest, UtilityVMError
from utilityvm.machine.hostpath import identity_of, open_file, pin

STRANGER = 5555

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user, and is refused")


def of_stranger(path: Path) -> Path:
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    return path


def pinned_inode(path: Path | str) -> int:
    fd = pin(str(path))
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(b"root's alone")
    path.chmod(0o600)
    return path


def strangers_link(secret: Path) -> Path:
    link = secret.with_name("link")
    link.symlink_to(secret)
    return of_stranger(link)


def strangers_link_to_a_folder(secret: Path) -> Path:
    link = secret.with_name("folder-link")
    link.symlink_to(secret.parent)
    return of_stranger(link) / secret.name


def strangers_link_behind_roots(secret: Path) -> Path:
    link = secret.with_name("outer")
    link.symlink_to(strangers_link(secret).name)
    return link


def roots_link_into_a_strangers_folder(secret: Path) -> Path:
    link = secret.with_name("outer")
    link.symlink_to(strangers_folder(secret))
    return link


def strangers_folder(secret: Path) -> Path:
    folder = secret.with_name("theirs")
    folder.mkdir()
    (folder / "disk").write_bytes(b"")
    of_stranger(folder)
    return folder / "disk"


def out_of_a_strangers_folder(secret: Path) -> Path:
    return strangers_folder(secret).parent / ".." / secret.name


def strangers_link_in_a_folder_of_everybody(secret: Path) -> Path:
    folder = open_folder(secret)
    (folder / "disk").symlink_to(secret)
    return of_stranger(folder / "disk")


def hard_link_in_a_folder_of_everybody(secret: Path) -> Path:
    folder = open_folder(secret)
    os.link(secret, folder / "disk")
    return folder / "disk"


def open_folder(beside: Path) -> Path:
    folder = beside.with_name("open")
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def hard_link_in_a_shared_folder(secret: Path) -> Path:
    folder = secret.with_name("sticky")
    folder.mkdir()
    folder.chmod(0o1777)
    os.link(secret, folder / "disk")
    return folder / "disk"


@as_root
@pytest.mark.parametrize(
    "plant",
    [
        strangers_link,
        strangers_link_to_a_folder,
        strangers_link_behind_roots,
        roots_link_into_a_strangers_folder,
        strangers_folder,
        out_of_a_strangers_folder,
        strangers_link_in_a_folder_of_everybody,
        hard_link_in_a_folder_of_everybody,
        hard_link_in_a_shared_folder,
    ],
)
def test_root_goes_no_way_that_others_decide(secret: Path, plant: Callable[[Path], Path]) -> None:
    path = plant(secret)
    with pytest.raises(AccessDenied):
        pin(str(path))
    with pytest.raises(AccessDenied):
        open_file(path, os.O_RDONLY)
    assert identity_of(path) is None


@as_root
def test_the_refusal_says_where_the_path_leads(secret: Path) -> None:
    with pytest.raises(AccessDenied, match=f"user {STRANGER}.*") as refused:
        pin(str(strangers_link_behind_roots(secret)))
    assert str(secret) in str(refused.value)


@as_root
def test_roots_image_in_a_folder_that_everybody_may_write_to_is_opened(tmp_path: Path) -> None:
    disk = open_folder(tmp_path / "disk") / "disk"
    disk.touch()
    assert pinned_inode(disk) == disk.stat().st_ino


@as_root
def test_a_strangers_image_in_roots_folder_is_opened(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    assert pinned_inode(of_stranger(disk)) == disk.stat().st_ino


@as_root
def test_a_file_of_ones_own_in_a_shared_folder_is_opened(tmp_path: Path) -> None:
    folder = tmp_path / "sticky"
    folder.mkdir()
    folder.chmod(0o1777)
    (folder / "disk").touch()
    assert pinned_inode(folder / "disk") == (folder / "disk").stat().st_ino


def spellings(disk: Path) -> list[str]:
    folder = disk.parent
    (folder / "link").symlink_to(disk)
    (folder / "relative").symlink_to(f"../{folder.name}/./link")
    (folder / "folder").symlink_to(folder)
    return [
        f"{folder}/link",
        f"{folder}/relative",
        f"{folder}//folder/./folder/disk",
        f"{folder}/folder/../{folder.name}/disk",
        f"/../../{disk}",
    ]


def test_it_leads_where_the_kernel_leads(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    for path in spellings(disk):
        assert pinned_inode(path) == Path(path).stat().st_ino


def test_a_relative_path_begins_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").touch()
    monkeypatch.chdir(tmp_path)
    assert pinned_inode("./disk") == (tmp_path / "disk").stat().st_ino


@pytest.mark.parametrize("path", ["none", "disk/", "disk/x", "loop", "file-link/"])
def test_what_leads_nowhere_is_told_as_the_kernel_tells_it(tmp_path: Path, path: str) -> None:
    (tmp_path / "disk").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file-link").symlink_to("disk/")
    with pytest.raises(OSError) as kernels:
        os.close(os.open(f"{tmp_path}/{path}", os.O_PATH))
    with pytest.raises(OSError) as ours:
        pin(f"{tmp_path}/{path}")
    assert ours.value.errno == kernels.value.errno


@pytest.mark.parametrize("path", ["/proc/self/exe", "/proc/self/cmdline", "/dev/fd/0", "/proc/self/root/etc"])
def test_the_kernels_own_file_systems_hold_no_disks(path: str) -> None:
    if not os.path.lexists(path):
        pytest.skip(f"this machine has no {path}")
    with pytest.raises(InvalidRequest, match="file system of the kernel's"):
        pin(path)


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in (*spellings(tmp_path / "disk"), "/proc/self/exe", f"{tmp_path}/none", f"{tmp_path}/disk/x"):
        with suppress(OSError, UtilityVMError):
            os.close(pin(path))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_is_pinned_is_not_opened(tmp_path: Path) -> None:
    """A pipe would wait for its other end, and a device would notice."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        for name in ("pipe", "sock"):
            assert pinned_inode(tmp_path / name) == (tmp_path / name).stat().st_ino
