"""The guest backend over the bridge: mounts, unmounts and ejects through our agent, or through hcsshim's gcs.

Our agent says so when it negotiates. To any other guest nothing is sent but the recorded messages, and what those
cannot say is refused beforehand: a key, a verity tree, force, a deadline, a probe.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeAlias

from utilityvm.bridge import messages
from utilityvm.errors import (
    DeadlineExceeded,
    GuestBusy,
    GuestRefused,
    InvalidRequest,
    NotSupported,
    OutcomeUnknown,
    ProtocolError,
    VMGone,
)
from utilityvm.guests.bridge_client import BridgeClient
from utilityvm.log import logger
from utilityvm.scsi.ports import CallerKey, MountConfig, ScratchKey
from utilityvm.scsi.slot import MAX_CONTROLLERS, Slot

_log = logger(__name__)

_ANSWER_S: Final = 2.0  # the agent keeps the caller's deadline itself; this long we wait for it to say so
_INPUT_CHUNK_BYTES: Final = 32768

OutputSink: TypeAlias = Callable[[bytes], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandResult:
    """How a program in the guest ended. `exit_code` is negative for the signal that killed it."""

    exit_code: int
    stdout: bytes
    stderr: bytes


class _Program:
    """A program that runs in the guest, as seen from here."""

    def __init__(self, stdout: OutputSink, stderr: OutputSink) -> None:
        self._sinks = {"out": stdout, "err": stderr}
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def take(self, stream: str, data: bytes) -> None:
        self._sinks[stream](data)


class BridgeGuest:
    """Implements `scsi.ports.GuestBackend` on one VM. Use `connect`."""

    def __init__(self, path: Path | None, *, vm: str | None = None) -> None:
        self._path = path
        self._vm = vm
        self._client: BridgeClient | None = None
        self._connecting = asyncio.Lock()
        self._programs: dict[int, _Program] = {}
        self._early: dict[int, list[tuple[int, dict[str, Any]]]] = {}  # of programs whose number is under way to us

    @classmethod
    async def connect(cls, path: Path, *, timeout_s: float, vm: str | None = None) -> BridgeGuest:
        """A backend on the guest behind the Unix socket `path`, which has answered.

        Raises:
            DeadlineExceeded: it did not answer within `timeout_s` seconds.
            VMGone: nobody listens there.
            ProtocolError: what answers does not speak our protocol.
        """
        guest = cls(path, vm=vm)
        await guest._connected(timeout_s)
        return guest

    @classmethod
    async def over(
        cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, timeout_s: float, vm: str | None = None
    ) -> BridgeGuest:
        """A backend on a guest that is connected already, such as one that dialled us."""
        guest = cls(None, vm=vm)
        guest._client = await BridgeClient.over(
            reader, writer, timeout_s=timeout_s, vm=vm, on_notify=guest._take_notification
        )
        return guest

    async def close(self) -> None:
        """Hang up. Programs that we run in the guest end; mounts stay."""
        if self._client:
            await self._client.close()

    @property
    def has_our_agent(self) -> bool:
        """Does our own agent answer, and not another guest of the same protocol?"""
        return self._client is not None and messages.EXTENSION in self._client.capabilities

    @property
    def boot_id(self) -> str | None:
        """The kernel's id of this boot of the guest, as it was when we connected."""
        about = self._client.capabilities.get(messages.EXTENSION, {}) if self._client else {}
        return about.get("BootId")

    # The GuestBackend protocol.

    def check(self, slot: Slot | None, config: MountConfig | None) -> None:
        """Refuse what this guest cannot be told. See `GuestBackend.check`."""
        if slot is not None and not 0 <= slot.controller < MAX_CONTROLLERS:
            raise NotSupported(f"a guest knows controllers 0 to {MAX_CONTROLLERS - 1}", vm=self._vm, slot=slot)
        if config is None or self.has_our_agent:
            return
        for wanted, what in (
            (isinstance(config.encryption, CallerKey), "a key of the caller's"),
            (config.verity, "dm-verity"),
            (config.reformat, "reformatting"),
        ):
            if wanted:
                raise NotSupported(
                    f"this guest's agent knows no {what}", vm=self._vm, remedy="use utilityvm's guest image"
                )

    async def mount(self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float) -> None:
        """See `GuestBackend.mount`."""
        self.check(slot, config)
        await self._modify("Add", "MappedVirtualDisk", _settings(slot, config, guest_path, add=True), slot, timeout_s)

    async def unmount(
        self, slot: Slot, config: MountConfig, *, guest_path: PurePosixPath, timeout_s: float, force: bool
    ) -> None:
        """See `GuestBackend.unmount`."""
        settings = _settings(slot, config, guest_path, add=False)
        await self._modify("Remove", "MappedVirtualDisk", settings, slot, timeout_s, force=force)

    async def eject(self, slot: Slot, *, timeout_s: float, force: bool) -> None:
        """See `GuestBackend.eject`."""
        settings = _nonzero({"Controller": slot.controller, "Lun": slot.lun})
        await self._modify("Remove", "SCSIDevice", settings, slot, timeout_s, force=force)

    async def probe_mount(self, slot: Slot, *, guest_path: PurePosixPath, timeout_s: float) -> bool:
        """See `GuestBackend.probe_mount`."""
        return str(guest_path) in (await self._probe(slot, timeout_s))["MountPaths"]

    async def probe_device(self, slot: Slot, *, timeout_s: float) -> bool:
        """See `GuestBackend.probe_device`."""
        return bool((await self._probe(slot, timeout_s))["Present"])

    async def grow(self, slot: Slot, *, mounts: Sequence[tuple[MountConfig, PurePosixPath]], timeout_s: float) -> None:
        """See `GuestBackend.grow`."""
        body = messages.request(Controller=slot.controller, Lun=slot.lun)
        await self._ask(messages.GROW, body, slot, timeout_s)

    # What else the agent does.

    async def ping(self, *, timeout_s: float = 10.0) -> None:
        """Return when the agent has answered.

        Raises:
            DeadlineExceeded, VMGone: it did not.
        """
        await self._ask(messages.PING, messages.request(), None, timeout_s)

    async def mounts(self, *, timeout_s: float = 10.0) -> list[dict[str, Any]]:
        """What the agent has mounted, as it tells it."""
        answer = await self._ask(messages.MOUNTS, messages.request(), None, timeout_s)
        mounts: list[dict[str, Any]] = answer["Mounts"]
        return mounts

    async def shutdown(self, *, timeout_s: float = 10.0) -> None:
        """Have the guest write out everything and power off. It may be gone before it answers: that is no error."""
        with contextlib.suppress(VMGone):
            await self._ask(messages.SHUTDOWN, messages.request(), None, timeout_s)

    async def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        timeout_s: float | None = None,
    ) -> CommandResult:
        """Run a program to its end. Cancelled or out of time, it is killed with all that it started.

        Raises:
            GuestRefused: it could not be started.
            DeadlineExceeded: it did not end within `timeout_s` seconds.
            VMGone: the guest went first.
        """
        stdout, stderr = bytearray(), bytearray()

        async def given() -> AsyncIterator[bytes]:
            if stdin:
                yield stdin

        exit_code = await self.run_streaming(
            command,
            stdin=None if stdin is None else given(),
            stdout=stdout.extend,
            stderr=stderr.extend,
            env=env,
            cwd=cwd,
            timeout_s=timeout_s,
        )
        return CommandResult(exit_code=exit_code, stdout=bytes(stdout), stderr=bytes(stderr))

    async def run_streaming(
        self,
        command: Sequence[str],
        *,
        stdin: AsyncIterator[bytes] | None = None,
        stdout: OutputSink,
        stderr: OutputSink,
        env: Mapping[str, str] | None = None,
        cwd: PurePosixPath | str | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Like `run`, with input and output as they come; gives the exit code."""
        body = messages.request(Argv=list(command), Env=dict(env or {}), Cwd=str(cwd or ""), Stdin=stdin is not None)
        number: int = (await self._ask(messages.RUN, body, None, 30.0))["Process"]
        program = _Program(stdout, stderr)
        self._programs[number] = program
        for kind, notification in self._early.pop(number, []):
            self._take_notification(kind, notification)
        client = self._client
        assert client is not None
        feeding = asyncio.create_task(self._feed(number, stdin)) if stdin is not None else None
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wait({program.ended, client.gone}, return_when=asyncio.FIRST_COMPLETED)
            if not program.ended.done():
                raise VMGone(f"the guest went while {command[0]} ran: {client.gone.result()}", vm=self._vm)
            return program.ended.result()
        except TimeoutError:
            raise DeadlineExceeded(
                f"{command[0]} did not end within {timeout_s} s and was killed", vm=self._vm
            ) from None
        finally:
            self._programs.pop(number, None)
            if feeding:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
            if not program.ended.done() and not client.gone.done():
                with contextlib.suppress(Exception):
                    await asyncio.shield(
                        self._ask(messages.RUN_SIGNAL, messages.request(Process=number, Signal=9), None, 5)
                    )

    async def _feed(self, number: int, stdin: AsyncIterator[bytes]) -> None:
        try:
            async for data in stdin:
                for begin in range(0, len(data), _INPUT_CHUNK_BYTES):
                    chunk = base64.b64encode(data[begin : begin + _INPUT_CHUNK_BYTES]).decode()
                    await self._ask(messages.RUN_INPUT, messages.request(Process=number, Data=chunk), None, 3600)
            await self._ask(messages.RUN_INPUT, messages.request(Process=number, Data="", Eof=True), None, 3600)
        except GuestRefused:
            pass  # it ended without reading on

    def _take_notification(self, kind: int, body: dict[str, Any]) -> None:
        number = body.get("Process", 0)
        program = self._programs.get(number)
        if program is None:
            self._early.setdefault(number, []).append((kind, body))
            while len(self._early) > 64:  # of programs that we gave up
                self._early.pop(next(iter(self._early)))
            return
        if kind == messages.RUN_OUTPUT:
            data = base64.b64decode(body["Data"])
            program.take(body["Stream"], data)
            assert self._client is not None
            self._client.notify(messages.RUN_CREDIT, {"Process": number, "Bytes": len(data)})
        elif kind == messages.RUN_EXIT and not program.ended.done():
            program.ended.set_result(int(body["ExitCode"]))

    async def _connected(self, timeout_s: float) -> BridgeClient:
        """The connection; made anew if the agent was restarted."""
        async with self._connecting:
            if self._client is not None and not self._client.gone.done():
                return self._client
            if self._path is None:
                raise VMGone("the guest hung up", vm=self._vm)
            if self._client is not None:
                await self._client.close()
            self._client = await BridgeClient.connect(
                self._path, timeout_s=timeout_s, vm=self._vm, on_notify=self._take_notification
            )
            return self._client

    async def _probe(self, slot: Slot, timeout_s: float) -> dict[str, Any]:
        if not self.has_our_agent:
            raise OutcomeUnknown("this guest's agent cannot be asked what it has mounted", vm=self._vm, slot=slot)
        body = messages.request(Controller=slot.controller, Lun=slot.lun)
        return await self._ask(messages.PROBE, body, slot, timeout_s)

    async def _modify(
        self,
        request_type: str,
        resource_type: str,
        settings: dict[str, Any],
        slot: Slot,
        timeout_s: float,
        *,
        force: bool = False,
    ) -> None:
        if force and not self.has_our_agent:
            raise NotSupported("this guest's agent knows no force", vm=self._vm, slot=slot)
        extension: dict[str, Any] = {}
        if self.has_our_agent:
            extension = {"TimeoutMs": int(timeout_s * 1000), **({"Force": True} if force else {})}
        body = messages.modify_request(request_type, resource_type, settings, extension=extension)
        await self._ask(messages.MODIFY, body, slot, timeout_s)

    async def _ask(self, kind: int, body: dict[str, Any], slot: Slot | None, timeout_s: float) -> dict[str, Any]:
        client = await self._connected(timeout_s)
        answer = await client.request(kind, body, timeout_s=timeout_s + _ANSWER_S)
        if not answer.get("Result", 0):
            return answer
        text = str(answer.get("ErrorMessage") or f"HRESULT {answer['Result'] & 0xFFFFFFFF:#010x}")
        extension = answer.get(messages.EXTENSION)
        fault = extension if isinstance(extension, dict) else {}
        where = f"{slot}: {text}" if slot else text
        match fault.get("Kind"):
            case "busy":
                raise GuestBusy(
                    where,
                    holders=[str(holder) for holder in fault.get("Holders", [])],
                    vm=self._vm,
                    slot=slot,
                    remedy="end what uses it, or force it",
                )
            case "timeout":
                raise DeadlineExceeded(where, vm=self._vm, slot=slot)
            case "unknown":
                raise ProtocolError(where, message=answer, vm=self._vm)
            case "invalid":
                raise GuestRefused(where, vm=self._vm, slot=slot)
            case _:
                raise GuestRefused(where, vm=self._vm, slot=slot)


def _nonzero(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value}


def _settings(slot: Slot, config: MountConfig, guest_path: PurePosixPath, *, add: bool) -> dict[str, Any]:
    """The settings of a MappedVirtualDisk, in GCS's order and without its zeros."""
    settings = _nonzero(
        {
            "MountPath": str(guest_path),
            "Lun": slot.lun,
            "Controller": slot.controller,
            "Partition": config.partition,
            "ReadOnly": config.read_only,
            "Encrypted": isinstance(config.encryption, ScratchKey),
            "Options": list(config.options) if add else [],
            "BlockDev": config.block_device,
            "EnsureFilesystem": config.ensure_filesystem if add else False,
            "Filesystem": config.filesystem if add else None,
        }
    )
    if add and (extension := _extension(config)):
        settings[messages.EXTENSION] = extension
    return settings


def _extension(config: MountConfig) -> dict[str, Any]:
    extension: dict[str, Any] = {}
    if isinstance(config.encryption, CallerKey):
        if len(config.encryption.key) not in (32, 64):
            raise InvalidRequest(
                f"an encryption key of {len(config.encryption.key)} bytes", remedy="aes-xts takes 32 or 64"
            )
        extension["Key"] = base64.b64encode(config.encryption.key).decode()
    if config.reformat:
        extension["Reformat"] = True
    if verity := config.verity:
        extension["Verity"] = {
            "RootHash": verity.root_hash.hex(),
            "HashOffset": verity.hash_offset_bytes,
            **({"DataBlocks": verity.data_blocks} if verity.data_blocks is not None else {}),
            **({"Salt": verity.salt.hex()} if verity.salt is not None else {}),
            **({"Algorithm": verity.algorithm} if verity.algorithm is not None else {}),
            **({"BlockSize": verity.block_size_bytes} if verity.block_size_bytes is not None else {}),
        }
    return extension
