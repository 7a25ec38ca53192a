"""Programs that clients run in guests: input and output in pieces that have a place, so that each can be sent again.

The output is one stream of frames, of which the last that were read are kept: a client whose connection broke goes on
from the byte that it has. A frame is eight bytes and its payload, as the Docker Engine's attach streams have it: the
stream, three zero bytes, and the length as 32 bits, the highest first.

    1  standard output
    2  standard error
    3  the end: a `Program` as JSON
    4  the end: a `Problem` as JSON, because it could not be started, or was ended

The program is killed when nobody has read its output for a moment: its client is gone.

Source: https://docs.docker.com/reference/api/engine/ "Attach to a container", stream format.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Final

import msgspec

from utilityvm.errors import InvalidRequest, NotAttached, UtilityVMError, WrongState
from utilityvm.guests.program import Limits
from utilityvm.log import logger
from utilityvm.server.keeper import Keeper
from utilityvm.server.problems import problem_of
from utilityvm.server.types import Program, RunProgram, kept_of

HEADER: Final = struct.Struct(">B3xI")
STDOUT, STDERR, ENDED, FAILED = 1, 2, 3, 4
WINDOW_BYTES: Final = 256 * 1024  # that the program may be ahead of its reader, and that are kept for another one
ORPHAN_S: Final = 1.0  # without a reader, after there was one
NEVER_READ_S: Final = 30.0
KEPT_S: Final = 30.0  # after its end
MOST: Final = 4096

_log = logger(__name__)


class _Output:
    """The frames; bytes from `_start` on are there."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._start = 0
        self._read_to = 0
        self._changed = asyncio.Condition()
        self.is_over = False

    @property
    def _end(self) -> int:
        return self._start + len(self._kept)

    @property
    def is_read(self) -> bool:
        return self.is_over and self._read_to >= self._end

    async def put(self, stream: int, data: bytes, *, last: bool = False) -> None:
        """Wait until there is room: so the program is held back. The last frame finds room always."""
        async with self._changed:
            while not last and self._end - self._read_to > WINDOW_BYTES:
                await self._changed.wait()
            self._kept += HEADER.pack(stream, len(data)) + data
            self.is_over = last
            too_many = min(self._end - WINDOW_BYTES, self._read_to) - self._start
            if too_many > 0:
                del self._kept[:too_many]
                self._start += too_many
            self._changed.notify_all()

    async def read(self, at: int) -> AsyncIterator[bytes]:
        """What there is from `at` on, as it comes, to the end. A piece counts as read when the next one is asked for.

        Raises:
            InvalidRequest: it is not kept any more, or is not there yet.
        """
        if not self._start <= at <= self._end:
            raise InvalidRequest(f"the output is kept from byte {self._start} to {self._end}, and {at} is not in there")
        while True:
            async with self._changed:
                while at >= self._end and not self.is_over:
                    await self._changed.wait()
                piece = bytes(self._kept[at - self._start :])
            if piece:
                yield piece
            at += len(piece)
            async with self._changed:
                self._read_to = max(self._read_to, at)
                self._changed.notify_all()
                if self.is_over and at >= self._end:
                    return


class _Run:
    """One program."""

    def __init__(self, id: str, vm: str) -> None:
        self.id = id
        self.vm = vm
        self.output = _Output()
        self.answer = Program(id=id, state="running")
        self.task: asyncio.Task[None] | None = None
        self.readers = 0
        self.orphaned: asyncio.TimerHandle | None = None
        self._taken = 0  # bytes of input
        self._input: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)
        self._feeding = asyncio.Lock()

    async def feed(self, data: bytes, *, at: int, last: bool) -> None:
        """Input from byte `at` on. What was taken before is left out: the same piece may come again.

        Raises:
            WrongState: bytes before it are missing.
        """
        async with self._feeding:
            if at > self._taken:
                raise WrongState(f"the input is there to byte {self._taken}, and this is from {at} on", vm=self.vm)
            new = data[self._taken - at :]
            if new:
                await self._hand_on(new)
                self._taken += len(new)
            if last:
                await self._hand_on(b"")

    async def _hand_on(self, data: bytes) -> None:
        """Wait until the program takes it, or ends: then nobody misses it."""
        assert self.task is not None
        putting = asyncio.ensure_future(self._input.put(data))
        try:
            await asyncio.wait([putting, self.task], return_when=asyncio.FIRST_COMPLETED)
        finally:
            putting.cancel()

    async def input(self) -> AsyncIterator[bytes]:
        while data := await self._input.get():
            yield data


class Programs:
    """The programs that run, and those that ended just now."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._runs: dict[tuple[str, str], _Run] = {}

    @property
    def is_idle(self) -> bool:
        return all(run.answer.state != "running" for run in self._runs.values())

    async def start(self, vm: str, id: str, what: RunProgram, *, wait_s: float) -> Program:
        """Start it, unless a request of that id did before. Returns when the VM is there; the end is in the output.

        Raises:
            VMNotFound, VMNotRunning, VMOwned: as `Keeper.use`. Nothing was started.
        """
        if what.keep:
            return await self._keep(vm, id, what, wait_s=wait_s)
        if what.name is not None:
            raise InvalidRequest("only a program that is kept has a name", vm=vm)
        run = self._runs.get((vm, id))
        if run is None:
            if len(self._runs) >= MOST:
                raise WrongState(f"{len(self._runs)} programs run already", vm=vm, remedy="wait until one has ended")
            run = self._runs[vm, id] = _Run(id, vm)
            begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            run.task = asyncio.create_task(self._run(run, what, wait_s, begun), name=f"program {id}")
            self._expect_reader(run, NEVER_READ_S)
            await begun
        return run.answer

    async def _keep(self, vm: str, id: str, what: RunProgram, *, wait_s: float) -> Program:
        if what.stdin or what.timeout_s is not None:
            raise InvalidRequest("a program that is kept has no input and no time here", vm=vm)
        async with self._keeper.use(vm, wait_s=wait_s) as owned:
            kept = await owned.start_program(
                what.command,
                env=what.env,
                cwd=what.cwd,
                user=what.user,
                limits=_limits(what),
                name=what.name,
                id=id,
                follow=False,
            )
            return Program(id=id, state="running", kept=kept_of(kept.info))

    async def _run(self, run: _Run, what: RunProgram, wait_s: float, begun: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with self._keeper.use(run.vm, wait_s=wait_s) as vm:
                if not begun.done():
                    begun.set_result(None)
                code = await vm.run_streaming(
                    what.command,
                    stdin=run.input() if what.stdin else None,
                    stdout=lambda data: run.output.put(STDOUT, data),
                    stderr=lambda data: run.output.put(STDERR, data),
                    env=what.env,
                    cwd=what.cwd,
                    user=what.user,
                    limits=_limits(what),
                    timeout_s=what.timeout_s,
                )
            run.answer = Program(id=run.id, state="ended", exit_code=code)
            await run.output.put(ENDED, msgspec.json.encode(run.answer), last=True)
        except BaseException as error:
            run.answer = Program(id=run.id, state="failed")
            failure = error if isinstance(error, UtilityVMError) else UtilityVMError("the program was ended", vm=run.vm)
            if not isinstance(error, (UtilityVMError, asyncio.CancelledError)):
                _log.error("program %s: %r", run.id, error)
            if not begun.done():
                begun.set_exception(failure)
                self._runs.pop((run.vm, run.id), None)
                return
            await run.output.put(FAILED, msgspec.json.encode(problem_of(failure)), last=True)
            if not isinstance(error, Exception):
                raise
        finally:
            loop.call_later(KEPT_S, self._runs.pop, (run.vm, run.id), None)

    def _find(self, vm: str, id: str) -> _Run:
        run = self._runs.get((vm, id))
        if run is None:
            raise NotAttached(
                f"no program {id} runs in VM {vm}",
                vm=vm,
                remedy="if its server was ended meanwhile, so was the program",
            )
        return run

    def get(self, vm: str, id: str) -> Program:
        return self._find(vm, id).answer

    async def read(self, vm: str, id: str, at: int) -> AsyncIterator[bytes]:
        """The frames from byte `at` on. Its caller has to close it."""
        run = self._find(vm, id)
        run.readers += 1
        if run.orphaned is not None:
            run.orphaned.cancel()
        try:
            async for piece in run.output.read(at):
                yield piece
        finally:
            run.readers -= 1
            if not run.readers:
                self._expect_reader(run, ORPHAN_S)

    def _expect_reader(self, run: _Run, seconds: float) -> None:
        assert run.task is not None
        run.orphaned = asyncio.get_running_loop().call_later(seconds, run.task.cancel)

    async def feed(self, vm: str, id: str, data: bytes, *, at: int, last: bool) -> None:
        await self._find(vm, id).feed(data, at=at, last=last)

    def has(self, vm: str, which: str) -> bool:
        """Is that one of these? Otherwise the guest may keep it."""
        return (vm, which) in self._runs

    async def kill(self, vm: str, id: str) -> None:
        """Kill it with all that it started. Calling it again is no error."""
        run = self._find(vm, id)
        assert run.task is not None
        run.task.cancel()
        await asyncio.wait([run.task])


def _limits(what: RunProgram) -> Limits | None:
    return None if what.limits is None else Limits(**msgspec.structs.asdict(what.limits))
