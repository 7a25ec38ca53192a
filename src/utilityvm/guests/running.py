"""Programs that end with the connection: run in the guest, with their input and output on the bridge."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

from utilityvm.bridge import messages
from utilityvm.errors import (
    DeadlineExceeded,
    GuestRefused,
    NotSupported,
    ProtocolError,
    UtilityVMError,
)
from utilityvm.guests.bridge_client import BridgeClient, NotNegotiated, again
from utilityvm.guests.program import CommandResult, GuestProgram, Limits, OutputSink, run_request
from utilityvm.guests.session import ANSWER_S, GuestSession
from utilityvm.machine.oserrors import raises_callers_errors, typed_errors

_START_S: Final = 30.0  # for a program to be started
MAX_OUTPUT_BYTES: Final = 64 << 20
_MAX_RESTARTS: Final = 8  # of the agent, right when a program was to be started
_TERMINALS_SINCE: Final = 4  # of the agent's versions
_PROGRAMS_SINCE: Final = 3  # of the agent's versions: kept programs, users and limits


@typed_errors
class GuestPrograms(GuestSession):
    """The part of `BridgeGuest` that runs programs. `KeptPrograms` has those that outlive a connection."""

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
            self._checked(await client.request(messages.RUN, body, timeout_s=_START_S + ANSWER_S), None)
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
