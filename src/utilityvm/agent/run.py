"""Programs that the host runs in the guest: their input, output and end.

One thread a program moves its bytes; nothing that the host or the program does makes it hold more than a window of
them. A program has a cgroup of its own, so that it can be killed with all that it started. Where its output and its end
go is its `Outlet`: to the host that runs it (`Programs`), or into a ring that outlives the host (`kept`).

A program has ended when its own process has. What it wrote before is told, and what its children write to the same
output in the half second after it; what they write later is dropped. They go on, unless the program was cancelled.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import os
import select
import struct
import subprocess
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from utilityvm.agent import cgroups, drain, processes, terminal
from utilityvm.agent.accounts import Account
from utilityvm.agent.copying import Copy, is_copy
from utilityvm.agent.faults import Fault
from utilityvm.agent.launch import ENVIRONMENT, start, why
from utilityvm.bridge import messages

AT_MOST: Final = 256  # programs at once
MAX_SIGNAL: Final = 64  # SIGRTMAX
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
        self._known: dict[int, tuple[Program | Copy, _ToHost]] = {}

    def take(self, body: dict[str, Any]) -> Program | Copy:
        """The program of a RUN request, not started; input and signals for it are kept until it is.

        Raises:
            Fault: the request is wrong, its number is taken, or too many programs run.
        """
        number = process_number(body)
        outlet = _ToHost(number, self._notify, self._forget)
        program: Program | Copy
        if is_copy(body):
            program = Copy(f"process {number}", body, outlet)
        else:
            program = Program(f"process {number}", Command(body), outlet)
        with self._lock:
            if number in self._known:
                raise Fault(f"process {number} runs already", kind="invalid")
            if len(self._known) >= AT_MOST:
                raise Fault(f"{AT_MOST} programs run already")
            self._known[number] = program, outlet
        return program

    def tell(self, kind: int, body: dict[str, Any]) -> None:
        """Pass on what the host says about a program. One that has ended takes nothing, which is no fault."""
        with self._lock:
            found = self._known.get(body.get("Process", 0))
        if found is None:
            return
        program, outlet = found
        match kind:
            case messages.RUN_INPUT:
                program.feed(data_of(body), last=body.get("Eof") is True)
            case messages.RUN_CREDIT:
                outlet.add_credit(number_of(body.get("Bytes"), messages.OUTPUT_WINDOW_BYTES))
                program.nudge()
            case messages.RUN_SIGNAL:
                program.signal(number_of(body.get("Signal"), MAX_SIGNAL))
            case messages.RUN_CANCEL:
                program.cancel()

    def has(self, number: object) -> bool:
        """Is that the number of a program that runs?"""
        with self._lock:
            return number in self._known

    def running(self) -> list[str]:
        """What runs, for people."""
        with self._lock:
            return [program.name for program, _ in self._known.values()]

    def end_all(self) -> None:
        """The host is gone: kill every program."""
        with self._lock:
            programs = [program for program, _ in self._known.values()]
        for program in programs:
            program.cancel()

    def _forget(self, number: int) -> None:
        with self._lock:
            self._known.pop(number, None)


class Outlet(Protocol):
    """Where a program's output and its end go. Called by the program's thread, which holds no lock meanwhile."""

    def room(self) -> int: ...  # so many bytes of output may be read from the program now
    def write(self, stream: str, data: bytes) -> None: ...
    def took(self, size: int, total: int) -> None: ...  # so much input was taken; and so much in all
    def ended(self, status: int) -> None: ...
    def gone(self) -> None: ...  # in place of `ended`: it was not started, or was cancelled


class _ToHost:
    """The outlet of a program that ends with its session: messages, and no more of them than the host has room for."""

    def __init__(self, number: int, notify: Notify, forget: Callable[[int], None]) -> None:
        self._number = number
        self._notify = notify
        self._forget = forget
        self._lock = threading.Lock()
        self._credit = messages.OUTPUT_WINDOW_BYTES

    def add_credit(self, size: int) -> None:
        """The host took `size` bytes of output: so many more may be sent."""
        with self._lock:
            self._credit = min(self._credit + size, messages.OUTPUT_WINDOW_BYTES)

    def room(self) -> int:
        with self._lock:
            return self._credit

    def write(self, stream: str, data: bytes) -> None:
        with self._lock:
            self._credit -= len(data)
        text = base64.b64encode(data).decode()
        self._notify(messages.RUN_OUTPUT, {"Process": self._number, "Stream": stream, "Data": text})

    def took(self, size: int, total: int) -> None:
        self._notify(messages.RUN_CREDIT, {"Process": self._number, "Bytes": size})

    def ended(self, status: int) -> None:
        self._forget(self._number)
        self._notify(messages.RUN_EXIT, {"Process": self._number, "ExitCode": status})

    def gone(self) -> None:
        self._forget(self._number)


class Command:
    """What to run, as a RUN or a START request says it."""

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
        self.terminal = None if body.get("Terminal") is None else terminal.Size.of(body["Terminal"])
        self.takes_input = body.get("Stdin") is True or self.terminal is not None
        self.user = body.get("User")
        self.limits = _limits(body.get("Limits"))
        self._given_env = env

    def start(self, family: cgroups.Family) -> subprocess.Popen[bytes]:
        account = None if self.user is None else Account.of(self.user)
        if self.terminal is None:
            stdin = subprocess.PIPE if self.takes_input else subprocess.DEVNULL
            return self._start(family, account, stdin, subprocess.PIPE)
        owner = account.uid if account else None
        return terminal.start(lambda fd: self._start(family, account, fd, fd), self.terminal, owner=owner)

    def _start(self, family: cgroups.Family, account: Account | None, stdin: int, out: int) -> subprocess.Popen[bytes]:
        ours = self.env if self.terminal is None else {**self.env, "TERM": terminal.TYPE}
        return start(
            self.argv,
            env={**ours, **(account.env if account else {}), **self._given_env},
            cwd=self.cwd,
            account=account,
            stdin=stdin,
            stdout=out,
            stderr=out,
            family=family,
            has_terminal=self.terminal is not None,
        )


class Program:
    """One program, from its request to its end."""

    def __init__(self, name: str, command: Command, outlet: Outlet, *, outlives_its_end: bool = False) -> None:
        """With `outlives_its_end`, what it started can be killed also after it has ended, until `let_go`."""
        self.name = f"{name}: {command.argv[0][:_SHOWN]}"  # its arguments may be secrets
        self._command = command
        self._outlet = outlet
        self._keeps_family = outlives_its_end
        self._lock = threading.Lock()  # guards what follows
        self._input: deque[bytes] = deque()
        self._input_size = 0
        self._input_ends = False
        self.input_given = 0  # bytes, since it was started
        self._input_taken = 0
        self._cancelled = False
        self._process: subprocess.Popen[bytes] | None = None  # until it is reaped, so that its pid is nobody else's
        self._family: cgroups.Family | None = None
        self._nudges = -1
        self._fault: Fault | None = None  # why it was not started
        self.pid: int | None = None
        self.was_out_of_memory = False  # known when it has ended

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
            self._outlet.gone()
            raise Fault(f"cannot run {self._command.argv[0][:_SHOWN]}: the agent gets no more threads") from None
        was_tried.wait()
        if self._fault:
            raise self._fault

    def give_up(self) -> None:
        """It is not going to be started."""
        self._outlet.gone()

    def feed(self, data: bytes, *, last: bool) -> None:
        """Give it input. A host that sends more than its window allows loses the program."""
        with self._lock:
            self._input.append(data)
            self._input_size += len(data)
            self.input_given += len(data)
            self._input_ends |= last
            self._nudge()
            overfed = self._input_size > messages.INPUT_WINDOW_BYTES
        if overfed:
            self.kill()

    @property
    def input_taken(self) -> int:
        """How many bytes of input it has taken; those that it cannot take any more count as well."""
        with self._lock:
            return self._input_taken

    def nudge(self) -> None:
        """There may be more room at the outlet."""
        with self._lock:
            self._nudge()

    def signal(self, number: int) -> None:
        """Send a signal to the program and to what it started in its process group."""
        with self._lock:
            if self._process:
                try:
                    os.killpg(self._process.pid, number)
                except OSError:
                    pass  # all of it has ended, or there is no such signal

    def resize(self, size: terminal.Size) -> None:
        """Set the size of its terminal.

        Raises:
            Fault: it has none.
        """
        if self._command.terminal is None:
            raise Fault(f"{self.name} has no terminal", kind="invalid")
        with self._lock:
            if self._process and self._process.stdout:
                terminal.resize(self._process.stdout.fileno(), size)

    def cancel(self) -> None:
        """Nobody listens any more: kill it with all that it started."""
        with self._lock:
            self._cancelled = True
        self.kill()

    def kill(self) -> None:
        """Kill it with all that it started."""
        with self._lock:
            if self._family and (self._process or self._keeps_family):
                self._family.kill(self._process.pid if self._process else None)
                self._nudge()

    def wait_until_empty(self, timeout_s: float) -> None:
        """Wait until all that it started has ended, for so long at the most."""
        with self._lock:
            family = self._family
        if family:
            family.wait_until_empty(timeout_s)

    def let_go(self) -> None:
        """It has ended, and what it left behind is not going to be killed: that goes on."""
        with self._lock:
            self._keeps_family = False
        self._release()

    def _nudge(self) -> None:
        if self._nudges >= 0:
            os.eventfd_write(self._nudges, 1)

    def _live(self, was_tried: threading.Event) -> None:
        try:
            process, exit_fd = self._begin()
        except Exception as error:
            self._fault = self._why_not(error)
            self._keeps_family = False
            self._release()
            self._outlet.gone()
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
        family = cgroups.here().make(self._command.limits)
        with self._lock:
            self._family = family
            self._nudges = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        process = self._command.start(family)
        try:
            exit_fd = os.pidfd_open(process.pid)
            if process.stdin:
                os.set_blocking(process.stdin.fileno(), False)
                with contextlib.suppress(OSError):  # a terminal; or there is no memory for that
                    fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, messages.INPUT_WINDOW_BYTES)
        except BaseException:
            family.kill(process.pid)
            _close_pipes(process)
            process.wait()
            raise
        with self._lock:
            self._process = process
            self.pid = process.pid
            if self._cancelled:
                family.kill(process.pid)
        return process, exit_fd

    def _follow(self, process: subprocess.Popen[bytes], exit_fd: int) -> None:
        pipes = {"out": process.stdout, "err": process.stderr}  # a terminal is one for both
        outputs = {pipe.fileno(): stream for stream, pipe in pipes.items() if pipe}
        owed = dict.fromkeys(outputs, 0)  # bytes that were written before the program ended
        ends_at: float | None = None  # while it runs
        while not self._cancelled or ends_at is None:
            if ends_at is not None and time.monotonic() >= ends_at and not any(owed[fd] for fd in outputs):
                break
            if ends_at is not None and not outputs:
                break
            may_send = self._outlet.room()
            with self._lock:
                has_input = bool(self._input) or self._input_ends
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
                        if self._command.terminal and process.stdin:  # it is one and the same
                            process.stdin.close()
                            process.stdin = None
                            break  # what else was found ready may be of a closed descriptor
                    else:
                        owed[fd] = max(0, owed[fd] - sent)
                elif process.stdin and not self._write_input(process.stdin.fileno()):
                    process.stdin.close()
                    process.stdin = None
        for fd in outputs:
            self._leave_output(fd)

    def _send_output(self, fd: int, stream: str) -> int | None:
        """Send what the pipe has, and give how much that was. None: it is at its end."""
        size = min(self._outlet.room(), messages.CHUNK_BYTES)
        if size <= 0:
            return 0
        try:
            data = os.read(fd, size)
        except BlockingIOError:
            return 0
        except OSError:  # a terminal that nobody has open any more
            return None
        if data and not self._cancelled:
            self._outlet.write(stream, data)
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
            data = b"".join(self._input)
            self._input.clear()
            is_last = self._input_ends
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
        if is_last and self._command.terminal:
            with contextlib.suppress(OSError):
                os.write(fd, terminal.END_OF_INPUT)
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
            self._input_taken += size
            total = self._input_taken
        if size and not self._cancelled:
            self._outlet.took(size, total)

    def _finish(self, process: subprocess.Popen[bytes], exit_fd: int) -> None:
        has_ended = processes.is_readable(exit_fd, 0.0)
        if not has_ended:  # the thread that followed it failed
            self.kill()
        with self._lock:
            status = process.wait()
            self._process = None
        os.close(exit_fd)
        _close_pipes(process)
        if self._family:
            if self._cancelled:
                self._family.wait_until_empty(_DIE_S)
            self.was_out_of_memory = self._family.was_out_of_memory()
        self._release()
        if self._cancelled:
            self._outlet.gone()
        else:
            self._outlet.ended(status)

    def _release(self) -> None:
        with self._lock:
            if self._nudges >= 0:
                os.close(self._nudges)
                self._nudges = -1
            if self._family and not self._keeps_family:
                self._family.leave()
                self._family = None


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()


def _unread(fd: int) -> int:
    """How much is in a pipe, or in a terminal; in one that was hung up, nothing."""
    try:
        size: int = _INT.unpack(fcntl.ioctl(fd, termios.FIONREAD, bytes(_INT.size)))[0]
    except OSError:
        return 0
    return size


def process_number(body: Mapping[str, Any]) -> int:
    """The number that the host chose for what it speaks of.

    Raises:
        Fault: it is none.
    """
    number = body.get("Process")
    if not isinstance(number, int) or isinstance(number, bool):
        raise Fault(f"Process {number!r} is no number", kind="invalid")
    return number


def data_of(body: Mapping[str, Any]) -> bytes:
    """The bytes in a message.

    Raises:
        Fault: they are none.
    """
    data = body.get("Data")
    if data is None:
        return b""
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise Fault("Data is not base64", kind="invalid") from None


def number_of(value: object, highest: int, *, lowest: int = 1, what: str = "this") -> int:
    """Raises:
    Fault: `value` is not a whole number in these bounds.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise Fault(f"{what} must be a number of {lowest} to {highest}, and is {str(value)[:100]!r}", kind="invalid")
    return value


def _limits(given: object) -> cgroups.Limits:
    if given is None:
        return cgroups.Limits()
    if not isinstance(given, dict):
        raise Fault("Limits must be an object", kind="invalid")
    highest = {"MemoryBytes": 1 << 50, "Pids": 1 << 22, "MilliCpus": 1 << 20}
    lowest = {"MemoryBytes": 1 << 20, "Pids": 1, "MilliCpus": 10}
    unknown = [name for name in given if name not in highest]
    if unknown:
        raise Fault(f"there is no limit {str(unknown[0])[:_SHOWN]!r}", kind="invalid")
    found = {
        name: number_of(value, highest[name], lowest=lowest[name], what=name)
        for name, value in given.items()
        if value is not None
    }
    return cgroups.Limits(found.get("MemoryBytes"), found.get("Pids"), found.get("MilliCpus"))
