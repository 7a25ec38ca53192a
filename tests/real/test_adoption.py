"""The next owner of a VM whose journal, or whose whole store, was lost. One that died in its work: `test_crash`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from utilityvm import UtilityVM
from utilityvm.guestimage.build import GuestImage
from utilityvm.machine import paths as places
from utilityvm.store import Store
from utilityvm.testing.images import ext4_image

Uvm = Callable[..., "CompletedProcess[str]"]

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def worker(own_folders: Path, guest_image: GuestImage) -> Iterator[str]:
    """The name of a VM that is alone in its store: other VMs of the session would be lost with it."""
    command = [sys.executable, "-c", "from utilityvm.cli import main; main()"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UTILITYVM_STATE_DIR", f"{own_folders}/lost/state")
        patch.setenv("UTILITYVM_RUNTIME_DIR", f"{own_folders}/lost/run")
        subprocess.run([*command, "start", "adopted"], check=True, capture_output=True)
        yield "adopted"
        subprocess.run([*command, "stop", "adopted", "--force"], check=True, capture_output=True)
        assert not places.vm_dir("adopted").exists()


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    return ext4_image(tmp_path / "one.raw", {"greeting": "hello\n"}), ext4_image(tmp_path / "two.raw", {})


async def test_what_no_journal_knows_keeps_its_slot(worker: str, images: tuple[Path, Path], uvm: Uvm) -> None:
    assert uvm("attach", worker, f"{images[0]}:/data").returncode == 0
    with Store.open() as store:
        store.db.execute("DELETE FROM disks")
        store.db.execute("DELETE FROM mounts")
        store.db.execute("DELETE FROM reservations")
    vm = await UtilityVM.open(worker)
    assert vm.findings == ("slot 0:1 has a disk that is in no journal: it stays taken",)
    async with vm.add_scsi(images[1], "/other") as other:
        assert str(other.slot) == "0:2"
    await vm.close()
    assert uvm("stop", worker).returncode == 0
    assert uvm("start", worker).returncode == 0


@pytest.mark.parametrize("how", ["damaged", "removed"])
async def test_a_lost_store_finds_the_vm_again(worker: str, uvm: Uvm, how: str) -> None:
    with Store.open() as store:
        path, before = store.path, store.get(worker)
    if how == "damaged":
        path.write_bytes(b"\xff" * 5000)
    else:
        path.unlink()
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    done = uvm("ps")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\t")[0] == worker
    assert ("damaged" in done.stderr) is (how == "damaged")
    assert f"VM {worker} was found running" in done.stderr
    with Store.open() as store:
        after = store.get(worker)
    assert (after.uuid, after.process, after.config) == (before.uuid, before.process, before.config)
    assert uvm("exec", worker, "--", "true").returncode == 0
