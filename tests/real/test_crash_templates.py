"""The owner is killed at each point of saving, cloning and pooling: there is a whole template or none, and no leak.

Points, and how many of them are taken: as in `test_crash`.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from agreement import is_locked
from crash_owner import JOB, SAVED, TEMPLATE, Outcome, Task
from owners import Owners, remove, until_no_process_of
from points import Tell, chosen, takes_all
from utilityvm import UtilityVM, VMGone, VMNotFound, VMNotRunning
from utilityvm.machine import paths
from utilityvm.scsi.ports import DiskFormat
from utilityvm.store import Store
from utilityvm.templates import catalog
from utilityvm.testing.images import ext4_image
from utilityvm.upkeep import leftovers

pytestmark = pytest.mark.real

EVERY = 32
NAME = "forked"


@pytest.fixture(scope="module")
def owners() -> Iterator[Owners]:
    owners = Owners()
    yield owners
    owners.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def image(booted: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """The disk of the template from which clones are made, writable at /data."""
    image = ext4_image(tmp_path_factory.mktemp("base") / "base.qcow2", {"in": "7\n"}, image_format=DiskFormat.QCOW2)
    vm = await UtilityVM.clone(booted, "crash-base")
    await vm.add_scsi(image, "/data")
    await vm.save_as_template(TEMPLATE)
    yield image
    with Store.open() as store:
        catalog.remove(TEMPLATE, store)


async def output(vm: UtilityVM, script: str) -> str:
    result = await vm.run(["sh", "-c", script])
    assert result.exit_code == 0, result.stderr.decode()
    return result.stdout.decode()


async def sweep() -> None:
    """What a person does now and then: `uvm gc --apply`. Guest images are the machine's."""
    with Store.open() as store:
        for one in leftovers.found_in(store):
            if one.kind is not leftovers.LeftoverKind.IMAGE:
                await leftovers.remove(one, store)


async def check_nothing_left(image: Path, name: str) -> None:
    await until_no_process_of(name)
    with Store.open() as store:
        assert [vm.name for vm in store.vms() if vm.name.startswith(name)] == []
    assert list((paths.runtime_dir() / "vms").glob(f"{name}*")) == []
    assert list((paths.state_dir() / "overlays").glob("*")) == []
    assert list(paths.templates_dir().glob(".*")) == []
    assert not is_locked(image)
    assert catalog.verify(catalog.load(TEMPLATE)) == []


def run(owners: Owners, operation: str, number: int, holder: str | None) -> Outcome:
    outcome = owners.run(Task(operation=operation, vm=NAME, folder="", kill_at=number, holder=holder))
    assert outcome.error is None, outcome.error
    return outcome


async def test_wherever_a_clone_is_cut_short_nothing_is_left_of_it(owners: Owners, image: Path, tell: Tell) -> None:
    killed = 0
    which = chosen(sys.maxsize, every=EVERY)
    for number in which:
        for holder in (JOB, None) if takes_all() else ((JOB, None)[number % 2],):
            outcome = run(owners, "clone", number, holder)
            killed += outcome.point is not None
            try:
                # A clone that is not unique is never handed out; one that was kept is found, or removed by its name.
                # One that was about to be stopped may end meanwhile.
                try:
                    vm = await UtilityVM.open(NAME)
                except (VMNotRunning, VMNotFound):
                    await remove(NAME)
                else:
                    with suppress(VMGone):
                        assert await output(vm, "hostname; cat /data/in") == f"{NAME}\n7\n"
                    await vm.stop(timeout_s=0)
                await sweep()
                await check_nothing_left(image, NAME)
            except BaseException as error:
                error.add_note(f"the owner of a clone, {holder}, died at point {number}: {outcome.point}")
                raise
        if outcome.point is None:
            break
    tell(f"clone: {killed} owners killed at {outcome.points} points, and all came right")


async def test_wherever_a_pool_is_cut_short_nothing_is_left_of_it(owners: Owners, image: Path, tell: Tell) -> None:
    killed = 0
    for number in chosen(sys.maxsize, every=2 * EVERY):
        outcome = run(owners, "pool", number, None)
        killed += outcome.point is not None
        try:
            await until_no_process_of(NAME)  # they die with it, before anybody sweeps
            await sweep()
            await check_nothing_left(image, NAME)
        except BaseException as error:
            error.add_note(f"the owner of a pool died at point {number}: {outcome.point}")
            raise
        if outcome.point is None:
            break
    tell(f"pool: {killed} owners killed at {outcome.points} points, and all came right")


async def test_wherever_a_save_is_cut_short_there_is_a_template_or_the_vm_goes_on(
    owners: Owners, image: Path, tell: Tell
) -> None:
    killed = saved = 0
    for number in chosen(sys.maxsize, every=EVERY):
        vm = await UtilityVM.clone(TEMPLATE, NAME, keep=True)
        text = f"before point {number}\n"
        await output(vm, f"echo before point {number} > /data/written")
        await vm.close()
        outcome = run(owners, "save", number, JOB)
        killed += outcome.point is not None
        try:
            if SAVED in catalog.names():
                saved += 1
                assert catalog.verify(catalog.load(SAVED)) == []
                if outcome.point is not None and (paths.vm_dir(NAME)).exists():
                    with pytest.raises((VMNotRunning, VMNotFound)):
                        await UtilityVM.open(NAME)
                await remove(NAME)
                async with UtilityVM.clone(SAVED, f"{NAME}-again") as clone:
                    assert await output(clone, "cat /data/written") == text
                await sweep()
                with Store.open() as store:
                    catalog.remove(SAVED, store)
            else:
                vm = await UtilityVM.open(NAME)
                assert await output(vm, "echo on >> /data/written; cat /data/written") == f"{text}on\n"
                assert [str(view.guest_path) for view in vm.scsi_mounts()] == ["/data"]
                await vm.stop(timeout_s=0)
            await sweep()
            await check_nothing_left(image, NAME)
        except BaseException as error:
            error.add_note(f"the owner of a save died at point {number}: {outcome.point}")
            raise
        if outcome.point is None:
            break
    assert saved, "the last one came to its end"
    tell(f"save: {killed} owners killed at {outcome.points} points, {saved} of them after the template was")
