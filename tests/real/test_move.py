"""The state of a real VM's disks, exported, and taken up again."""

from __future__ import annotations

from pathlib import Path

import pytest

from utilityvm import AlreadyAttached, Migrating, ScsiState, Slot, UtilityVM
from utilityvm.testing.images import ext4_image

pytestmark = pytest.mark.real


async def test_disks_move_by_a_document_to_where_they_were(vm_booted: UtilityVM, tmp_path: Path) -> None:
    tools, data = tmp_path / "tools.raw", tmp_path / "data.raw"
    ext4_image(tools, {"who": "tools"})
    ext4_image(data, {"who": "data"})
    first = await vm_booted.add_scsi(tmp_path / "data.raw")
    await vm_booted.add_scsi(tools, "/mnt/tools", read_only=True, holder="builder")
    second = await vm_booted.add_scsi(data, "/mnt/data")
    await first.release()

    document = (await vm_booted.export_scsi_state()).to_json()
    for change in (vm_booted.add_scsi(tmp_path / "x.raw"), second.release(), vm_booted.remove_scsi(tools)):
        with pytest.raises(Migrating):
            await change
    assert (await vm_booted.run(["cat", "/mnt/data/who"])).stdout == b"data"
    with pytest.raises(Migrating):
        vm_booted.import_scsi_state(ScsiState.from_json(document))
    assert await vm_booted.resume_scsi() == []
    with pytest.raises(AlreadyAttached):
        vm_booted.import_scsi_state(ScsiState.from_json(document))
    await vm_booted.remove_scsi(data)
    await vm_booted.remove_scsi(tools, holder="builder")

    moved = tmp_path / "there.raw"
    tools.rename(moved)
    vm_booted.import_scsi_state(ScsiState.from_json(document).relocated({str(tools): str(moved)}))
    assert await vm_booted.resume_scsi() == []

    assert [view.slot for view in vm_booted.scsi_slots()] == [Slot(0, 1), Slot(0, 2)]
    assert (await vm_booted.run(["cat", "/mnt/data/who", "/mnt/tools/who"])).stdout == b"datatools"
    await vm_booted.release(second.id)
    await vm_booted.remove_scsi(moved, holder="builder")
    assert not vm_booted.scsi_slots()
