"""The owner of a VM is killed at each point where it writes or sends, and the next one finds everything as promised.

A point is a write to the store, or a message that is sent or answered, before it and after it: see `crash_points`. The
default takes every fortieth of them, beginning with another one each day; `./dev long` takes all, and UTILITYVM_CRASH=N
begins with number N.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

import crash_owner
from agreement import check_agreement, folders, is_locked, read_in_guest, sizes_in_guest, until_guest_has_no_disks
from crash_owner import JOB, KEEPER, KEPT, OPERATIONS, STOP, WRITTEN, Outcome, Task
from owners import Owners, remove, until_no_process_of
from points import Tell, chosen, takes_all
from utilityvm import DeadlineExceeded, SCSIMount, UtilityVM, VMGone, VMNotFound, VMNotRunning
from utilityvm.guestimage.build import GuestImage
from utilityvm.machine import paths as places
from utilityvm.machine.programs import find_program, run
from utilityvm.scsi.ports import DiskFormat
from utilityvm.store import Store, VMState
from utilityvm.testing.images import ext4_image, read_file

pytestmark = pytest.mark.real

EVERY = 40
STARTS_EVERY = 35  # of which the default takes one: a start and a stop cost seconds
NAME = "crashes"
AGENT_CRASH = Path(crash_owner.__file__).with_name("agent_crash.py")  # runs in the VM
GREETING = "hello\n"
BLANK = "blank.raw"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crash")
    ext4_image(folder / "one.raw", {"greeting": GREETING})
    ext4_image(folder / "two.qcow2", {"greeting": GREETING}, image_format=DiskFormat.QCOW2)
    ext4_image(folder / "shared.raw", {"greeting": GREETING})
    make_blank(folder)
    return folder


def make_blank(folder: Path) -> None:
    path = folder / BLANK
    path.touch()
    os.truncate(path, 0)
    os.truncate(path, 16 << 20)


@pytest.fixture(scope="module")
def owners() -> Iterator[Owners]:
    owners = Owners()
    yield owners
    owners.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def spoiled(own_folders: Path) -> AsyncIterator[set[str]]:
    """The VM runs, without an owner and without disks. Whoever leaves it otherwise puts its name in here."""
    spoiled: set[str] = {NAME}
    yield spoiled
    await remove(NAME)


@pytest_asyncio.fixture
async def kept_vm(spoiled: set[str], booted: str) -> tuple[set[str], set[str]]:
    """The VM without an owner; gives what is in its folders."""
    if spoiled:
        await remove(NAME)
        vm = await UtilityVM.clone(booted, NAME, keep=True)
        await vm.close()
        spoiled.clear()
    return folders(NAME)


class Check:
    """What must be true after each end of an owner."""

    def __init__(self, operation: str, folder: Path, places: tuple[set[str], set[str]]) -> None:
        self._operation = operation
        self._folder = folder
        self._images = sorted(path for path in folder.iterdir() if path.suffix in (".raw", ".qcow2"))
        self._places = places

    async def run(self, task: Task) -> None:
        """The next owner finds all as promised, and leaves the VM without disks."""
        vm = await UtilityVM.open(NAME)
        try:
            await check_agreement(vm, self._images)
            held = vm.scsi_reservations()
            self._check_holders(held, task.holder)
            mounted = [
                f"{path}/greeting" for path in {one.guest_path for one in held if one.host_path.name != BLANK} if path
            ]
            assert await read_in_guest(vm, "/dev/null", *mounted) == GREETING * len(mounted)
            if self._operation == "resize":
                await self._check_size(vm)
            for mount in held:
                await mount.release()
            assert not vm.scsi_slots()
            if written := WRITTEN.get(self._operation):
                async with vm.add_scsi(self._folder / written, "/again"):
                    assert await read_in_guest(vm, "/again/greeting", "/again/written") == GREETING + task.text
            await check_agreement(vm, self._images)
            await until_guest_has_no_disks(vm)
        finally:
            await vm.close()
        assert folders(NAME) == self._places
        run([find_program("e2fsck", package="e2fsprogs"), "-fn", self._folder / "one.raw"])

    def _check_holders(self, held: list[SCSIMount], holder: str | None) -> None:
        kept = [(one.host_path.name, one.guest_path and str(one.guest_path)) for one in held if one.holder == KEEPER]
        assert kept == ([KEPT[self._operation]] if self._operation in KEPT else [])
        assert {one.holder for one in held} <= {KEEPER, *([holder] if holder else [])}

    async def _check_size(self, vm: UtilityVM) -> None:
        """Grown or not, it can be asked for again, and the guest has all of it then."""
        image = self._folder / "one.raw"
        size_bytes = image.stat().st_size
        await vm.resize_scsi(image, size_bytes)
        assert await sizes_in_guest(vm) == [size_bytes]


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_wherever_its_owner_dies_the_next_one_finds_all_as_promised(
    operation: str,
    owners: Owners,
    folder: Path,
    kept_vm: tuple[set[str], set[str]],
    spoiled: set[str],
    tell: Tell,
) -> None:
    check = Check(operation, folder, kept_vm)
    spoiled.add(NAME)

    async def end_at(number: int, holder: str | None) -> Outcome:
        make_blank(folder)
        task = Task(operation=operation, vm=NAME, folder=str(folder), kill_at=number, holder=holder)
        outcome = owners.run(task)
        assert outcome.error is None, outcome.error
        try:
            await check.run(task)
        except BaseException as error:
            error.add_note(f"the owner of {operation} for {holder} died at point {number}: {outcome.point}")
            raise
        return outcome

    killed = 0
    points = (await end_at(0, JOB)).points
    for number in chosen(points, every=EVERY):
        for holder in (JOB, None) if takes_all() else ((JOB, None)[number % 2],):
            killed += (await end_at(number, holder)).point is not None
    spoiled.clear()
    tell(f"{operation}: {killed} owners killed at {points} points, and all came right")


async def test_who_dies_while_he_takes_over_leaves_the_same_to_the_next(
    owners: Owners, folder: Path, kept_vm: tuple[set[str], set[str]], spoiled: set[str], tell: Tell
) -> None:
    check = Check("remove_many", folder, kept_vm)
    spoiled.add(NAME)
    killed = 0
    for first in chosen(99, every=99)[:: 10 if takes_all() else 1]:
        for second in chosen(sys.maxsize, every=45)[:: 7 if takes_all() else 1]:
            make_blank(folder)
            task = Task(operation="remove_many", vm=NAME, folder=str(folder), kill_at=first, holder=JOB)
            assert owners.run(task).point is not None
            outcome = owners.run(Task(operation="take_over", vm=NAME, folder=str(folder), kill_at=second, holder=None))
            assert outcome.error is None, outcome.error
            try:
                await check.run(task)
            except BaseException as error:
                error.add_note(f"the owner died at point {first}, and the next one at {second}: {outcome.point}")
                raise
            if outcome.point is None:
                break
            killed += 1
    spoiled.clear()
    tell(f"{killed} owners killed while they took over from one that was killed, and all came right")


# Start and stop.


async def find_out(name: str) -> None:
    """What a person does who finds a VM whose owner died while it started or stopped: own it, and stop it."""
    try:
        vm = await UtilityVM.open(name)
    except (VMNotFound, VMNotRunning, DeadlineExceeded, VMGone):
        await remove(name, force=False)
        return
    with Store.open() as store:
        assert store.get(name).state is VMState.RUNNING
    await vm.stop()


async def test_wherever_a_start_or_a_stop_is_cut_short_nothing_is_left_of_it(
    owners: Owners, folder: Path, guest_image: GuestImage, tell: Tell
) -> None:
    image = folder / "one.raw"
    which = chosen(sys.maxsize, every=STARTS_EVERY)
    # Without a holder's name the VM dies with its owner.
    holders = (JOB, None) if takes_all() else ((JOB, None)[which.start % 2],)
    killed = 0

    async def cut_short(number: int, holder: str | None) -> Outcome:
        task = Task(operation="start_and_stop", vm="cut", folder=str(folder), kill_at=number, holder=holder)
        outcome = owners.run(task)
        assert outcome.error is None, outcome.error
        try:
            await (find_out if number % 2 else remove)(task.vm)
            assert not places.vm_dir(task.vm).exists()
            with Store.open() as store:
                assert store.find(task.vm) is None
            await until_no_process_of(task.vm)
            assert not is_locked(image)
            if outcome.point is None or outcome.point.startswith(STOP):
                assert read_file(image, "/written", image_format=DiskFormat.RAW) == task.text
        except BaseException as error:
            error.add_note(f"the owner, {holder}, died at point {number}: {outcome.point}")
            raise
        return outcome

    for number in which if takes_all() else which[:1]:
        outcomes = [await cut_short(number, holder) for holder in holders]
        killed += sum(outcome.point is not None for outcome in outcomes)
        if outcomes[0].point is None:
            break
    tell(f"start and stop: {killed} owners killed at {outcomes[0].points} points, and all came right")


# The agent.


async def test_wherever_the_agent_dies_the_next_one_takes_over_the_mount_or_undoes_it(
    vm_booted: UtilityVM, tmp_path: Path, tell: Tell
) -> None:
    image = ext4_image(tmp_path / "disk.raw", {}, size_mib=4)
    async with vm_booted.add_scsi(image) as held:
        assert held.slot == (0, 1)
        numbers = chosen(sys.maxsize, every=min(EVERY, 20))  # there are some thirty
        words = [str(numbers.start), str(numbers.step)]
        done = await vm_booted.run(["python3", "-c", AGENT_CRASH.read_text(), *words])
        assert done.exit_code == 0, done.stderr.decode()
    killed = {way: int(count) for way, count in (line.split() for line in done.stdout.decode().splitlines())}
    assert killed.keys() == {"plain", "published", "encrypted"}
    assert min(killed.values()) > 20 // numbers.step
    tell(f"agents killed, and all came right: {killed}")
