"""A method for each call of the server, with the types that go over the wire. `remote` has the verbs for callers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from utilityvm.client.wire import ANSWER_S, Answer, Call, Wire, own_id
from utilityvm.errors import (
    AlreadyReleased,
    DeadlineExceeded,
    InvalidRequest,
    NotAttached,
    OutcomeUnknown,
    ProtocolError,
    UtilityVMError,
    VMNotFound,
)
from utilityvm.server import problems, types

if TYPE_CHECKING:
    from utilityvm.scsi.reservation import ForceArgument

T = TypeVar("T")

_OCTETS: Final = "application/octet-stream"
_FAILURE: Final = 400
_HEADER: Final = 8  # bytes of a frame of output; see server/programs.py
_LOG_HEADER: Final = 16  # and of one of a log; see server/logs.py
STDOUT, STDERR, ENDED, FAILED = 1, 2, 3, 4
_FINDINGS: Final = b"utilityvm-findings"
_UNDO_S: Final = 10.0
_KEPT_S: Final = 60.0  # as `UtilityVM.start_program`
DETACHED_S: Final = 15.0  # an end of a VM: the time that its guest has
TRIES_OF_OUTPUT: Final = 3


class Api:
    """The server's calls. Each raises the error that the server has, and what `Wire.ask` raises."""

    def __init__(self, wire: Wire, *, on_finding: Callable[[str], object] = lambda line: None) -> None:
        """`on_finding` gets what the server found half done when it took a VM over for us, a line each."""
        self._wire = wire
        self._on_finding = on_finding

    async def info(self) -> types.ServerInfo:
        return await self._get("/v1", types.ServerInfo)

    async def vms(self) -> list[types.VM]:
        return await self._get("/v1/vms", list[types.VM])

    async def vm(self, name: str, *, wait_s: float, needs_guest: bool = True) -> types.VM:
        """Have the server own the VM. See `UtilityVM.open` for the errors."""
        return await self._get(_of(name), types.VM, wait_s=wait_s, needs_guest=_flag(needs_guest))

    async def disks(self, name: str, *, wait_s: float = 0.0, needs_guest: bool = True) -> list[types.Disk]:
        return await self._get(f"{_of(name)}/disks", list[types.Disk], wait_s=wait_s, needs_guest=_flag(needs_guest))

    async def find(self, name: str, disk: str, *, wait_s: float = 0.0, needs_guest: bool = True) -> types.Found:
        flag = _flag(needs_guest)
        return await self._get(f"{_of(name)}/disk", types.Found, wait_s=wait_s, needs_guest=flag, name=disk)

    async def mounts(self, name: str, *, wait_s: float = 0.0) -> list[types.Mount]:
        return await self._get(f"{_of(name)}/mounts", list[types.Mount], wait_s=wait_s)

    async def reservations(
        self, name: str, *, wait_s: float = 0.0, needs_guest: bool = True
    ) -> list[types.Reservation]:
        target = f"{_of(name)}/reservations"
        return await self._get(target, list[types.Reservation], wait_s=wait_s, needs_guest=_flag(needs_guest))

    async def stop(
        self, name: str, *, wait_s: float = 0.0, force: bool = False, timeout_s: float = DETACHED_S
    ) -> list[str]:
        """End the VM; says what was lost, a line each."""
        call = _call(
            "DELETE", _of(name), within_s=wait_s + timeout_s, wait_s=wait_s, force=_flag(force), timeout_s=timeout_s
        )
        try:
            return (await self._decoded(call, types.Stopped)).lost
        except VMNotFound:
            if call.is_retry:
                return []  # the first try ended it
            raise

    async def add(
        self, name: str, disk: types.AddDisk, *, id: str | None = None, wait_s: float = 0.0
    ) -> types.Reservation:
        """Reserve a disk under an id; None: a new one. Interrupted or cancelled, it is undone before this returns."""
        id = id or own_id()
        call = _call(
            "PUT",
            f"{_of(name)}/reservations/{id}",
            body=msgspec.json.encode(disk),
            within_s=wait_s + disk.timeout_s,
            wait_s=wait_s,
        )
        try:
            return await self._decoded(call, types.Reservation)
        except Exception:
            raise
        except BaseException:  # the server undoes it because we hang up
            taking_back = _call("DELETE", f"{_of(name)}/reservations/{id}", timeout_s=_UNDO_S)
            taking_back.timeout_s = _UNDO_S
            with suppress(UtilityVMError, OSError, EOFError):
                await self._done(taking_back)
            raise

    async def release(
        self, name: str, reservation: str, *, force: ForceArgument = False, timeout_s: float = 60.0, wait_s: float = 0.0
    ) -> types.Released:
        call = _call(
            "DELETE",
            f"{_of(name)}/reservations/{quote(reservation, safe='')}",
            within_s=wait_s + timeout_s,
            wait_s=wait_s,
            needs_guest=_flag(not force),
            force=_force(force),
            timeout_s=timeout_s,
        )
        try:
            return await self._decoded(call, types.Released)
        except (AlreadyReleased, NotAttached):
            if call.is_retry:
                return types.Released(host_path="", references=0)  # the first try gave it back
            raise

    async def remove(
        self,
        name: str,
        *,
        host_path: str,
        reservation: str | None = None,
        holder: str | None = None,
        force: ForceArgument = False,
        timeout_s: float = 60.0,
        wait_s: float = 0.0,
    ) -> types.Released:
        """Drop one reference to the disk: `reservation`, or the newest, or the newest of `holder`.

        Which one that is, is settled before it is asked for: asked again, no second one is dropped.

        Raises:
            NotAttached: the disk is not attached, or `holder` has no reservation on it.
            others: as `UtilityVM.remove_scsi`.
        """
        found = await self.find(name, host_path, wait_s=wait_s, needs_guest=not force)
        while True:
            held = [
                one
                for one in await self.reservations(name, wait_s=wait_s, needs_guest=not force)
                if one.slot == found.disk.slot
                and holder in (None, one.holder)
                and found.guest_path in (None, one.guest_path)
            ]
            chosen = reservation or (held[-1].id if held else None)
            if chosen is None:  # what is left is a release that failed half-way, which goes on; or there is nothing
                return await self._go_on(name, host_path, holder, force=force, timeout_s=timeout_s, wait_s=wait_s)
            try:
                return await self.release(name, chosen, force=force, timeout_s=timeout_s, wait_s=wait_s)
            except (AlreadyReleased, NotAttached):
                if reservation is not None:
                    raise
                # Another client has just given back the same one: the next is ours.

    async def _go_on(
        self, name: str, host_path: str, holder: str | None, *, force: ForceArgument, timeout_s: float, wait_s: float
    ) -> types.Released:
        body = types.Remove(host_path=host_path, holder=holder, force=_force(force), timeout_s=timeout_s)
        call = _call(
            "POST",
            f"{_of(name)}/remove",
            body=msgspec.json.encode(body),
            within_s=wait_s + timeout_s,
            wait_s=wait_s,
            needs_guest=_flag(not force),
        )
        try:
            return await self._decoded(call, types.Released)
        except NotAttached:
            if call.is_retry:
                return types.Released(host_path=host_path, references=0)  # the first try did it
            raise

    async def resize(self, name: str, body: types.Resize, *, wait_s: float = 0.0) -> types.Disk:
        call = _call(
            "POST",
            f"{_of(name)}/resize",
            body=msgspec.json.encode(body),
            within_s=None if body.timeout_s is None else wait_s + body.timeout_s,
            wait_s=wait_s,
        )
        try:
            return await self._decoded(call, types.Disk)
        except InvalidRequest:
            for disk in await self.disks(name, wait_s=wait_s) if call.is_retry else []:
                if disk.host_path == body.host_path and disk.size_bytes == body.size_bytes:
                    return disk  # the first try did it
            raise

    async def start_program(
        self, name: str, id: str, program: types.RunProgram, *, wait_s: float = 0.0
    ) -> types.Program:
        """Start the program. A start whose answer is lost is not tried again: another server knows nothing of it.

        Raises:
            OutcomeUnknown: the server ended; the program was killed, if it was started.
        """
        call = _call(
            "PUT",
            f"{_of(name)}/programs/{id}",
            body=msgspec.json.encode(program),
            within_s=wait_s + ANSWER_S,
            wait_s=wait_s,
        )
        call.once = True
        try:
            return await self._decoded(call, types.Program)
        except DeadlineExceeded:
            raise
        except OutcomeUnknown as error:
            raise _killed(name) from error

    async def feed(self, name: str, id: str, data: bytes, *, at: int, last: bool = False) -> None:
        """Give the program input; returns when it took it, or has ended."""
        call = _call("PUT", f"{_of(name)}/programs/{id}/input", body=data, within_s=None, at=str(at), last=_flag(last))
        call.content_type = _OCTETS
        await self._done(call)

    async def keep_program(self, name: str, program: types.RunProgram, *, wait_s: float = 0.0) -> types.KeptProgram:
        """Start a program that the guest keeps."""
        call = _call(
            "PUT",
            f"{_of(name)}/programs/{own_id()}",
            body=msgspec.json.encode(program),
            within_s=wait_s + _KEPT_S,
            wait_s=wait_s,
        )
        return _kept(await self._decoded(call, types.Program))

    async def kept_programs(self, name: str, *, wait_s: float = 0.0) -> list[types.KeptProgram]:
        return await self._get(f"{_of(name)}/programs", list[types.KeptProgram], wait_s=wait_s)

    async def kept_program(self, name: str, which: int | str, *, wait_s: float = 0.0) -> types.KeptProgram:
        return _kept(await self._get(_program(name, which), types.Program, wait_s=wait_s))

    async def signal(self, name: str, which: int | str, number: int, *, wait_s: float = 0.0) -> None:
        """Send a signal to a program that the guest keeps. If the answer is lost it is not sent again."""
        body = msgspec.json.encode(types.Signal(signal=number))
        call = _call("POST", f"{_program(name, which)}/signal", body=body, within_s=wait_s + _KEPT_S, wait_s=wait_s)
        call.once = True
        await self._done(call)

    async def kill(self, name: str, which: int | str, *, wait_s: float = 0.0) -> None:
        await self._done(_call("DELETE", _program(name, which), within_s=wait_s + _KEPT_S, wait_s=wait_s))

    async def log(
        self, name: str, which: int | str, *, stdout: int = 0, stderr: int = 0, live: bool = True, wait_s: float = 0.0
    ) -> AsyncIterator[tuple[int, int, bytes]]:
        """What a program that the guest keeps has written, as frames: the stream, the place in it, the bytes.

        The last one is of ENDED. A connection that breaks is made again, from where it was.
        """
        at = {STDOUT: stdout, STDERR: stderr}
        for _ in range(TRIES_OF_OUTPUT):
            target, flag = f"{_program(name, which)}/log", _flag(live)
            call = _call("GET", target, within_s=None, stdout=at[STDOUT], stderr=at[STDERR], live=flag, wait_s=wait_s)
            answer = await self._wire.ask(call)
            if answer.status >= _FAILURE:
                await _refuse(answer)
            self._tell_findings(answer)
            try:
                async for head, payload in _frames(answer.pieces, _LOG_HEADER):
                    stream, place = head[0], int.from_bytes(head[8:], "big")
                    if stream == FAILED:
                        raise problems.error_of(msgspec.json.decode(payload, type=types.Problem))
                    at[stream] = place + len(payload)
                    yield stream, place, payload
                    if stream == ENDED:
                        return
            except (OSError, EOFError):
                continue
            finally:
                await answer.pieces.aclose()  # type: ignore[attr-defined]
        raise OutcomeUnknown(f"following program {which} broke off", vm=name, remedy="call again: the program goes on")

    async def output(self, name: str, id: str) -> AsyncIterator[tuple[int, bytes]]:
        """The program's output as it comes: the stream, and a piece of it. The last piece is of ENDED or FAILED.

        A connection that breaks is made again, and no byte is lost or comes twice.

        Raises:
            OutcomeUnknown: the server ended, and the program with it.
        """
        at, rest = 0, bytearray()  # a frame that is not whole yet
        for _ in range(TRIES_OF_OUTPUT):
            call = _call("GET", f"{_of(name)}/programs/{id}/output", within_s=None, at=str(at))
            try:
                answer = await self._wire.ask(call)
                if answer.status >= _FAILURE:
                    await _refuse(answer)
            except (NotAttached, VMNotFound) as error:
                raise _killed(name) from error
            try:
                async for piece in answer.pieces:
                    at += len(piece)
                    rest += piece
                    while len(rest) >= _HEADER:
                        end = _HEADER + int.from_bytes(rest[4:_HEADER], "big")
                        if len(rest) < end:
                            break
                        stream, payload = rest[0], bytes(rest[_HEADER:end])
                        del rest[:end]
                        yield stream, payload
                        if stream in (ENDED, FAILED):
                            return
            except (OSError, EOFError):
                continue
            finally:
                await answer.pieces.aclose()  # type: ignore[attr-defined]
        raise _killed(name)

    async def _get(self, target: str, kind: type[T], *, wait_s: float | None = None, **more: str) -> T:
        query: dict[str, Any] = {**more} if wait_s is None else {"wait_s": wait_s, **more}
        # A VM that is taken over: the server looks through its disks first.
        return await self._decoded(_call("GET", target, within_s=(wait_s or 0.0) + 60.0, **query), kind)

    async def _decoded(self, call: Call, kind: type[T]) -> T:
        content = await self._done(call)
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"the server's answer cannot be read: {error}", message=content[:400]) from error

    async def _done(self, call: Call) -> bytes:
        for _ in range(3):
            try:
                answer = await self._wire.ask(call)
                if answer.status >= _FAILURE:
                    await _refuse(answer)
                self._tell_findings(answer)
                return await answer.content()
            except (OSError, EOFError):
                call.is_retry = True  # the answer broke off
                if call.once:
                    break
        raise OutcomeUnknown("the server ended before its answer was whole")

    def _tell_findings(self, answer: Answer) -> None:
        for line in msgspec.json.decode(answer.headers.get(_FINDINGS, b"[]"), type=list[str]):
            self._on_finding(line)

    def close(self) -> None:
        self._wire.close()


async def _frames(pieces: AsyncIterator[bytes], header: int) -> AsyncIterator[tuple[bytes, bytes]]:
    """The header and the payload of each frame."""
    rest = bytearray()
    async for piece in pieces:
        rest += piece
        while len(rest) >= header:
            end = header + int.from_bytes(rest[4:8], "big")
            if len(rest) < end:
                break
            frame = bytes(rest[:end])
            del rest[:end]
            yield frame[:header], frame[header:]


def _kept(program: types.Program) -> types.KeptProgram:
    if program.kept is None:
        raise ProtocolError("the server's answer says nothing of the program")
    return program.kept


def _program(name: str, which: int | str) -> str:
    return f"{_of(name)}/programs/{quote(str(which), safe='')}"


def _call(method: str, target: str, *, body: bytes = b"", within_s: float | None = 0.0, **query: object) -> Call:
    timeout_s = None if within_s is None else within_s + ANSWER_S
    query_text = f"?{urlencode(query)}" if query else ""
    return Call(method=method, target=target + query_text, body=body, timeout_s=timeout_s)


async def _refuse(answer: Answer) -> None:
    content = await answer.content()
    try:
        problem = msgspec.json.decode(content, type=types.Problem)
    except msgspec.DecodeError:
        raise UtilityVMError(f"the server answered {answer.status}: {content[:200].decode(errors='replace')}") from None
    raise problems.error_of(problem)


def _killed(name: str) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"the server ended while a program ran in VM {name}, so the program was killed",
        vm=name,
        remedy="look at what it has done, and start it again",
    )


def _of(name: str) -> str:
    return f"/v1/vms/{quote(name, safe='')}"


def _force(force: ForceArgument) -> types.Force:
    return "host" if force == "host" else "true" if force else "false"


def _flag(value: bool) -> str:
    return "true" if value else "false"
