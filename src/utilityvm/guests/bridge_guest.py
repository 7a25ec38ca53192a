"""The guest backend over the bridge: mounts, unmounts and ejects through our agent, or through hcsshim's gcs.

Our agent says so when it negotiates. To any other guest nothing is sent but the recorded messages. What those cannot
say is refused beforehand (a key, a verity tree, force), what would do harm is not sent, and what such a guest cannot be
asked is answered from what it has said before, or not at all (`ledger`).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

from utilityvm.bridge import messages
from utilityvm.errors import (
    DeadlineExceeded,
    GuestBusy,
    GuestPathInUse,
    GuestRefused,
    InvalidRequest,
    NotSupported,
    ProtocolError,
    RequestError,
    VMGone,
)
from utilityvm.guests import answers
from utilityvm.guests.connection import Address, Dial, Given, Listen, Source
from utilityvm.guests.kept import KeptPrograms
from utilityvm.guests.ledger import Ledger
from utilityvm.guests.mount_settings import (
    check_config,
    check_path,
    check_plain,
    disk_extension,
    disk_settings,
    nonzero,
)
from utilityvm.guests.program import CommandResult, OutputSink
from utilityvm.guests.refusals import Where
from utilityvm.guests.running import GuestPrograms
from utilityvm.guests.session import ANSWER_S
from utilityvm.log import logger
from utilityvm.machine.oserrors import typed_errors
from utilityvm.scsi.mount import checked_guest_path
from utilityvm.scsi.ports import MountConfig, Record
from utilityvm.scsi.slot import Slot

__all__ = ["BridgeGuest", "CommandResult", "OutputSink"]

_log = logger(__name__)

_NOTES: Final = 10  # of a mount, at the most
_MAX_PAGES: Final = 256  # of the list of mounts; the agent puts some hundred in each
_TEMPLATES_SINCE: Final = 2  # of the agent's versions
_SEED_BYTES: Final = range(32, 513)
_HOSTNAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_MACHINE_ID: Final = re.compile(r"[0-9a-f]{32}")


@typed_errors
class BridgeGuest(GuestPrograms):
    """Implements `scsi.ports.GuestBackend` on one VM. Use `connect`, `listen` or `over`.

    When the connection or the agent ends, whoever waits hears of it at once, and the next request connects anew.
    """

    def __init__(self, source: Source, *, vm: str | None = None) -> None:
        super().__init__(source, vm=vm)
        self._ledger = Ledger()
        self.kept = KeptPrograms(self)
        # The ranges of a disk that may hold data, if the host can tell: our agent then need not read all of it to see
        # that it is blank.
        self.allocated: Callable[[Slot], Awaitable[Sequence[tuple[int, int]] | None]] | None = None

    @classmethod
    async def connect(cls, address: Address, *, timeout_s: float, vm: str | None = None) -> BridgeGuest:
        """A backend on the guest behind the Unix socket or vsock port `address`, which has answered.

        Raises:
            DeadlineExceeded: it did not answer within `timeout_s` seconds.
            VMGone: nobody listens there.
            ProtocolError: what answers does not speak our protocol.
        """
        return await cls._begin(Dial(address), timeout_s=timeout_s, vm=vm)

    @classmethod
    def later(cls, address: Address, *, vm: str | None = None) -> BridgeGuest:
        """A backend on our agent behind `address`, which does not answer now: each request connects anew."""
        guest = cls(Dial(address), vm=vm)
        guest._is_known = True
        return guest

    @classmethod
    async def awaken(
        cls,
        address: Address,
        *,
        seed: bytes,
        hostname: str,
        machine_id: str,
        timeout_s: float,
        vm: str | None = None,
    ) -> BridgeGuest:
        """A backend on a clone that was made a VM of its own: `connect` and `make_unique` in one.

        All that is asked of the clone is sent at once, and may be sent before it runs.

        Raises:
            As `connect` and `make_unique`.
        """
        guest = cls(Dial(address), vm=vm)
        body = guest._unique_request(seed, hostname, machine_id, time.time_ns())
        guest._first = (messages.UNIQUE, {**body, messages.EXTENSION: {"TimeoutMs": int(timeout_s * 1000)}})
        try:
            client = await guest._connected(time.monotonic() + timeout_s)
            guest._first = None
            guest._need_templates("be made unique")
            answer = guest._checked(client.first_answer or {}, None)
            guest._learn_boot_id(answer)
        except BaseException:
            await guest.close()
            raise
        return guest

    @classmethod
    async def listen(cls, address: Address, *, timeout_s: float, vm: str | None = None) -> BridgeGuest:
        """A backend on a guest that dials us at `address` within `timeout_s` seconds, and again when it restarts.

        Raises:
            As `connect`, and OSError: we may not listen there.
        """
        return await cls._begin(Listen(address), timeout_s=timeout_s, vm=vm)

    @classmethod
    async def over(
        cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, timeout_s: float, vm: str | None = None
    ) -> BridgeGuest:
        """A backend on a guest that is connected already. When that connection ends there is no other."""
        return await cls._begin(Given((reader, writer)), timeout_s=timeout_s, vm=vm)

    @classmethod
    async def _begin(cls, source: Source, *, timeout_s: float, vm: str | None) -> BridgeGuest:
        guest = cls(source, vm=vm)
        try:
            await guest._connected(time.monotonic() + timeout_s)
        except BaseException:
            await guest.close()
            raise
        return guest

    def adopt(self, records: Iterable[Record]) -> None:
        """Take over what another owner of this VM wrote into its journal (`Journal.read`).

        For a guest without our agent, which cannot be asked what it has mounted.
        """
        self._ledger.adopt(records)

    def allow_mounts_below(self, folder: PurePosixPath) -> None:
        """Vouch for it that the guest keeps no files below `folder`: hcsshim's gcs removes what is at a mount's path.

        Our own agent removes nothing, and needs no such word.

        Raises:
            InvalidRequest: it is no path in a guest, or the system's own.
        """
        self._ledger.vouched.add(checked_guest_path(folder))

    # The GuestBackend protocol.

    def check(self, slot: Slot | None, config: MountConfig | None) -> None:
        """Refuse what is wrong by itself, or what this guest cannot be told. See `GuestBackend.check`.

        Raises:
            InvalidRequest, NotSupported: nothing was sent.
        """
        if slot is not None:
            Slot.checked(*slot)
        if config is not None:
            check_config(config)
            if not self.has_our_agent:
                check_plain(config)

    def checked_path(self, guest_path: PurePosixPath) -> PurePosixPath:
        """See `GuestBackend.checked_path`."""
        path = checked_guest_path(guest_path)
        if not self.has_our_agent:
            self._ledger.check_path(path)
        return path

    def check_force(self, slot: Slot) -> None:
        """See `GuestBackend.check_force`.

        Raises:
            NotSupported: the guest's agent is not ours.
        """
        if not self.has_our_agent:
            self._refuse_force(slot, True)

    async def mount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float
    ) -> Sequence[str]:
        """See `GuestBackend.mount`."""
        self.check(slot, config)
        check_path(guest_path, to_mount=self.has_our_agent)  # another guest has folders of its own: `ledger`
        settings = disk_settings(slot, config, guest_path)
        if self.has_our_agent:
            may_hold = await self.allocated(slot) if self.allocated and config.ensure_filesystem else None
            settings |= disk_extension(config, may_hold=may_hold)
            try:
                answer = await self._modify("Add", "MappedVirtualDisk", settings, Where(slot, guest_path), timeout_s)
            except GuestBusy as error:  # the path is: the disk may be mounted as often as one likes
                remedy = "choose another path, or unmount what is there"
                raise GuestPathInUse(str(error), vm=self._vm, slot=slot, remedy=remedy) from error
            notes = answers.read(answers.Response, answer, vm=self._vm).notes[:_NOTES]
            for note in notes:
                _log.info("%s", note, vm=self._vm, slot=slot)
            return notes
        self._ledger.before_mount(slot, guest_path)
        with self._ledger.mounting(slot, guest_path):
            await self._modify("Add", "MappedVirtualDisk", settings, Where(slot, guest_path), timeout_s)
        return ()

    async def unmount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float, force: bool
    ) -> None:
        """See `GuestBackend.unmount`."""
        self.check(slot, None)
        check_path(guest_path, to_mount=False)
        settings = disk_settings(slot, config, guest_path)
        where = Where(slot, guest_path)
        if self.has_our_agent:
            await self._modify("Remove", "MappedVirtualDisk", settings, where, timeout_s, force=force)
            return
        self._refuse_force(slot, force)
        if self._ledger.before_unmount(slot, guest_path):
            with self._ledger.unmounting(slot, guest_path):
                await self._modify("Remove", "MappedVirtualDisk", settings, where, timeout_s)

    async def eject(self, slot: Slot, *, timeout_s: float, force: bool) -> None:
        """See `GuestBackend.eject`."""
        self.check(slot, None)
        settings = nonzero(Controller=slot.controller, Lun=slot.lun)
        if self.has_our_agent:
            await self._modify("Remove", "SCSIDevice", settings, Where(slot), timeout_s, force=force)
            return
        self._refuse_force(slot, force)
        self._ledger.before_eject(slot)
        try:
            await self._modify("Remove", "SCSIDevice", settings, Where(slot), timeout_s)
        except (GuestRefused, RequestError):
            self._ledger.learn_not_ejected(slot)
            raise
        self._ledger.learn_ejected(slot)

    async def probe_mount(self, slot: Slot, *, guest_path: PurePosixPath, timeout_s: float) -> bool:
        """See `GuestBackend.probe_mount`."""
        if not self.has_our_agent:
            return self._ledger.is_mounted(slot, guest_path)
        return str(guest_path) in (await self._probe(slot, timeout_s)).mount_paths

    async def probe_device(self, slot: Slot, *, timeout_s: float) -> bool:
        """See `GuestBackend.probe_device`. A guest that did not answer an eject, and cannot be asked, is told again."""
        if not self.has_our_agent:
            if self._ledger.may_be_ejected(slot):  # the same once more is no harm, and leaves no doubt
                await self.eject(slot, timeout_s=timeout_s, force=False)
            return self._ledger.is_present(slot)
        return (await self._probe(slot, timeout_s)).present

    async def check_grow(self, slot: Slot, *, size_bytes: int, timeout_s: float) -> None:
        """See `GuestBackend.check_grow`."""
        self._need_our_agent("grow a file system", slot)
        body = messages.request(Controller=slot.controller, Lun=slot.lun, Check=size_bytes)
        await self._ask(messages.GROW, body, timeout_s, Where(slot))

    async def grow(self, slot: Slot, *, mounts: Sequence[tuple[MountConfig, PurePosixPath]], timeout_s: float) -> None:
        """See `GuestBackend.grow`. Our agent knows its mounts itself."""
        self._need_our_agent("grow a file system", slot)
        body = messages.request(Controller=slot.controller, Lun=slot.lun)
        await self._ask(messages.GROW, body, timeout_s, Where(slot))

    # What else our agent does.

    async def ping(self, *, timeout_s: float = 10.0) -> None:
        """Return when the agent has answered.

        Raises:
            DeadlineExceeded, VMGone: it did not.
        """
        self._need_our_agent("answer a ping")
        await self._ask(messages.PING, messages.request(), timeout_s)

    async def info(self, *, timeout_s: float = 10.0) -> dict[str, Any]:
        """What the agent says of itself and its kernel: `Agent` (a number), `Kernel`, `BootId`, `UptimeMs`."""
        self._need_our_agent("tell about itself")
        answer = await self._ask(messages.INFO, messages.request(), timeout_s)
        about = answers.read(answers.About, answer, vm=self._vm)
        return {"Agent": about.agent, "Kernel": about.kernel, "BootId": about.boot_id, "UptimeMs": about.uptime_ms}

    async def mounts(self, *, timeout_s: float = 10.0) -> list[dict[str, Any]]:
        """What the agent has mounted, as it tells it, in the order of guest paths.

        Raises:
            ProtocolError: its list has no end, or makes no sense.
            DeadlineExceeded: it did not tell all within `timeout_s` seconds.
        """
        self._need_our_agent("list its mounts")
        deadline = time.monotonic() + timeout_s
        mounts: list[answers.Mount] = []
        for _ in range(_MAX_PAGES):
            left = deadline - time.monotonic()
            if left <= 0 and mounts:
                raise DeadlineExceeded(f"the guest did not list all of its mounts within {timeout_s:g} s", vm=self._vm)
            after = mounts[-1].mount_path if mounts else ""
            answer = await self._ask(messages.MOUNTS, messages.request(**nonzero(After=after)), max(left, 0.0))
            page = answers.read(answers.Mounts, answer, what="list of mounts", vm=self._vm)
            if page.mounts and page.mounts[-1].mount_path <= after:
                raise ProtocolError(f"the guest's list of mounts does not go on after {after!r}", vm=self._vm)
            mounts += page.mounts
            if not page.more or not page.mounts:
                return [mount.told() for mount in mounts]
        raise ProtocolError(f"the guest's list of mounts has no end: {len(mounts)} so far", vm=self._vm)

    async def quiesce(self, *, timeout_s: float, hold_s: float = 60.0) -> None:
        """Freeze the guest, so that it can be stopped and saved as a template.

        Then its hooks in /etc/utilityvm/template.d were told `save`, what was written is on the disks, and whoever
        writes to them waits. It is frozen until `thaw`, or for `hold_s` seconds of its own time: stop it within those.
        A second time holds it anew. If it fails the guest goes on as before.

        Raises:
            GuestBusy: programs run that were started with `run`; `holders` names them.
            GuestRefused: a hook failed, or the kernel refused; names it.
            DeadlineExceeded: it took more than `timeout_s` seconds.
            NotSupported: the agent is of a guest image from before there were templates.
        """
        self._need_templates("become a template")
        deadline = time.monotonic() + timeout_s
        answer = await self._ask(messages.QUIESCE, messages.request(HoldMs=int(hold_s * 1000)), timeout_s)
        # The agent's thread that answered has to come to rest, or each clone would begin by doing so.
        await self.ping(timeout_s=max(deadline - time.monotonic(), ANSWER_S))
        for path in answers.read(answers.Quiesced, answer, vm=self._vm).flushed or ():
            _log.warning("%s cannot be frozen, and was only written out", path, vm=self._vm)

    async def thaw(self, *, timeout_s: float) -> None:
        """Let the guest go on as before `quiesce`; a guest that is not frozen does.

        Raises:
            GuestRefused: a file system stays frozen; or a hook failed, after all were thawed.
        """
        self._need_templates("be thawed")
        await self._ask(messages.THAW, messages.request(), timeout_s)

    async def make_unique(
        self, *, seed: bytes, hostname: str, machine_id: str, clock_ns: int | None = None, timeout_s: float
    ) -> None:
        """Make this clone a VM of its own: random numbers, clock, hostname, machine id and boot id. Thaws it.

        Its hooks in /etc/utilityvm/template.d are told `clone`, with UTILITYVM_NAME and UTILITYVM_MACHINE_ID. `seed` is
        of 32 bytes or more that nobody else knows; `clock_ns` is the time since 1970, the host's if it is None. If it
        fails the clone is not fit to be used; it may be asked again.

        Raises:
            InvalidRequest: an argument makes no sense; nothing was changed.
            GuestRefused: a hook failed, or the kernel refused; names it.
            DeadlineExceeded: it took more than `timeout_s` seconds.
        """
        body = self._unique_request(seed, hostname, machine_id, time.time_ns() if clock_ns is None else clock_ns)
        self._need_templates("be made unique")
        answer = await self._ask(messages.UNIQUE, body, timeout_s)
        self._learn_boot_id(answer)

    def _learn_boot_id(self, answer: dict[str, Any]) -> None:
        boot_id = answers.read(answers.Unique, answer, vm=self._vm).boot_id
        if self._client and self._client.about:
            self._client.about.boot_id = boot_id

    def _unique_request(self, seed: bytes, hostname: str, machine_id: str, clock_ns: int) -> dict[str, Any]:
        if len(seed) not in _SEED_BYTES:
            raise InvalidRequest(f"a seed of {len(seed)} bytes: 32 to 512 are needed", vm=self._vm)
        if not _HOSTNAME.fullmatch(hostname):
            remedy = "use 1 to 63 letters, digits, '.', '_' and '-', the first a letter or digit"
            raise InvalidRequest(f"{hostname!r} cannot be a hostname", vm=self._vm, remedy=remedy)
        if not _MACHINE_ID.fullmatch(machine_id) or not machine_id.strip("0"):
            remedy = "give 32 lower-case hexadecimal digits, not all 0"
            raise InvalidRequest(f"{machine_id!r} is no machine id", vm=self._vm, remedy=remedy)
        if not 0 < clock_ns < 1 << 63:
            raise InvalidRequest(f"{clock_ns} is no time in nanoseconds since 1970", vm=self._vm)
        return messages.request(Seed=seed.hex(), Hostname=hostname, MachineId=machine_id, ClockNs=clock_ns)

    async def shutdown(self, *, timeout_s: float = 10.0) -> tuple[str, ...]:
        """Have the guest end its programs, unmount everything and power off, which it begins when this returns.

        Gives what it could not leave clean, a sentence each. It may be gone before it answers: that is no error.
        """
        self._need_our_agent("power off")
        try:
            answer = await self._ask(messages.SHUTDOWN, messages.request(), timeout_s)
        except VMGone:
            return ()
        return tuple(answers.read(answers.ShutDown, answer, vm=self._vm).unclean or ())

    async def _modify(
        self,
        request_type: str,
        resource_type: str,
        settings: dict[str, Any],
        where: Where,
        timeout_s: float,
        *,
        force: bool = False,
    ) -> dict[str, Any]:
        body = messages.modify_request(request_type, resource_type, settings)
        return await self._ask(messages.MODIFY, body, timeout_s, where, force=force)

    async def _probe(self, slot: Slot, timeout_s: float) -> answers.Probed:
        body = messages.request(Controller=slot.controller, Lun=slot.lun)
        answer = await self._ask(messages.PROBE, body, timeout_s, Where(slot))
        return answers.read(answers.Probed, answer, vm=self._vm)

    # A guest that is not ours.

    def _refuse_force(self, slot: Slot, force: bool) -> None:
        if force:
            raise NotSupported("this guest's agent knows no force", vm=self._vm, slot=slot)

    def _need_templates(self, what: str) -> None:
        self._need_our_agent(what)
        about = self._client.about if self._client else None
        if about is None or about.agent < _TEMPLATES_SINCE:
            remedy = "stop the VM, and start it anew with the guest image of this utilityvm"
            raise NotSupported(f"this guest's agent is too old to {what}", vm=self._vm, remedy=remedy)
