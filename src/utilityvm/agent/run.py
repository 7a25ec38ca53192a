"""Programs that the host runs in the guest: their input, output and end, as messages.

One thread a program moves its bytes; nothing that the host or the program does makes it hold more than a window of
them. A program has a cgroup of its own, so that it can be killed with all that it started.

A program has ended when its own process has. What it wrote before is told, and what its children write to the same
output in the half second after it; what they write later is dropped. They go on, unless the program was cancelled.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import os
import select
import struct
import subprocess
import termios
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from utilityvm.agent import cgroups, drain
from utilityvm.agent.faults import Fault
from utilityvm.agent.launch import ENVIRONMENT, start, why
from utilityvm.bridge import messages

AT_MOST: Final = 256  # programs at once
_MAX_SIGNAL: Final = 64  # SIGRTMAX
_SHOWN: Final = 100  # characters of a command
_LINGER_S: Final = 0.5  # for what the children of a program that has ended write to its output
_DIE_S: Final = 5.0  # for what was killed to end
_INT: Final = struct.Struct("i")

Notify = Callable[[int, dict[str, Any]], object]


class Programs:
    """The programs of one session of the bridge. They end with it."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._lock = threading.Lock()
        self._known: dict[int, Program] = {}
        self._has_ended = False

    def take(self, body: dict[str, Any]) -> Program:
        """The program of a RUN request, not started; input and signals for it are kept until it is.

        Raises:
            Fault: the request is wrong, its number is taken, or too many programs run.
        """
        number = body.get("Process")
        if not isinstance(number, int) or isinstance(number, bool):
            raise Fault(f"Process {number!r} is no number", kind="invalid")
        program = Program(number, _Command(body), self._notify, self._forget)
        with self._lock:
            if number in self._known:
                raise Fault(f"process {number} runs already", kind="invalid")
            if len(self._known) >= AT_MOST:
                raise Fault(f"{AT_MOST} programs run already")
            self._known[number] = program
        return program

    def tell(self, kind: int, body: dict[str, Any]) -> None:
        """Pass on what the host says about a program. One that has ended takes nothing, which is no fault."""
        with self._lock:
            program = self._known.get(body.get("Process", 0))
        if program is None:
            return
        match kind:
            case messages.RUN_INPUT:
                program.feed(_bytes(body.get("Data")), last=body.get("Eof") is True)
            case messages.RUN_CREDIT:
                program.add_credit(_number(body.get("Bytes"), messages.OUTPUT_WINDOW_BYTES))
            case messages.RUN_SIGNAL:
                program.signal(_number(body.get("Signal"), _MAX_SIGNAL))
            case messages.RUN_CANCEL:
                program.cancel()

    def running(self) -> list[str]:
        """What runs, for people."""
        with self._lock:
            return [program.name for program in self._known.values()]

    def end_all(self) -> None:
        """The host is gone: kill every program."""
        with self._lock:
            programs = list(self._known.values())
        for program in programs:
            program.cancel()

    def _forget(self, number: int) -> None:
        with self._lock:
            self._known.pop(number, None)


class _Command:
    """What to run, as a RUN request says it."""

    def __init__(self, body: dict[str, Any]) -> None:
        argv, env, cwd = body.get("Argv"), body.get("Env") or {}, body.get("Cwd") or "/"
        if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
            raise Fault("Argv must be a list of words, and not empty", kind="invalid")
        if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
            raise Fault("Env must have a text for each name", kind="invalid")
        if not isinstance(cwd, str):
            raise Fault("Cwd must be a path", kind="invalid")
        self.argv: list[str] = argv
        self.env = {**ENVIRONMENT, **env}
        self.cwd = cwd
        self.takes_input = body.get("Stdin") is True

    def start(self, family: cgroups.Family) -> subprocess.Popen[bytes]:
        return start(
            self.argv,
            env=self.env,
            cwd=self.cwd,
            stdin=subprocess.PIPE if self.takes_input else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            family=family,
        )


class Program:
    """One program, from its request to its end."""

    def __init__(self, number: int, command: _Command, notify: Notify, forget: Callable[[int], None]) -> None:
        self._number = number
        self.name = f"process {number}: {command.argv[0][:_SHOWN]}"  # its arguments may be secrets
        self._command = command
        self._notify = notify
        self._forget = forget
        self._lock = threading.Lock()  # guards what follows
        self._input: deque[bytes] = deque()
        self._input_size = 0
        self._input_ends = False
        self._credit = messages.OUTPUT_WINDOW_BYTES
        self._cancelled = False
        self._process: subprocess.Popen[bytes] | None = None  # until it is reaped, so that its pid is nobody else's
        self._family: cgroups.Family | None = None
        self._nudges = -1
        self._fault: Fault | None = None  # why it was not started

    def start(self) -> None:
        """Start it.

        Raises:
            Fault: it cannot be started; its number is free again.
        """
        was_tried = threading.Event()
        try:
            # First the thread, for it is the last thing that can be refused: no program runs that nobody follows.
            threading.Thread(target=self._live, args=(was_tried,), daemon=True).start()
        except RuntimeError:
            self._forget(self._number)
            raise Fault(f"cannot run {self._command.argv[0][:_SHOWN]}: the agent gets no more threads") from None
        was_tried.wait()
        if self._fault:
            raise self._fault

    def give_up(self) -> None:
        """It is not going to be started: its number is free."""
        self._forget(self._number)

    def feed(self, data: bytes, *, last: bool) -> None:
        """Give it input. A host that sends more than its window allows loses the program."""
        with self._lock:
            self._input.append(data)
            self._input_size += len(data)
            self._input_ends |= last
            self._nudge()
            overfed = self._input_size > messages.INPUT_WINDOW_BYTES
        if overfed:
            self._kill()

    def add_credit(self, size: int) -> None:
        """The host took `size` bytes of output: so many more may be sent."""
        with self._lock:
            self._credit = min(self._credit + size, messages.OUTPUT_WINDOW_BYTES)
            self._nudge()

    def signal(self, number: int) -> None:
        """Send a signal to the program and to what it started in its process group."""
        with self._lock:
            if self._process:
                try:
                    os.killpg(self._process.pid, number)
                except OSError:
                    pass  # all of it has ended, or there is no such signal

    def cancel(self) -> None:
        """Nobody listens any more: kill it with all that it started."""
        with self._lock:
            self._cancelled = True
        self._kill()

    def _kill(self) -> None:
        with self._lock:
            if self._process and self._family:
                self._family.kill(self._process.pid)
                self._nudge()

    def _nudge(self) -> None:
        if self._nudges >= 0:
            os.eventfd_write(self._nudges, 1)

    def _live(self, was_tried: threading.Event) -> None:
        try:
            process, exit_fd = self._begin()
        except Exception as error:
            self._fault = self._why_not(error)
            self._release()
            self._forget(self._number)
            return
        finally:
            was_tried.set()
        try:
            self._follow(process, exit_fd)
        finally:
            self._finish(process, exit_fd)

    def _why_not(self, error: Exception) -> Fault:
        match error:
            case Fault():
                return error
            case OSError():
                return Fault(f"cannot run {self._command.argv[0][:_SHOWN]}: {why(error)}")
        return Fault(f"the agent failed: {type(error).__name__}: {error}")

    def _begin(self) -> tuple[subprocess.Popen[bytes], int]:
        family = cgroups.here().make()
        with self._lock:
            self._family = family
            self._nudges = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        process = self._command.start(family)
        try:
            exit_fd = os.pidfd_open(process.pid)
            if process.stdin:
                os.set_blocking(process.stdin.fileno(), False)
        except BaseException:
            family.kill(process.pid)
            _close_pipes(process)
            process.wait()
            raise
        with self._lock:
            self._process = process
            if self._cancelled:
                family.kill(process.pid)
        return process, exit_fd

    def _follow(self, process: subprocess.Popen[bytes], exit_fd: int) -> None:
        assert process.stdout
        assert process.stderr
        outputs = {process.stdout.fileno(): "out", process.stderr.fileno(): "err"}
        owed = dict.fromkeys(outputs, 0)  # bytes that were written before the program ended
        ends_at: float | None = None  # while it runs
        while not self._cancelled or ends_at is None:
            if ends_at is not None and time.monotonic() >= ends_at and not any(owed[fd] for fd in outputs):
                break
            if ends_at is not None and not outputs:
                break
            with self._lock:
                may_send, has_input = self._credit, bool(self._input) or self._input_ends
            poll = select.poll()
            poll.register(self._nudges, select.POLLIN)
            if ends_at is None:
                poll.register(exit_fd, select.POLLIN)
            if may_send > 0:
                for fd in outputs:
                    poll.register(fd, select.POLLIN)
            if process.stdin:
                # Without input too: an error says that the program closed its end.
                poll.register(process.stdin.fileno(), select.POLLOUT if has_input else 0)
            elif has_input:
                self._drop_input()
            left = None if ends_at is None or any(owed.values()) else max(0.0, ends_at - time.monotonic())
            for fd, _ in poll.poll(None if left is None else left * 1000):
                if fd == self._nudges:
                    os.eventfd_read(fd)
                elif fd == exit_fd:
                    ends_at = time.monotonic() + _LINGER_S
                    owed = {fd: _unread(fd) for fd in outputs}
                elif fd in outputs:
                    sent = self._send_output(fd, outputs[fd])
                    if sent is None:
                        del outputs[fd], owed[fd]
                    else:
                        owed[fd] = max(0, owed[fd] - sent)
                elif process.stdin and not self._write_input(process.stdin.fileno()):
                    process.stdin.close()
                    process.stdin = None
        for fd in outputs:
            self._leave_output(fd)

    def _send_output(self, fd: int, stream: str) -> int | None:
        """Send what the pipe has, and give how much that was. None: it is at its end."""
        with self._lock:
            size = min(self._credit, messages.CHUNK_BYTES)
        if size <= 0:
            return 0
        data = os.read(fd, size)
        with self._lock:
            self._credit -= len(data)
        if data and not self._cancelled:
            text = base64.b64encode(data).decode()
            self._notify(messages.RUN_OUTPUT, {"Process": self._number, "Stream": stream, "Data": text})
        return len(data) or None

    def _leave_output(self, fd: int) -> None:
        """A child holds this end of a pipe open, and may write to it for as long as it lives."""
        if not self._cancelled:
            try:
                drain.ALL.take(os.dup(fd))
            except OSError:
                pass  # then it is closed: the child is told so when it writes

    def _write_input(self, fd: int) -> bool:
        """Write what the pipe takes. False: it is all written, or the program takes no more."""
        with self._lock:
            data = self._input.popleft() if self._input else b""
            is_last = self._input_ends and not self._input
        try:
            written = os.write(fd, data)
        except BlockingIOError:
            written = 0
        except OSError:  # the program closed its input
            self._taken(len(data))
            return False
        if written < len(data):
            is_last = False
            with self._lock:
                self._input.appendleft(data[written:])
        self._taken(written)
        return not is_last

    def _drop_input(self) -> None:
        with self._lock:
            size = sum(map(len, self._input))
            self._input.clear()
            self._input_ends = False
        self._taken(size)

    def _taken(self, size: int) -> None:
        with self._lock:
            self._input_size -= size
        if size and not self._cancelled:
            self._notify(messages.RUN_CREDIT, {"Process": self._number, "Bytes": size})

    def _finish(self, process: subprocess.Popen[bytes], exit_fd: int) -> None:
        has_ended = bool(select.select([exit_fd], [], [], 0)[0])
        if not has_ended:  # the thread that followed it failed
            self._kill()
        with self._lock:
            status = process.wait()
            self._process = None
        os.close(exit_fd)
        _close_pipes(process)
        if self._cancelled and self._family:
            self._family.wait_until_empty(_DIE_S)
        self._release()
        self._forget(self._number)
        if not self._cancelled:
            self._notify(messages.RUN_EXIT, {"Process": self._number, "ExitCode": status})

    def _release(self) -> None:
        with self._lock:
            if self._nudges >= 0:
                os.close(self._nudges)
                self._nudges = -1
            if self._family:
                self._family.leave()
                self._family = None


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()


def _unread(fd: int) -> int:
    """How much is in a pipe."""
    size: int = _INT.unpack(fcntl.ioctl(fd, termios.FIONREAD, bytes(_INT.size)))[0]
    return size


def _bytes(data: object) -> bytes:
    if data is None:
        return b""
    try:
        return base64.b64decode(data, validate=True)  # type: ignore[arg-type]
    except (binascii.Error, TypeError, ValueError):
        raise Fault("Data is not base64", kind="invalid") from None


def _number(value: object, highest: int) -> int:
    if not isinstance(value, int) or not 0 < value <= highest:
        raise Fault(f"{value!r} is no number of 1 to {highest}", kind="invalid")
    return value
