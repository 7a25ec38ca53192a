"""Start a VM where a template was saved."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from utilityvm.machine import paths
from utilityvm.machine.threads import entered
from utilityvm.scsi.ports import Holder
from utilityvm.scsi.slot import Slot
from utilityvm.store import SqliteJournal, VMState
from utilityvm.tasks import Deadline, Undo
from utilityvm.templates import catalog
from utilityvm.templates import clone as cloning
from utilityvm.vm import booting
from utilityvm.vm.config import DiskSpec, VMConfig
from utilityvm.vm.naming import template_paths
from utilityvm.vm.owned import Claim, OwnedVM, is_alive
from utilityvm.vm.state import Event


async def clone(
    template: str, name: str, *, keep: bool, replace: Mapping[Slot, DiskSpec] | None, timeout_s: float
) -> OwnedVM:
    """See `UtilityVM.clone`."""
    deadline = Deadline(timeout_s)
    requests = {slot: spec.request().disk for slot, spec in (replace or {}).items()}
    vm_uuid = str(uuid.uuid4())
    async with booting.coming_up(name, deadline), Undo(deadline) as undo:
        async with entered(catalog.in_use(template)) as source:
            config = VMConfig(
                name=name,
                memory_mib=source.manifest.memory_mib,
                cpus=source.manifest.cpus,
                controllers=source.manifest.controllers,
                keep=keep,
            )
            config.check()
            await cloning.check_machine(source)
            origin = {"template": template, "template_uuid": source.uuid}
            document = {**config.to_json(), "root": str(source.root), "clone": origin}
            claim = await Claim.new(undo, name, vm_uuid, document)
            holder = Holder(name=f"template {template}")
            preparing = cloning.prepare(
                source, paths.overlays_dir(vm_uuid), holder=holder, replace=requests, memory=claim.store.formats
            )
            async with entered(preparing) as prepared:
                host = await claim.start_qemu(
                    undo, config.for_clone(source.root, uuid=vm_uuid), deadline=deadline, saved=prepared.incoming
                )
        await SqliteJournal(claim.store, claim.record).write(prepared.records)
        await host.loaded(prepared.incoming.disks, timeout_s=deadline.left())
        guest = await booting.wake(host, name, deadline=deadline)
        undo.add(guest.close)
        await claim.store.lane.run(claim.store.set_state, claim.record, VMState.RUNNING)
        vm = OwnedVM(config, claim, host, guest)
        vm.shared = prepared.shared
        vm.aliases = template_paths(source, vm_uuid)
        await vm.scsi.restore(is_alive=is_alive, records=prepared.records)
        vm.check()
        vm.take(Event.UP)
    vm.log.info("cloned from template %s", template)
    return vm
