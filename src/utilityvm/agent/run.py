"""Programs that the host runs in the guest: their input, output and end as messages."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from utilityvm.agent.faults import Fault
from utilityvm.bridge import messages

Notify = Callable[[int, dict[str, Any]], bool]
DEFAULT_ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}


class Programs:
    """The programs of one session. They end with it."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._lock = threading.Lock()
        self._running: dict[int, Program] = {}
        self._last = 0

    def start(self, body: dict[str, Any]) -> dict[str, Any]:
        """Start what a RUN request describes; `Process` names it from then on."""
        argv = body.get("Argv")
        if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
            raise Fault("Argv must be a list of words", kind="invalid")
        with self._lock:
            self._last += 1
            number = self._last
        program = Program(number, argv, body, self._notify, self._forget)
        with self._lock:
            self._running[number] = program
        program.begin()
        return {"Process": number}

    def _forget(self, number: int) -> None:
        with self._lock:
            self._running.pop(number, None)

    def get(self, body: dict[str, Any]) -> Program:
        with self._lock:
            program = self._running.get(body.get("Process", 0))
        if program is None:
            raise Fault("no such process", kind="not_found")
        return program

    def end_all(self) -> None:
        with self._lock:
            programs = list(self._running.values())
        for program in programs:
            program.abandon()


class Program:
    """One program, in a session of its own so that what it started can be ended with it."""

    def __init__(
        self, number: int, argv: list[str], body: dict[str, Any], notify: Notify, ended: Callable[[int], None]
    ) -> None:
        self._number = number
        self._notify = notify
        self._ended = ended
        self._credit = messages.OUTPUT_WINDOW_BYTES
        self._may_send = threading.Condition()
        self._abandoned = False
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE if body.get("Stdin") else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=body.get("Cwd") or "/",
                env={**DEFAULT_ENV, **(body.get("Env") or {})},
                start_new_session=True,
                bufsize=0,
            )
        except (OSError, ValueError) as error:
            raise Fault(
                f"cannot run {argv[0]}: {getattr(error, 'strerror', None) or error}", kind="not_found"
            ) from None

    def begin(self) -> None:
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        errors = threading.Thread(target=self._pump, args=(self._process.stderr.fileno(), "err"), daemon=True)
        errors.start()
        self._pump(self._process.stdout.fileno(), "out")
        errors.join()
        status = self._process.wait()
        self._ended(self._number)
        if not self._abandoned:
            self._notify(messages.RUN_EXIT, {"Process": self._number, "ExitCode": status})

    def _pump(self, fd: int, stream: str) -> None:
        while data := os.read(fd, messages.OUTPUT_CHUNK_BYTES):
            with self._may_send:
                while self._credit <= 0 and not self._abandoned:
                    self._may_send.wait()
                self._credit -= len(data)
            if not self._abandoned:
                text = base64.b64encode(data).decode()
                self._notify(messages.RUN_OUTPUT, {"Process": self._number, "Stream": stream, "Data": text})

    def add_credit(self, size: int) -> None:
        with self._may_send:
            self._credit += size
            self._may_send.notify_all()

    def write(self, data: bytes, *, last: bool) -> None:
        """Give the program input. A program that closed its input takes nothing, which is no fault."""
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            return
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(stdin.fileno(), view) :]
        except BrokenPipeError:
            last = True
        if last:
            stdin.close()

    def signal(self, number: int) -> None:
        """Send a signal to the program and to all that it started."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass

    def abandon(self) -> None:
        """Nobody listens any more: end it."""
        with self._may_send:
            self._abandoned = True
            self._may_send.notify_all()
        self.signal(signal.SIGKILL)
