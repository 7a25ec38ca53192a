"""Programs that the host runs in the guest: their input, output and end, as messages.

One thread a program moves its bytes; nothing that the host or the program does makes it hold more than a window of
them. A program has a session (setsid) of its own, so that what it starts can be ended with it; what leaves that session
on purpose, as a daemon does, is left alone.
"""

from __future__ import annotations

import base64
import binascii
import os
import select
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from utilityvm.agent.faults import Fault
from utilityvm.agent.processes import kill_session, let_be_killed
from utilityvm.bridge import messages

AT_MOST: Final = 256  # programs at once
_MAX_SIGNAL: Final = 64  # SIGRTMAX
_SHOWN: Final = 100  # characters of a command
_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}

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
        self.env = {**_ENVIRONMENT, **env}
        self.cwd = cwd
        self.takes_input = body.get("Stdin") is True

    def start(self) -> subprocess.Popen[bytes]:
        try:
            process = subprocess.Popen(
                self.argv,
                stdin=subprocess.PIPE if self.takes_input else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self.cwd,
                env=self.env,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            where = f" ({self.cwd})" if error.filename == self.cwd else ""
            kind = "not_found" if isinstance(error, FileNotFoundError) else "refused"
            raise Fault(f"cannot run {self.argv[0]}: {error.strerror}{where}", kind=kind) from None
        except ValueError as error:  # a NUL, or what is no text
            raise Fault(f"cannot run {self.argv[0]!r}: {error}", kind="invalid") from None
        let_be_killed(process.pid)
        return process


class Program:
    """One program, from its request to its end."""

    def __init__(self, number: int, command: _Command, notify: Notify, forget: Callable[[int], None]) -> None:
        self._number = number
        self.name = f"process {number}: {' '.join(command.argv)[:_SHOWN]}"
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
        self._nudges = -1

    def start(self) -> None:
        """Start it.

        Raises:
            Fault: it cannot be started; its number is free again.
        """
        try:
            process = self._command.start()
        except Fault:
            self._forget(self._number)
            raise
        with self._lock:
            self._process = process
            self._nudges = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            if self._cancelled:
                kill_session(process.pid)
        threading.Thread(target=self._follow, args=(process,), daemon=True).start()

    def feed(self, data: bytes, *, last: bool) -> None:
        """Give it input. A host that sends more than its window allows loses the program."""
        with self._lock:
            self._input.append(data)
            self._input_size += len(data)
            self._input_ends |= last
            self._nudge()
            overfed = self._input_size > messages.INPUT_WINDOW_BYTES
        if overfed:
            self.signal(signal.SIGKILL)

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
        """Nobody listens any more: kill it with all that it started in its session."""
        with self._lock:
            self._cancelled = True
            if self._process:
                kill_session(self._process.pid)
                self._nudge()

    def _nudge(self) -> None:
        if self._nudges >= 0:
            os.eventfd_write(self._nudges, 1)

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        assert process.stderr
        outputs = {process.stdout.fileno(): "out", process.stderr.fileno(): "err"}
        exit_fd = os.pidfd_open(process.pid)
        if process.stdin:
            os.set_blocking(process.stdin.fileno(), False)
        is_running = True
        while is_running or (outputs and not self._cancelled):
            with self._lock:
                may_send, has_input = self._credit, bool(self._input) or self._input_ends
            poll = select.poll()
            poll.register(self._nudges, select.POLLIN)
            if is_running:
                poll.register(exit_fd, select.POLLIN)
            if may_send > 0:
                for fd in outputs:
                    poll.register(fd, select.POLLIN)
            if process.stdin:
                # Without input too: an error says that the program closed its end.
                poll.register(process.stdin.fileno(), select.POLLOUT if has_input else 0)
            elif has_input:
                self._drop_input()
            for fd, _ in poll.poll():
                if fd == self._nudges:
                    os.eventfd_read(fd)
                elif fd == exit_fd:
                    is_running = False
                elif fd in outputs:
                    if not self._send_output(fd, outputs[fd]):
                        del outputs[fd]
                elif process.stdin and not self._write_input(process.stdin.fileno()):
                    process.stdin.close()
                    process.stdin = None
        self._finish(process, exit_fd)

    def _send_output(self, fd: int, stream: str) -> bool:
        with self._lock:
            size = min(self._credit, messages.CHUNK_BYTES)
        if size <= 0:
            return True
        data = os.read(fd, size)
        with self._lock:
            self._credit -= len(data)
        if data and not self._cancelled:
            text = base64.b64encode(data).decode()
            self._notify(messages.RUN_OUTPUT, {"Process": self._number, "Stream": stream, "Data": text})
        return bool(data)

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
        with self._lock:
            status = process.wait()
            self._process = None
            os.close(self._nudges)
            self._nudges = -1
        os.close(exit_fd)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()
        self._forget(self._number)
        if not self._cancelled:
            self._notify(messages.RUN_EXIT, {"Process": self._number, "ExitCode": status})


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
