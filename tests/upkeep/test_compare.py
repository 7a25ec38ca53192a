"""What journal, QEMU and guest say of a VM's disks is compared: `uvm repair`. With a VM: tests/real/test_upkeep.py."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import pytest

from utilityvm.hosts.qemu.host import Attachment
from utilityvm.machine.processes import own_start
from utilityvm.scsi.ports import (
    AttachmentType,
    DiskFormat,
    DiskRecord,
    Holder,
    MountConfig,
    MountRecord,
    Record,
    ReservationRecord,
    VMAccess,
)
from utilityvm.scsi.slot import Slot
from utilityvm.upkeep.repair import compare

SLOT, OTHER = Slot(0, 1), Slot(1, 2)
MOUNTED = [{"MountPath": "/data", "Controller": 0, "Lun": 1}]


def disk(state: str = "attached") -> DiskRecord:
    return DiskRecord(
        attachment="a",
        slot=SLOT,
        host_path="/srv/a.raw",
        identity="i",
        kind=AttachmentType.VIRTUAL_DISK,
        format=DiskFormat.RAW,
        access=VMAccess.INDIVIDUAL,
        read_only=False,
        size_bytes=1,
        state=state,
        since=0.0,
    )


def mount(state: str = "mounted", attachment: str = "a") -> MountRecord:
    path = PurePosixPath("/data")
    return MountRecord(mount="m", attachment=attachment, guest_path=path, config=MountConfig(), state=state, since=0.0)


def held_by(pid: int, attachment: str = "a") -> ReservationRecord:
    holder = Holder(name="a holder", pid=pid, started=own_start())
    return ReservationRecord(reservation="r", attachment=attachment, mount=None, holder=holder, state="held", since=0.0)


def on_bus(name: str = "a", slot: Slot = SLOT, *, whole: bool = True) -> Attachment:
    return Attachment(attachment=name, slot=slot, whole=whole)


def test_where_all_agree_nothing_differs() -> None:
    assert compare([disk(), mount(), held_by(os.getpid())], [on_bus()], MOUNTED) == []
    assert compare([], [], []) == []


@pytest.mark.parametrize(("records", "bus", "mounts", "said"), [
    ([disk()], [], [], [(SLOT, "/srv/a.raw is not on the bus")]),
    ([disk("ejecting")], [on_bus()], [], [(SLOT, "/srv/a.raw was left ejecting, and is on the bus")]),
    ([disk("attach unknown")], [], [], [(SLOT, "/srv/a.raw was left attach unknown, and is not on the bus")]),
    ([], [on_bus("b", OTHER)], [], [(OTHER, "a disk that no journal knows")]),
    ([], [on_bus("b", OTHER, whole=False)], [], [(OTHER, "half of a disk that no journal knows")]),
    ([disk(), mount()], [on_bus()], [], [(SLOT, "/data is not mounted in the guest")]),
    ([disk(), mount()], [on_bus()], [{"MountPath": "/data", "Controller": 1}],
        [(SLOT, "/data is not mounted in the guest")]),
    ([disk(), mount("mounting")], [on_bus()], MOUNTED, [(SLOT, "/data was left mounting")]),
    ([mount("mounting", "gone")], [], [], [(None, "/data was left mounting")]),
    ([], [], [{"MountPath": "/x"}], [(Slot(0, 0), "/x is mounted, and no journal knows it")]),
    ([disk(), held_by(1 << 30)], [on_bus()], [],
        [(SLOT, "reservation r is held by a holder, which is dead")]),
    ([held_by(1 << 30, "gone")], [], [], [(None, "reservation r is held by a holder, which is dead")]),
])  # fmt: skip
def test_each_difference_is_named_with_its_slot(
    records: Sequence[Record],
    bus: Sequence[Attachment],
    mounts: Sequence[Mapping[str, Any]],
    said: list[tuple[Slot | None, str]],
) -> None:
    assert [(one.slot, one.what) for one in compare(records, bus, mounts)] == said
    assert all(one.remedy for one in compare(records, bus, mounts))


def test_of_a_guest_that_tells_nothing_nothing_is_said() -> None:
    assert compare([disk(), mount()], [on_bus()], None) == []


def test_differences_come_by_slot_and_those_of_no_slot_first() -> None:
    bus = [on_bus("z", OTHER), on_bus("y", Slot(0, 3))]
    found = compare([held_by(1 << 30, "gone"), disk()], bus, [])
    assert [one.slot for one in found] == [None, SLOT, Slot(0, 3), OTHER]
