"""Start a VM from the guest image."""

from __future__ import annotations

import uuid

from utilityvm.errors import SetupError
from utilityvm.guestimage.build import GuestImage
from utilityvm.guestimage.build import find as find_image
from utilityvm.machine.threads import in_thread
from utilityvm.store import VMState
from utilityvm.tasks import Deadline, Undo
from utilityvm.vm import booting
from utilityvm.vm.config import VMConfig
from utilityvm.vm.owned import Claim, OwnedVM
from utilityvm.vm.state import Event


async def start(config: VMConfig, *, image: GuestImage | None, timeout_s: float) -> OwnedVM:
    """See `UtilityVM.start`."""
    deadline = Deadline(timeout_s)
    config.check()
    image = image or await in_thread(find_image)
    if image is None:
        raise SetupError("there is no guest image", remedy="build it: uvm image build")
    vm_uuid = str(uuid.uuid4())
    async with booting.coming_up(config.name, deadline), Undo(deadline) as undo:
        document = {**config.to_json(), "root": str(image.root)}
        claim = await Claim.new(undo, config.name, vm_uuid, document)
        host = await claim.start_qemu(undo, config.for_qemu(image, uuid=vm_uuid), deadline=deadline)
        guest = await booting.boot(host, config.name, deadline=deadline)
        undo.add(guest.close)
        await claim.store.lane.run(claim.store.set_state, claim.record, VMState.RUNNING)
        vm = OwnedVM(config, claim, host, guest)
        vm.check()
        vm.take(Event.UP)
    vm.log.info("started on %s", host.process.accelerator)
    return vm
