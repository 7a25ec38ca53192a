"""The guest backend over the bridge: mounts, unmounts and ejects through our agent, or through hcsshim's gcs.

Our agent says so when it negotiates. To any other guest nothing is sent but the recorded messages. What those cannot
say is refused beforehand (a key, a verity tree, force), what would do harm is not sent, and what such a guest cannot be
asked is answered from what it has said before, or not at all (`ledger`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final, Protocol

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
    UtilityVMError,
    VMGone,
)
from utilityvm.guests import answers
from utilityvm.guests.bridge_client import BridgeClient, NotNegotiated, again
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
from utilityvm.guests.program import CommandResult, GuestProgram, Limits, OutputSink, Said, heard, run_request
from utilityvm.guests.refusals import Where, refusal
from utilityvm.log import logger
from utilityvm.machine.oserrors import raises_callers_errors, typed_errors
from utilityvm.scsi.mount import checked_guest_path
from utilityvm.scsi.ports import MountConfig, Record
from utilityvm.scsi.slot import Slot

__all__ = ["BridgeGuest", "CommandResult", "OutputSink"]

_log = logger(__name__)

_ANSWER_S: Final = 0.4  # our agent keeps the caller's deadline itself; this long we wait for it to say so
_AHEAD: Final = 0.05  # of the time that the caller gives, which the agent gets less, so that its words come in time
_MAX_AHEAD_S: Final = 0.25
_RENEGOTIATE_TIMES: Final = 3  # for one request; who then still is not negotiated with never will be
_START_S: Final = 30.0  # for a program to be started
MAX_OUTPUT_BYTES: Final = 64 << 20
_NOTES: Final = 10  # of a mount, at the most
_MAX_PAGES: Final = 256  # of the list of mounts; the agent puts some hundred in each
_MAX_RESTARTS: Final = 8  # of the agent, right when a program was to be started
_SHORT_LIVED_S: Final = 5.0  # a connection that ended sooner is not followed by the next at once
_PAUSES_S: Final = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
_TEMPLATES_SINCE: Final = 2  # of the agent's versions
_TERMINALS_SINCE: Final = 4  # of the agent's versions
_PROGRAMS_SINCE: Final = 3  # of the agent's versions: kept programs, users and limits
_SEED_BYTES: Final = range(32, 513)
_HOSTNAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_MACHINE_ID: Final = re.compile(r"[0-9a-f]{32}")


class _Speaks(Protocol):
    """What hears what the guest says of a process."""

    def take(self, said: Said) -> None: ...


@typed_errors
class BridgeGuest:
    """Implements `scsi.ports.GuestBackend` on one VM. Use `connect`, `listen` or `over`.

    When the connection or the agent ends, whoever waits hears of it at once, and the next request connects anew.
    """

    def __init__(self, source: Source, *, vm: str | None = None) -> None:
        self._source = source
        self._vm = vm
        self._client: BridgeClient | None = None
        self._first: tuple[int, dict[str, Any]] | None = None  # what is asked with the negotiate
        self._connecting = asyncio.Lock()
        self._connected_at = float("-inf")
        self._short_lived = 0  # connections in a row
        self._closed = False
        self._ledger = Ledger()
        self._numbers = itertools.count(1)
        self._last_number = 0
        self._is_known = False  # to be ours, before it ever answered
        self._programs: dict[int, _Speaks] = {}
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

    async def close(self) -> None:
        """Hang up. Programs that we run in the guest end; mounts stay. Twice is once."""
        self._closed = True
        self._source.close()
        if self._client:
            await self._client.close()

    async def hang_up(self) -> None:
        """End the connection; the next request connects anew. Programs that we run in the guest end; mounts stay."""
        if self._client:
            await self._client.close()

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

    @property
    def has_our_agent(self) -> bool:
        """Does our own agent answer, and not another guest of the same protocol?"""
        return self._is_known if self._client is None else self._client.is_ours

    @property
    def boot_id(self) -> str | None:
        """The kernel's id of this boot of the guest, as it was when we connected; None if it is not our agent."""
        about = self._client.about if self._client else None
        return about.boot_id if about else None

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
        await self.ping(timeout_s=max(deadline - time.monotonic(), _ANSWER_S))
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

    async def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        timeout_s: float | None = None,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
    ) -> CommandResult[bytes]:
        """Run a program to its end. Cancelled or out of time, it is killed with all that it started.

        It has ended when its own process has. What its children write to its output within half a second of that is
        kept, and later output is dropped. The children go on running.

        Raises:
            GuestRefused: it could not be started, or wrote more than `max_output_bytes` and was killed.
            DeadlineExceeded: it did not end within `timeout_s` seconds; has what it wrote in `stdout` and `stderr`.
            VMGone, OutcomeUnknown: the guest, or its agent, went first.
        """
        outputs = bytearray(), bytearray()

        def collect(output: bytearray, data: bytes) -> None:
            output.extend(data)
            if sum(map(len, outputs)) > max_output_bytes:
                raise GuestRefused(
                    f"{command[0]} wrote more than {max_output_bytes} bytes and was killed",
                    vm=self._vm,
                    remedy="take its output as it comes, with run_streaming",
                )

        async def given(data: bytes) -> AsyncIterator[bytes]:
            yield data

        try:
            exit_code = await self.run_streaming(
                command,
                stdin=None if stdin is None else given(stdin),
                stdout=lambda data: collect(outputs[0], data),
                stderr=lambda data: collect(outputs[1], data),
                env=env,
                cwd=cwd,
                user=user,
                limits=limits,
                timeout_s=timeout_s,
            )
        except DeadlineExceeded as error:
            error.stdout, error.stderr = map(bytes, outputs)
            raise
        return CommandResult(exit_code=exit_code, stdout=bytes(outputs[0]), stderr=bytes(outputs[1]))

    @raises_callers_errors
    async def run_streaming(
        self,
        command: Sequence[str],
        *,
        stdin: AsyncIterator[bytes] | None = None,
        stdout: OutputSink,
        stderr: OutputSink,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        user: str | int | None = None,
        limits: Limits | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Like `run`, with input and output as they come; gives the exit code.

        Output that a sink does not take holds the program back; so does a sink that gives something to await, until
        that is done. What a sink or `stdin` raises kills the program and is raised here.
        """
        body = run_request(
            command, env=env, cwd=cwd, takes_input=stdin is not None, user=user, limits=limits, vm=self._vm
        )
        self._need_our_agent(f"run {command[0]}")
        limit = asyncio.timeout(timeout_s)
        program = None
        try:
            async with limit:
                for attempt in itertools.count(1):
                    client = await self._connected(time.monotonic() + (_START_S if timeout_s is None else timeout_s))
                    if "User" in body or "Limits" in body:
                        self.need_programs(client, "run a program as another user, or with limits")
                    body["Process"] = self._new_number()
                    program = GuestProgram(body["Process"], client.notify, stdout=stdout, stderr=stderr)
                    try:
                        return await self._follow(client, program, body, stdin)
                    except NotNegotiated:  # it was not started: a new agent does not know us yet
                        if attempt == _MAX_RESTARTS:
                            raise
        except TimeoutError:
            if not limit.expired():
                raise  # it is the caller's own
            if program and program.is_held_back:
                text = f"{command[0]} {program.progress} its output was not taken within {timeout_s:g} s"
            else:
                text = f"{command[0]} did not end within {timeout_s:g} s and was killed"
            raise DeadlineExceeded(text, vm=self._vm) from None
        raise AssertionError("the attempts ended without a result")

    async def _follow(
        self,
        client: BridgeClient,
        program: GuestProgram,
        body: dict[str, Any],
        stdin: AsyncIterator[bytes] | None,
    ) -> int:
        self._programs[program.number] = program
        tasks: set[asyncio.Task[Any]] = set()
        has_ended = False
        try:
            self._checked(await client.request(messages.RUN, body, timeout_s=_START_S + _ANSWER_S), None)
            client.is_watched = True
            ending = asyncio.create_task(program.deliver())
            tasks = {ending} if stdin is None else {ending, asyncio.create_task(program.feed(stdin))}
            waiting: set[asyncio.Future[Any]] = {*tasks, client.gone}
            while not ending.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done & tasks:
                    task.result()  # what a sink or `stdin` raised
                if client.gone in done and (isinstance(client.gone.result(), ProtocolError) or not program.has_ended):
                    raise again(client.gone.result())
            has_ended = True
            return ending.result()
        finally:
            del self._programs[program.number]
            client.is_watched = bool(self._programs)
            if not has_ended:
                with contextlib.suppress(UtilityVMError):
                    program.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _new_number(self) -> int:
        self._last_number = next(self._numbers)
        return self._last_number

    def _take_notification(self, kind: int, body: dict[str, Any]) -> None:
        if kind == messages.CONTAINER_NOTIFICATION:
            return  # hcsshim's gcs tells of its containers; we have none
        said = heard(kind, body, vm=self._vm)
        if program := self._programs.get(said.process):
            program.take(said)
        elif said.process > self._last_number:
            raise ProtocolError(f"the guest speaks of process {said.process}, which we never started", vm=self._vm)

    # One request.

    async def _connected(self, deadline: float) -> BridgeClient:
        """The connection; made anew if it, or the agent, ended."""
        if self._client and not self._client.gone.done():
            return self._client
        left = max(deadline - time.monotonic(), 0.0)
        try:
            async with asyncio.timeout(left):
                await self._connecting.acquire()
        except TimeoutError:
            raise DeadlineExceeded(f"no connection to the guest within {left:g} s", vm=self._vm) from None
        try:
            return await self._connect(deadline)
        finally:
            self._connecting.release()

    async def _connect(self, deadline: float) -> BridgeClient:
        if self._client and not self._client.gone.done():
            return self._client  # another was quicker
        if self._closed:
            raise VMGone("the connection was closed", vm=self._vm)
        if self._client:
            await self._client.close()
            await self._pause(deadline)
        self._connected_at = time.monotonic()
        streams = await self._source.open(timeout_s=max(deadline - time.monotonic(), 0.0), vm=self._vm)
        self._client = await BridgeClient.over(
            streams,
            timeout_s=max(deadline - time.monotonic(), 0.0),
            vm=self._vm,
            on_notify=self._take_notification,
            first=self._first,
        )
        return self._client

    async def _pause(self, deadline: float) -> None:
        """Before a new connection: an agent that ends one after the other is not dialled as fast as it can."""
        is_short_lived = time.monotonic() - self._connected_at < _SHORT_LIVED_S
        self._short_lived = self._short_lived + 1 if is_short_lived else 0
        pause_s = _PAUSES_S[min(max(self._short_lived - 1, 0), len(_PAUSES_S) - 1)]
        await asyncio.sleep(max(min(pause_s, deadline - time.monotonic()), 0.0))

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

    async def _ask(
        self,
        kind: int,
        body: dict[str, Any],
        timeout_s: float,
        where: Where | None = None,
        *,
        force: bool = False,
    ) -> dict[str, Any]:
        """The answer to a request; sent again only if it met an agent that had not looked at it."""
        deadline = time.monotonic() + timeout_s
        was_ours = self.has_our_agent
        renegotiated = 0
        while True:
            client = await self._connected(deadline)
            left = max(deadline - time.monotonic(), 0.0)
            if client.is_ours:
                agents = left - min(left * _AHEAD, _MAX_AHEAD_S)
                body[messages.EXTENSION] = {"TimeoutMs": int(agents * 1000), **nonzero(Force=force)}
            elif was_ours:
                raise GuestRefused("another agent answers than before", vm=self._vm, remedy="close, and connect again")
            try:
                answer = await client.request(kind, body, timeout_s=left + (_ANSWER_S if client.is_ours else 0.0))
            except NotNegotiated:
                if time.monotonic() >= deadline:
                    raise
                continue
            if client.must_negotiate(kind, answer) and renegotiated < _RENEGOTIATE_TIMES:
                renegotiated += 1
                await self._negotiate_again(client, deadline)
                continue
            return self._checked(answer, where)

    async def _negotiate_again(self, client: BridgeClient, deadline: float) -> None:
        """Negotiate with a gcs that was started again. Of several requests that meet it, each does, and one is taken.

        Raises:
            GuestRefused: it failed; the request that met the new gcs was not looked at.
            VMGone: the connection ended.
        """
        try:
            await client.negotiate_again(timeout_s=max(deadline - time.monotonic(), 0.0))
        except VMGone:
            raise
        except UtilityVMError as error:
            raise GuestRefused(f"the guest's agent was started again: {error}", vm=self._vm) from error
        _log.info("the guest's agent was started again, and negotiated with", vm=self._vm)

    def _checked(self, answer: dict[str, Any], where: Where | None) -> dict[str, Any]:
        """The answer, if it is a yes; else the error of `refusals`."""
        response = answers.read(answers.Response, answer, vm=self._vm)
        if response.result:
            raise refusal(response, where, vm=self._vm)
        return answer

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

    def need_terminals(self, client: BridgeClient) -> None:
        """As `need_programs`."""
        self.need_programs(client, "give a program a terminal", since=_TERMINALS_SINCE)

    def need_programs(self, client: BridgeClient, what: str, *, since: int = _PROGRAMS_SINCE) -> None:
        """Refuse what only an agent of this version or later does.

        Raises:
            NotSupported: the agent at the other end of `client` is older, or not ours.
        """
        if client.about is None:
            self._need_our_agent(what)
        elif client.about.agent < since:
            remedy = "build the guest image anew (uvm image build), and start the VM from it"
            raise NotSupported(f"this guest's agent is too old to {what}", vm=self._vm, remedy=remedy)

    def _need_our_agent(self, what: str, slot: Slot | None = None) -> None:
        if self._client and not self.has_our_agent:
            raise NotSupported(
                f"this guest's agent cannot {what}", vm=self._vm, slot=slot, remedy="use utilityvm's guest image"
            )
