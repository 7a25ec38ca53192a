"""A clone that waits in a pool: its processors stand still until it is handed out."""

from __future__ import annotations

from utilityvm.errors import VMNotRunning
from utilityvm.store import VMState
from utilityvm.tasks import Deadline
from utilityvm.vm import booting
from utilityvm.vm.owned import OwnedVM
from utilityvm.vm.state import Event


async def rest(vm: OwnedVM, *, timeout_s: float) -> None:
    """Stop its processors until `wake`; meanwhile every call but its end is refused."""
    deadline = Deadline(timeout_s)
    async with deadline.limit(f"VM {vm.name} was not paused", vm=vm.name):
        await vm.ready(deadline)
        await vm.guest.ping(timeout_s=deadline.left())  # what it still had to do is done when it answers
        await vm.store.lane.run(vm.store.set_state, vm.record, VMState.WAITING)
        await vm.host.pause(timeout_s=deadline.left())
        vm.check()
        vm.take(Event.REST, VMNotRunning(f"VM {vm.name} waits in a pool", vm=vm.name))


async def wake(vm: OwnedVM, *, timeout_s: float) -> None:
    """Let it run again, and make it unique again: its clock stood still. If this fails it must be ended."""
    if not vm.is_running:
        vm.check()
    deadline = Deadline(timeout_s)
    async with deadline.limit(f"VM {vm.name} did not wake", vm=vm.name):
        await vm.host.resume(timeout_s=deadline.left())
        await vm.guest.make_unique(**booting.new_identity(vm.name), timeout_s=deadline.left())
        await vm.store.lane.run(vm.store.set_state, vm.record, VMState.RUNNING)
        vm.take(Event.WAKE)
