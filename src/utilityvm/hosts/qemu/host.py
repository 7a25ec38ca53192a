"""The host backend on QEMU: disks on the bus of one running VM, and the VM's end.

An attachment is made of three things, in this order: an *fdset* with the descriptor, a block *node* over it, a SCSI
*device* on the node; it is taken apart the other way round. What is there can be asked for at any time, so every step
can be resumed by any later owner: `probe` finishes what is half there, `detach` starts with what is left.

Detaching waits for QEMU's RCU thread, which frees devices in batches every 50 ms, or at once when some 30 are waiting.
So detaches that run side by side take as long as one.

While the VM is paused QEMU closes no descriptor of an fdset (monitor/misc.c, monitor_fdset_cleanup), and our lock stays
with it. So nothing can be detached from a paused VM; attaching is fine, which is how a clone gets its disks.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final, Self, cast

from utilityvm.diskimage.allocated import Ranges, allocated
from utilityvm.errors import (
    AlreadyAttached,
    DeadlineExceeded,
    DiskInUse,
    HostRefused,
    ImageUnsafe,
    InvalidRequest,
    OutcomeUnknown,
    ProtocolError,
    SetupError,
    UtilityVMError,
    VMGone,
)
from utilityvm.hosts.qemu import blockdev, console, launch
from utilityvm.hosts.qemu.access import Access, FrozenBy, Taken
from utilityvm.hosts.qemu.disk import QemuDisk, WhoUses, describe, is_locked_by_a_program
from utilityvm.hosts.qemu.format import FormatMemory
from utilityvm.hosts.qemu.incoming import Incoming, IncomingDisk, not_taken
from utilityvm.hosts.qemu.incoming import check as check_disks
from utilityvm.hosts.qemu.launch import QemuConfig, QemuProcess
from utilityvm.hosts.qemu.lifetime import Watch
from utilityvm.hosts.qemu.qmp import Answer, Command, Event, Qmp, QmpRefused
from utilityvm.hosts.qemu.sizes import ShownDevice, Sizes
from utilityvm.log import logger
from utilityvm.machine import hostpath
from utilityvm.machine.oserrors import typed_errors
from utilityvm.machine.threads import in_thread, lent
from utilityvm.scsi.ports import DiskFormat, DiskRequest, OpenDisk
from utilityvm.scsi.slot import Slot
from utilityvm.tasks import Undo

VM_GROUP: Final = "utilityvm"
_DELETED: Final = "DEVICE_DELETED"
_UNPLUG_FAILED: Final = "DEVICE_UNPLUG_GUEST_ERROR"
_NOT_FOUND: Final = "DeviceNotFound"
_RUNS: Final = {"STOP": False, "RESUME": True}
_LOOK_AGAIN_S: Final = 0.02
_QUIT_S: Final = 2.0
_LAST_WORDS_S: Final = 1.0  # for the connection of a QEMU that has ended to end; a fork of somebody's may hold it
_END_S: Final = 1.0  # from the end of its connections to the end of a QEMU that ends

_log = logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """A disk that this QEMU has. Not `whole`: a half-made one, which `probe` finishes off."""

    attachment: str
    slot: Slot
    whole: bool


@typed_errors
class QemuHost:
    """A running QEMU, by its monitor. One owner at a time: QEMU serves one client on that socket."""

    def __init__(
        self,
        process: QemuProcess,
        qmp: Qmp,
        watch: Watch,
        *,
        who_uses: WhoUses | None,
        frozen_by: FrozenBy | None,
        memory: FormatMemory | None,
        vm_group: str,
    ) -> None:
        """Use `start` or `connect`."""
        self.process = process
        self._qmp = qmp
        self._watch = watch
        self._access = Access(
            vm=process.name,
            uid=process.uid,
            vm_group=vm_group,
            who_uses=who_uses,
            frozen_by=frozen_by,
            memory=memory,
        )
        # Every attachment that QEMU may have anything of: ours from before the first command is sent, others' from
        # `connect`. So what is not here is not there.
        self._numbers: dict[str, int] = {}
        self._sizes = Sizes(qmp, process, self._numbers)
        self._images: dict[Slot, tuple[str, str, DiskFormat]] = {}  # path, identity, format of what we attached last
        self._below: dict[str, list[int]] = {}  # the sets of the files under an attachment's, where it has such
        self._next_number = blockdev.FIRST_NUMBER
        self._running = False
        self._lingering: set[int] = set()  # sets whose file QEMU keeps open until the VM runs again
        self._failed_nodes: set[str] = set()
        # Our own descriptors of what QEMU has by now, on their way to being closed: they keep our lock too.
        self._closing: dict[str, asyncio.Future[None]] = {}
        qmp.on_event = self._on_event
        self._log = _log.bind(vm=process.name)
        # Resolves with the reason when QEMU has ended, or its connection; nothing that waits here waits longer.
        self.gone: asyncio.Future[UtilityVMError] = asyncio.get_running_loop().create_future()
        qmp.gone.add_done_callback(lambda _: self._is_gone())
        # The connection ends with the process, and what QEMU said last is read before its end: it tells why.
        watch.ended.add_done_callback(lambda _: qmp.gone.get_loop().call_later(_LAST_WORDS_S, self._is_gone))

    @classmethod
    async def start(
        cls,
        config: QemuConfig,
        *,
        folder: Path,
        saved: Incoming | None = None,
        who_uses: WhoUses | None = None,
        frozen_by: FrozenBy | None = None,
        memory: FormatMemory | None = None,
        vm_group: str = VM_GROUP,
        timeout_s: float = 30.0,
    ) -> Self:
        """Start a QEMU; it runs and its monitor answers. See `launch.start` for `folder` and the errors.

        With `saved` it continues from there, when `loaded` has returned and `resume` is called.
        """
        process, qmp = await launch.start(config, folder=folder, saved=saved, timeout_s=timeout_s)
        async with Undo() as undo:
            undo.add(launch.destroy, process)
            undo.add(qmp.close)
            watch = Watch(process.pid, process.started)
            undo.add(watch.close)
            host = cls(process, qmp, watch, who_uses=who_uses, frozen_by=frozen_by, memory=memory, vm_group=vm_group)
            host._running = saved is None and await host.status(timeout_s=timeout_s) == "running"
        return host

    @classmethod
    async def connect(
        cls,
        process: QemuProcess,
        *,
        who_uses: WhoUses | None = None,
        frozen_by: FrozenBy | None = None,
        memory: FormatMemory | None = None,
        vm_group: str = VM_GROUP,
        timeout_s: float = 5.0,
    ) -> Self:
        """Take over a running QEMU whose owner is gone. What it has attached is in `attachments`.

        Raises:
            VMGone: it has ended, or what has its pid is another process.
            DeadlineExceeded: it runs and does not answer: another owner is connected, or it hangs.
            OutcomeUnknown: it runs and cannot be reached.
            SetupError: it runs and its sockets are gone; or we cannot connect to anything.
        """
        async with AsyncExitStack() as undo:
            watch = Watch(process.pid, process.started)
            undo.callback(watch.close)
            if not await in_thread(launch.is_proven, process):
                raise VMGone(f"process {process.pid} is not the QEMU of VM {process.name}", vm=process.name)
            await in_thread(launch.restore_sockets, process)
            try:
                qmp = await Qmp.connect(process.monitor, vm=process.name, timeout_s=timeout_s)
                undo.callback(qmp.close)
                found = (await qmp.execute("query-uuid", timeout_s=timeout_s))["UUID"]
            except VMGone as error:
                raise await _why_gone(process, watch, error) from error
            if found != process.uuid:
                raise SetupError(
                    f"the sockets in {process.folder} lead to VM {found}, and not to {process.uuid}",
                    vm=process.name,
                    remedy="somebody replaced them; to end the VM all the same: uvm stop --force " + process.name,
                )
            host = cls(process, qmp, watch, who_uses=who_uses, frozen_by=frozen_by, memory=memory, vm_group=vm_group)
            await host._read_sets(timeout_s=timeout_s)
            host._running = await host.status(timeout_s=timeout_s) == "running"
            undo.pop_all()
        return host

    # The HostBackend protocol.

    async def open(self, request: DiskRequest) -> OpenDisk:
        """Open and check a disk; see `Access.open`. Storage that hangs delays this call alone."""
        return await in_thread(self._access.open, request, late=QemuDisk.close)

    async def attach(self, slot: Slot, disk: OpenDisk, *, attachment: str, timeout_s: float) -> None:
        """Put the disk at `slot`. True on return: QEMU has it, with our lock, under the name `attachment`.

        Raises:
            DiskInUse: another VM holds it in a way that forbids this; nothing changed.
            AlreadyAttached: the slot, or the name, is taken; nothing changed.
            ImageUnsafe: QEMU opened another file for it: its header was changed meanwhile; it was taken back.
            HostRefused: QEMU said no, and what it had made of it is gone again.
            OutcomeUnknown: no answer, or the undoing was refused; probe.
            VMGone: the VM died.
        """
        if not isinstance(disk, QemuDisk):
            raise InvalidRequest(f"{disk!r} was not opened by this host", vm=self.process.name, slot=slot)
        self._check_slot(slot)
        if attachment in self._numbers:
            raise AlreadyAttached(f"attachment {attachment} exists", vm=self.process.name, slot=slot)
        self._images.pop(slot, None)  # whatever becomes of this, what was there before is not
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                taken = await in_thread(lent(disk.fd, self._access.take), disk, late=Taken.give_back)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                f"attach {disk.request.host_path} at {slot}: its storage did not answer within {timeout_s:g} s",
                vm=self.process.name,
                slot=slot,
                host_path=disk.request.host_path,
            ) from error
        number, self._next_number = self._next_number, self._next_number + 1
        self._numbers[attachment] = number
        commands = blockdev.attach(disk, number, slot, attachment, locks=taken.locks)
        try:
            answers, foreign = await self._add(commands, taken.fd, disk, timeout_s=timeout_s)
            refusals = [answer for answer in answers if isinstance(answer, QmpRefused)]
            if not refusals and not foreign:
                self._close_ours(attachment, taken.fd)
                self._images[slot] = disk.request.host_path, disk.identity, disk.format
                return
            await self._undo(attachment, number, answers, timeout_s=timeout_s)
        except BaseException:
            await in_thread(os.close, taken.fd, always=True)
            raise
        try:
            if foreign:
                raise ImageUnsafe(
                    f"attach {disk.request.host_path} at {slot}: QEMU opened {foreign[0]!r} for it, which nobody gave: "
                    "somebody changes the image while it is attached",
                    vm=self.process.name,
                    slot=slot,
                    host_path=disk.request.host_path,
                    remedy="see who writes to it, and trust neither; it is out of the VM again",
                )
            raise await self._attach_error(refusals[0], slot, disk, taken.fd, timeout_s=timeout_s)
        finally:
            await in_thread(taken.give_back, always=True)

    async def _add(
        self, commands: list[Command], fd: int, disk: QemuDisk, *, timeout_s: float
    ) -> tuple[list[Answer], list[str]]:
        """What QEMU answered, and the files that it has open and was not given.

        Of an image that may name other files the guest sees nothing before these were looked for: its header was
        checked, and whoever may write to it can change it before QEMU reads it.
        """
        if not blockdev.may_name_files(disk):
            return await self._qmp.execute_all(commands, fd=fd, timeout_s=timeout_s), []
        look = ("query-named-block-nodes", {"flat": True})
        *answers, nodes = await self._qmp.execute_all([*commands[:-1], look], fd=fd, timeout_s=timeout_s)
        if any(isinstance(answer, QmpRefused) for answer in (*answers, nodes)):
            return [*answers, *([nodes] if isinstance(nodes, QmpRefused) else [])], []
        known = {blockdev.ROOT_SET, *self._numbers.values(), *chain.from_iterable(self._below.values())}
        if foreign := blockdev.not_given(cast(list[dict[str, Any]], nodes), known):
            return answers, foreign
        return answers + await self._qmp.execute_all(commands[-1:], timeout_s=timeout_s), []

    async def allocated(self, slot: Slot) -> Ranges | None:
        """The ranges of the disk at `slot` that may hold data now. None: it cannot be told.

        True only if the guest has not written to the disk since it came, which the guest knows.
        """
        image = self._images.get(slot)
        return await in_thread(_allocated, *image) if image else None

    async def detach(self, slot: Slot, *, attachment: str, timeout_s: float) -> None:
        """Take the disk off the bus. On return device, node, file and locks are gone. Gone before: no error.

        Can be called again after any failure, and goes on from what is left.

        Raises:
            HostRefused: QEMU said no, or the VM is paused; the disk is still attached.
            OutcomeUnknown: not done within `timeout_s` seconds; probe, or call again.
            VMGone: the VM died, and the disk is free by that.
        """
        number = self._numbers.get(attachment)
        if number is None:
            return
        if not self._running:
            raise HostRefused(
                f"detach {attachment} at {slot}: the VM is paused, and QEMU closes no file then",
                vm=self.process.name,
                slot=slot,
                remedy="resume the VM first",
            )
        try:
            async with asyncio.timeout(timeout_s):
                with self._qmp.expecting(_DELETED, _UNPLUG_FAILED, device=blockdev.device_id(number)) as event:
                    arguments = {"id": blockdev.device_id(number)}
                    (answer,) = await self._qmp.execute_all([("device_del", arguments)], timeout_s=timeout_s)
                    if not isinstance(answer, QmpRefused):
                        self._check_unplugged(await event, slot)
                    elif answer.kind != _NOT_FOUND:
                        raise self._refused(answer, slot)
                    await self._remove(attachment, number, event, slot, timeout_s=timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"detach {attachment} at {slot}: not done within {timeout_s:g} s", vm=self.process.name, slot=slot
            ) from error

    async def probe(self, slot: Slot, *, attachment: str, timeout_s: float) -> bool:
        """Is the disk on the bus? If not, no trace of it is left in QEMU on return.

        Raises:
            OutcomeUnknown: QEMU does not answer, or a device that is going does not go within `timeout_s` seconds.
            VMGone: the VM died.
        """
        number = self._numbers.get(attachment)
        if number is None:
            return False
        if blockdev.device_id(number) in await self._devices(timeout_s=timeout_s):
            return True
        await self.detach(slot, attachment=attachment, timeout_s=timeout_s)
        return False

    async def resize(self, slot: Slot, *, attachment: str, size_bytes: int, timeout_s: float) -> int:
        """Grow the image; the guest's device says at once that its capacity changed. Returns the size that it has then.

        The size that it has is asked for first, in this connection, which is answered in order: what was sent before is
        done by then, also if nobody heard its answer. Nothing is sent that would not make it larger, or that would cut
        a file that somebody has made larger meanwhile.

        Raises:
            NotSupported: a format that QEMU cannot grow, a physical disk, or a read-only attachment.
            InvalidRequest: not whole sectors of the disk.
            HostRefused: QEMU said no, such as for a lack of space, or the file is larger; the size is as it was.
        """
        return await self._sizes.grow(slot, attachment=attachment, size_bytes=size_bytes, timeout_s=timeout_s)

    async def size(self, slot: Slot, *, attachment: str, timeout_s: float) -> int:
        """The bytes that QEMU says the guest's device has.

        Raises:
            NotAttached: it is not on the bus.
        """
        return await self._sizes.of(slot, attachment=attachment, timeout_s=timeout_s)

    # Templates and clones.

    async def loaded(self, disks: Sequence[IncomingDisk], *, timeout_s: float) -> None:
        """Return when a VM that continues from a saved one has its state, and the disks that it expects.

        Raises:
            TemplateDamaged: QEMU does not take the state and says why, or a disk is not the one that was saved.
            DeadlineExceeded: not loaded within `timeout_s` seconds.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    with self._qmp.expecting("MIGRATION") as event:
                        if await self.status(timeout_s=timeout_s) != "inmigrate":
                            break
                        await event
                await self._read_sets(timeout_s=timeout_s)
                found = await self._qmp.execute("query-block", timeout_s=timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the saved state was not loaded in {timeout_s:g} s", vm=self.process.name
            ) from error
        except VMGone as error:
            last = (await in_thread(self.console)).decode(errors="replace").strip().splitlines()[-1:]
            raise not_taken(last[0] if last else "it said nothing", vm=self.process.name) from error
        check_disks(disks, found, vm=self.process.name)

    async def save(self, state: int, *, timeout_s: float) -> None:
        """Pause the VM and write its devices' state to `state`, a descriptor that can only be written to.

        True on return: the images hold all that the guest wrote, and QEMU writes to them no more until `resume`.

        Raises:
            HostRefused: QEMU said no; `resume` lets the VM go on.
            OutcomeUnknown, VMGone: no answer.
        """
        number, self._next_number = self._next_number, self._next_number + 1
        self._lingering.add(number)  # removed when the VM runs again, if it ever does
        await self.pause(timeout_s=timeout_s)
        added, saved = await self._qmp.execute_all(
            [
                ("add-fd", {"fdset-id": number, "opaque": "state"}),
                ("xen-save-devices-state", {"filename": f"/dev/fdset/{number}", "live": True}),
            ],
            fd=state,
            timeout_s=timeout_s,
        )
        for answer in (added, saved):
            if isinstance(answer, QmpRefused):
                raise HostRefused(f"saving the state: {answer}", vm=self.process.name) from answer

    async def shown_devices(self, *, timeout_s: float = 5.0) -> dict[str, ShownDevice]:
        """What the guest sees of each disk, by attachment."""
        return await self._sizes.shown(timeout_s=timeout_s)

    # What the VM's owner asks beside that.

    async def attachments(self, *, timeout_s: float = 5.0) -> list[Attachment]:
        """Every attachment that QEMU has anything of, in the order in which they were made."""
        found = await self._read_sets(timeout_s=timeout_s)
        devices = await self._devices(timeout_s=timeout_s)
        return [
            Attachment(attachment=name, slot=slot, whole=blockdev.device_id(number) in devices)
            for number, (name, slot) in sorted(found.items())
        ]

    async def sizes(self, *, timeout_s: float = 5.0) -> dict[str, int]:
        """The bytes of each disk as the guest sees it, by attachment."""
        return await self._sizes.all(timeout_s=timeout_s)

    async def status(self, *, timeout_s: float = 5.0) -> str:
        """QEMU's run state: `running`, `paused`, `prelaunch`, `io-error`, … Source: qapi/run-state.json, RunState."""
        return str((await self._qmp.execute("query-status", timeout_s=timeout_s))["status"])

    async def pause(self, *, timeout_s: float = 5.0) -> None:
        """Stop the VM's processors. Calling it again is no error."""
        await self._qmp.execute("stop", timeout_s=timeout_s)

    async def resume(self, *, timeout_s: float = 5.0) -> None:
        """Let the VM's processors run. Calling it again is no error."""
        await self._qmp.execute("cont", timeout_s=timeout_s)
        await self._sweep(timeout_s=timeout_s)

    def console(self) -> bytes:
        """The end of the VM's log (up to 1 MiB): the guest's console and QEMU's own messages."""
        return console.read(self.process.folder)

    async def logged(self) -> None:
        """Return when the log of a QEMU that has ended is whole."""
        await launch.logged(self.process)

    async def stop(self, *, timeout_s: float = _QUIT_S, keep_log: bool = False) -> None:
        """End QEMU, by force if it does not go within `timeout_s` seconds, and remove its runtime folder.

        The guest is not asked: shut it down first. True on return: no process, socket, or lock is left; the log is,
        if `keep_log`. Calling it again is no error.

        Raises:
            OutcomeUnknown: the kernel does not let the process go; call again.
        """
        if not self.gone.done():
            try:
                await self._qmp.execute("quit", timeout_s=timeout_s)
                await self._watch.wait(timeout_s=timeout_s)
            except (VMGone, ProtocolError, DeadlineExceeded, QmpRefused) as error:
                self._log.debug("quit: %s", error)
        await self.close()
        await launch.destroy(self.process, keep_log=keep_log)

    async def close(self) -> None:
        """Hang up. QEMU and its disks stay as they are. Twice is once."""
        self._qmp.close()
        self._watch.close()

    def _is_gone(self) -> None:
        if self.gone.done():
            return
        if self._qmp.gone.done():
            self.gone.set_result(self._qmp.gone.result())
        else:
            self.gone.set_result(VMGone(f"QEMU of VM {self.process.name} ended", vm=self.process.name))
            self._qmp.close()

    async def _read_sets(self, *, timeout_s: float) -> dict[int, tuple[str, Slot]]:
        """The fdsets that are attachments; what we knew is replaced by what is so."""
        sets = await self._qmp.execute("query-fdsets", timeout_s=timeout_s)
        found: dict[int, tuple[str, Slot]] = {}
        self._below = {}
        for one in sets:
            for descriptor in one["fds"]:
                name = descriptor.get("opaque", "")
                if parsed := blockdev.parse_opaque(name):
                    found[one["fdset-id"]] = parsed
                elif (owner := blockdev.parse_base(name)) is not None:
                    self._below.setdefault(owner, []).append(one["fdset-id"])
        self._numbers.clear()
        self._numbers.update({name: number for number, (name, _) in found.items()})
        self._next_number = max(self._next_number, 1 + max((one["fdset-id"] for one in sets), default=0))
        return found

    async def _devices(self, *, timeout_s: float) -> set[str]:
        listed = await self._qmp.execute("qom-list", {"path": "/machine/peripheral"}, timeout_s=timeout_s)
        return {entry["name"] for entry in listed}

    async def _undo(self, attachment: str, number: int, answers: list[Answer], *, timeout_s: float) -> None:
        """Take back what was made of an attachment whose device was refused."""
        set_made, node_made = (not isinstance(answer, QmpRefused) for answer in answers[:2])
        undo = [blockdev.remove_node(number)] * node_made + [blockdev.remove_set(number)] * set_made
        if set_made and not self._running:
            self._lingering.add(number)
        for answer in await self._qmp.execute_all(undo, timeout_s=timeout_s):
            if isinstance(answer, QmpRefused):
                raise OutcomeUnknown(
                    f"attach {attachment} failed and was not undone: {answer}",
                    vm=self.process.name,
                    remedy="probe it, which tries again",
                )
        self._numbers.pop(attachment, None)

    async def _remove(
        self, attachment: str, number: int, event: asyncio.Future[Event], slot: Slot, *, timeout_s: float
    ) -> None:
        """Remove node and set, once the device lets go of them. What is gone already is done."""
        node, fdset = blockdev.remove_node(number), blockdev.remove_set(number)
        commands = [node, fdset] if event.done() else [node]
        answers = await self._qmp.execute_all(commands, timeout_s=timeout_s)
        while isinstance(answers[0], QmpRefused) and await self._has_node(number, timeout_s=timeout_s):
            # The device went before we listened, or on another connection: QEMU still frees it.
            self._log.debug("%s is in use: %s", blockdev.node_name(number), answers[0], slot=slot)
            await asyncio.sleep(_LOOK_AGAIN_S)
            answers = await self._qmp.execute_all([node], timeout_s=timeout_s)
        if len(answers) < 2:
            answers = await self._qmp.execute_all([fdset], timeout_s=timeout_s)
        if (isinstance(answers[-1], QmpRefused) or not self._running) and await self._has_set(
            number, timeout_s=timeout_s
        ):
            self._lingering.add(number)
            raise OutcomeUnknown(
                f"{attachment} is off the bus, and QEMU keeps its file open while the VM is paused",
                vm=self.process.name,
                slot=slot,
                remedy="resume the VM, and ask again",
            )
        self._lingering.discard(number)
        below = [blockdev.remove_set(one) for one in self._below.get(attachment, [])]
        await self._qmp.execute_all(below, timeout_s=timeout_s)
        self._below.pop(attachment, None)
        if (closing := self._closing.get(attachment)) is not None:
            await asyncio.wait([closing])  # it was begun long ago
        self._numbers.pop(attachment, None)

    def _close_ours(self, attachment: str, fd: int) -> None:
        closing = asyncio.ensure_future(in_thread(os.close, fd, always=True))
        self._closing[attachment] = closing
        closing.add_done_callback(lambda _: self._closing.pop(attachment))

    async def _has_node(self, number: int, *, timeout_s: float) -> bool:
        nodes = await self._qmp.execute("query-named-block-nodes", {"flat": True}, timeout_s=timeout_s)
        return any(node["node-name"] == blockdev.node_name(number) for node in nodes)

    async def _has_set(self, number: int, *, timeout_s: float) -> bool:
        sets = await self._qmp.execute("query-fdsets", timeout_s=timeout_s)
        return any(one["fdset-id"] == number for one in sets)

    def _on_event(self, event: Event) -> None:
        if event.name in _RUNS:
            self._running = _RUNS[event.name]
        elif event.name == "BLOCK_IO_ERROR" and event.data.get("node-name") not in self._failed_nodes:
            # Once for each: a guest can cause them as fast as it likes.
            self._failed_nodes.add(str(event.data.get("node-name")))
            self._log.warning(
                "%s of node %s failed: %s",
                event.data.get("operation"),
                event.data.get("node-name"),
                event.data.get("reason"),
            )

    async def _sweep(self, *, timeout_s: float) -> None:
        """Have QEMU close the files that it kept while the VM was paused."""
        lingering = sorted(self._lingering)
        await self._qmp.execute_all([blockdev.remove_set(number) for number in lingering], timeout_s=timeout_s)
        self._lingering.difference_update(lingering)

    def _check_slot(self, slot: Slot) -> None:
        Slot.checked(*slot)
        if slot.controller >= self.process.controllers:
            raise InvalidRequest(
                f"slot {slot}: the VM has {self.process.controllers} SCSI controllers", vm=self.process.name, slot=slot
            )

    def _check_unplugged(self, event: Event, slot: Slot) -> None:
        if event.name == _UNPLUG_FAILED:
            raise HostRefused(f"the guest refused to give up the device at {slot}", vm=self.process.name, slot=slot)

    def _refused(self, error: QmpRefused, slot: Slot) -> HostRefused:
        return HostRefused(f"{error.command} at {slot}: {error.description}", vm=self.process.name, slot=slot)

    async def _attach_error(
        self, error: QmpRefused, slot: Slot, disk: QemuDisk, fd: int, *, timeout_s: float
    ) -> UtilityVMError:
        """Why QEMU refused the disk behind `fd`: what is the case decides, and QEMU's words are for people."""
        path, vm = disk.request.host_path, self.process.name
        if await in_thread(lent(fd, is_locked_by_a_program), disk.request.read_only):
            return DiskInUse(
                f"attach {path} at {slot}: a program outside utilityvm uses it: {error.description}",
                vm=vm,
                slot=slot,
                host_path=path,
                remedy=f"see who has it open: fuser -v {path}",
            )
        if any(other.slot == slot and other.whole for other in await self.attachments(timeout_s=timeout_s)):
            return AlreadyAttached(f"attach {path} at {slot}: {error.description}", vm=vm, slot=slot, host_path=path)
        return HostRefused(
            f"attach {path} at {slot}: QEMU refused {error.command}: {error.description}",
            vm=vm,
            slot=slot,
            host_path=path,
            remedy="QEMU's reason is in the message; nothing of the disk is left in the VM",
        )


async def _why_gone(process: QemuProcess, watch: Watch, error: VMGone) -> UtilityVMError:
    """Did the connection end because QEMU did? Only its process tells."""
    if await watch.wait(timeout_s=_END_S):
        return VMGone(f"QEMU of VM {process.name} (process {process.pid}) ended", vm=process.name)
    return OutcomeUnknown(
        f"QEMU of VM {process.name} (process {process.pid}) runs and cannot be reached: {error}",
        vm=process.name,
        remedy=f"try again; to end it without what its guest has not written out yet: uvm stop --force {process.name}",
    )


def _allocated(path: str, identity: str, image_format: DiskFormat) -> Ranges | None:
    """What the image at `path` has allocated, if it is still the one that was attached."""
    try:
        fd = hostpath.open_file(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, UtilityVMError):
        return None
    try:
        return allocated(fd, image_format, name=path) if describe(Path(f"/proc/self/fd/{fd}")) == identity else None
    finally:
        os.close(fd)
