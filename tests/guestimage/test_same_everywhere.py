"""The same recipe makes the same bytes, whoever builds it, and nothing of the builder is in them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from utilityvm.guestimage import recipe, root_disk
from utilityvm.guestimage.build import GuestImage
from utilityvm.machine.programs import find_program, run

SOURCE = Path(__file__).parent.parent.parent / "src"
MARK = "builder.example"
ANOTHER_USER = 65534
SYSTEM_PYTHON = "/usr/bin/python3"

BUILD_IMAGE = "from utilityvm.guestimage import build; print(build.ensure().root)"
BUILD_BASE = """
import sys
from pathlib import Path
from utilityvm.guestimage import base, build, recipe
base.make(Path(sys.argv[1]), arch=recipe.architecture(), suite=build.host_suite(), report=lambda what, done: None)
"""
# In namespaces of its own: another host name, and other files where the host has its own.
ANOTHER_HOST = """
set -e
hostname another-host
for name in resolv.conf hostname hosts; do
    { printf '# %s\\n' "$MARK"; cat "/etc/$name"; } > "$FILES/$name"
    mount --bind "$FILES/$name" "/etc/$name"
done
cp -r /etc/apt/apt.conf.d "$FILES"
printf 'Acquire::Of "%s";' "$MARK" > "$FILES/apt.conf.d/99mark"
mount --bind "$FILES/apt.conf.d" /etc/apt/apt.conf.d
umask 077
exec "$@"
"""


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_with(base: Path, folder: Path) -> Path:
    (folder / "bases").mkdir(parents=True)
    shutil.copytree(base, folder / "bases" / base.name)
    return folder


def another_environment(cache: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(SOURCE),
        "UTILITYVM_CACHE_DIR": str(cache),
        "HOME": str(cache),
        "TZ": "Asia/Kathmandu",
        "LC_ALL": "C.UTF-8",
        "PYTHONHASHSEED": "7",
        "SOURCE_DATE_EPOCH": "1",
        "MKE2FS_CONFIG": "/nowhere",
    }


def same_files(built: GuestImage, root: str) -> None:
    folder = Path(root.strip()).parent
    for name in ("vmlinuz", "initramfs", "root.ext4"):
        assert digest(folder / name) == digest(built.kernel.parent / name), name


def test_another_umask_time_zone_and_locale_make_the_same_image(base: Path, built: GuestImage, tmp_path: Path) -> None:
    cache = cache_with(base, tmp_path / "cache")
    said = subprocess.run(
        [sys.executable, "-c", BUILD_IMAGE],
        env=another_environment(cache),
        umask=0o077,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    same_files(built, said)


def test_another_user_and_another_file_system_make_the_same_image(base: Path, built: GuestImage) -> None:
    if os.geteuid() != 0 or not Path(SYSTEM_PYTHON).exists():
        pytest.skip("only root can build as another user, who may not be able to read the Python of the tests")
    if shutil.disk_usage("/dev/shm").free < 800 << 20:
        pytest.skip("/dev/shm is small")
    cache = Path("/dev/shm") / f"utilityvm-test-{os.getpid()}"
    try:
        cache_with(base, cache)
        shutil.copytree(SOURCE / "utilityvm", cache / "src/utilityvm")
        for path in (cache, *cache.rglob("*")):
            os.chown(path, ANOTHER_USER, ANOTHER_USER)
        as_another = [find_program("setpriv", package="util-linux"), "--reuid=65534", "--regid=65534", "--clear-groups"]
        said = subprocess.run(
            [*map(str, as_another), SYSTEM_PYTHON, "-c", BUILD_IMAGE],
            env={**another_environment(cache), "PYTHONPATH": f"{cache}/src"},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=cache,
        ).stdout
        same_files(built, said)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def test_another_host_makes_the_same_base_without_a_file_of_its_own(base: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a process another host name and other files in /etc")
    files, made = tmp_path / "etc", tmp_path / "base"
    files.mkdir()
    made.mkdir()
    build_base = [sys.executable, "-c", BUILD_BASE, made]
    command = ["unshare", "--mount", "--uts", "sh", "-c", ANOTHER_HOST, "sh", *map(str, build_base)]
    environment = {**another_environment(tmp_path), "MARK": MARK, "FILES": str(files)}
    subprocess.run(command, env=environment, check=True)

    versions = [json.loads((folder / "packages.json").read_text()) for folder in (base, made)]
    if versions[0] != versions[1]:
        pytest.skip("the cached base has older packages")
    with tarfile.open(made / "root.tar") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() and member.size < 100_000 else None
            assert content is None or MARK.encode() not in content.read(), member.name
    assert digest(made / "root.tar") == digest(base / "root.tar")


def test_what_the_builder_of_a_base_put_there_is_not_in_it(base: Path) -> None:
    with tarfile.open(base / "root.tar") as archive:
        names = {member.name for member in archive if not member.isdir()}
        resolver = archive.extractfile("etc/resolv.conf")
        assert resolver is not None
        assert resolver.read() == b""
    assert not [name for name in names if name.startswith(("etc/apt", "var/lib/apt", "var/cache", "tmp/"))]


def test_the_size_of_a_folder_on_the_builders_file_system_does_not_matter(tmp_path: Path) -> None:
    """A folder that had many files is large on ext4, and of another size on every other file system."""
    for name in ("small", "large"):
        root = tmp_path / name
        (root / "folder").mkdir(parents=True)
        for number in range(2000 if name == "large" else 0):
            (root / "folder" / f"{number:0200}").touch()
        for path in (root / "folder").iterdir():
            path.unlink()
        root_disk.write(root, tmp_path / f"{name}.ext4", key="k")
    assert digest(tmp_path / "small.ext4") == digest(tmp_path / "large.ext4")


def test_the_hosts_settings_of_mkfs_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").write_text("[defaults]\nbase_features = sparse_super\ninode_size = 128\n")
    (tmp_path / "root").mkdir()
    root_disk.write(tmp_path / "root", tmp_path / "a", key="k")
    monkeypatch.setenv("MKE2FS_CONFIG", str(tmp_path / "conf"))
    root_disk.write(tmp_path / "root", tmp_path / "b", key="k")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    features = run([find_program("dumpe2fs", package="e2fsprogs"), "-h", tmp_path / "a"]).decode()
    assert "metadata_csum" in features
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) & 0o600
    assert recipe.ROOT_LABEL in features
