"""Programs that belong to the guest: they outlive the host that started them, and its death.

Each has a number, and an id by which a host knows that it is the one it means. The end of its output is in a ring,
and its exit code is kept, until a host has it forgotten. Hosts *follow* a program, each from the offsets that it says.
While one that asked for it follows, a full ring holds the program back; else the oldest output is dropped, which the
next follower sees by the offsets.

What is kept is bounded. Programs that have ended make room for new ones, the oldest first; if those that run take all
the room, a new one is refused. They end with the agent: `init` ends all programs before it starts another agent.
"""

from __future__ import annotations

import base64
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from utilityvm.agent.faults import Fault
from utilityvm.agent.ring import STREAMS, Cursor, Ring
from utilityvm.agent.run import MAX_SIGNAL, Command, Notify, Program, data_of, number_of, process_number
from utilityvm.agent.terminal import Size
from utilityvm.bridge import messages

AT_MOST: Final = 128  # programs, those that have ended among them
AT_MOST_FOLLOWS: Final = 256  # of one session
_MAX_NAME: Final = 64
_MAX_COMMAND: Final = 1000  # characters of the words that are told
_MAX_OFFSET: Final = 1 << 62
_KEY: Final = {"out": "Out", "err": "Err"}


class KeptProgram:
    """One of them. Implements `run.Outlet`."""

    def __init__(self, number: int, id: str, name: str | None, command: Command, ring: Ring) -> None:
        self.number = number
        self.id = id
        self.name = name
        self.command = command
        self.ring = ring
        self.changed = threading.Condition()  # guards what follows, and the ring
        self.follows: list[Follow] = []
        self.status: int | None = None  # while it runs
        self.input_has_ended = not command.takes_input
        self.is_killed = False  # what it still writes holds up nothing
        self.program = Program(f"program {number}", command, self, outlives_its_end=True)
        self._started_at = time.time()
        self._ended_at: float | None = None

    @property
    def has_ended(self) -> bool:
        return self.status is not None

    def is_followed(self) -> bool:
        """Would somebody who reads its output, or writes its input, be cut off from it?"""
        with self.changed:
            return not self.has_ended and any(follow.holds or follow.feeds for follow in self.follows)

    def told(self) -> dict[str, Any]:
        """What is so of it."""
        with self.changed:
            told: dict[str, Any] = {
                "Number": self.number,
                "Id": self.id,
                "Argv": _shown(self.command.argv),
                "StartedMs": int(self._started_at * 1000),
                "RingBytes": self.ring.size,
                "Stdin": self.command.takes_input,
                "Terminal": self.command.terminal is not None,
                "Follows": len(self.follows),
            }
            for stream, key in _KEY.items():
                told[f"{key}Begin"], told[f"{key}End"] = self.ring.begins[stream], self.ring.ends[stream]
            if self.name is not None:
                told["Name"] = self.name
            if self.command.user is not None:
                told["User"] = str(self.command.user)[:_MAX_NAME]
            if self.program.pid is not None:
                told["Pid"] = self.program.pid
            if self._ended_at is not None:
                told |= {"EndedMs": int(self._ended_at * 1000), **self.end()}
        return told

    def end(self) -> dict[str, Any]:
        """How it ended; nothing if it runs. Call it with `changed` held."""
        if self.status is None:
            return {}
        return {"ExitCode": self.status, **({"OutOfMemory": True} if self.program.was_out_of_memory else {})}

    # The outlet.

    def room(self) -> int:
        with self.changed:
            taken = self._taken()
            return self.ring.room(taken) if taken else messages.CHUNK_BYTES

    def write(self, stream: str, data: bytes) -> None:
        with self.changed:
            # One that holds may have begun since there was said to be room.
            self.ring.add(stream, data, self._taken())
            self.changed.notify_all()

    def _taken(self) -> list[int]:
        """Up to where those that hold the program back have taken its output. Call it with `changed` held."""
        return [follow.place for follow in self.follows if follow.holds and not self.is_killed]

    def took(self, size: int, total: int) -> None:
        with self.changed:
            feeds = [follow for follow in self.follows if follow.feeds]
        for follow in feeds:
            follow.notify(messages.RUN_CREDIT, {"Process": follow.process, "Bytes": size, "At": total})

    def ended(self, status: int) -> None:
        with self.changed:
            self.status = status
            self._ended_at = time.time()
            self.changed.notify_all()

    def gone(self) -> None:
        """It was not started: see `Kept.start`."""


class Follow:
    """One host that follows one program, as `process`. A thread sends what it has room for."""

    def __init__(self, process: int, notify: Notify, body: Mapping[str, Any], forget: Callable[[Follow], None]) -> None:
        self.process = process
        self.notify = notify
        self.has_output = body.get("Output") is not False  # else only the end is told
        self.holds = body.get("Hold") is True and self.has_output
        self.lives = body.get("Live") is not False  # else it ends with what is in the ring
        self.feeds = False
        self.place = 0  # what the host has taken ends here
        self._wants_to_feed = body.get("Feed") is True
        self._from = {
            stream: number_of(body.get(key, 0), _MAX_OFFSET, lowest=0, what=key) for stream, key in _KEY.items()
        }
        self._forget = forget
        self._credit = messages.OUTPUT_WINDOW_BYTES
        self._sent: deque[tuple[int, int]] = deque()  # bytes that were sent, and the place after them
        self._kept: KeptProgram | None = None
        self._cursor = Cursor(self._from)
        self._lock = threading.Lock()  # of the beginning and the end
        self._is_over = False

    def begin(self, kept: KeptProgram) -> dict[str, Any]:
        """Follow `kept` from now on.

        Raises:
            Fault: it has not written so much, or the agent gets no more threads.
        """
        with kept.changed:
            for stream in STREAMS:
                if self._from[stream] > kept.ring.ends[stream]:
                    text = f"offset {self._from[stream]} of its {stream} is after its end, {kept.ring.ends[stream]}"
                    raise Fault(f"program {kept.number}: {text}", kind="invalid")
            with self._lock:
                if self._is_over:
                    return {}
                self._kept = kept
            self.place = kept.ring.place_of(self._cursor)
            is_free = not any(follow.feeds for follow in kept.follows)
            self.feeds = self._wants_to_feed and kept.command.takes_input and is_free
            kept.follows.append(self)
            given = {"Feeds": self.feeds, "TakenAt": kept.program.input_taken, "GivenAt": kept.program.input_given}
        try:
            threading.Thread(target=self._send_all, args=(kept,), daemon=True).start()
        except RuntimeError:
            self.stop()
            raise Fault(f"cannot follow program {kept.number}: the agent gets no more threads") from None
        return given

    def stop(self) -> None:
        """Nobody listens any more. The program goes on."""
        with self._lock:
            self._is_over = True
            kept = self._kept
        if kept:
            with kept.changed:
                if self in kept.follows:
                    kept.follows.remove(self)
                kept.changed.notify_all()
            kept.program.nudge()  # it may have been held back
        self._forget(self)

    def add_credit(self, size: int) -> None:
        """The host took `size` bytes of output: so many more may be sent, and the ring need not keep them."""
        with self._lock:
            kept = self._kept
        if kept is None:
            return
        with kept.changed:
            self._credit = min(self._credit + size, messages.OUTPUT_WINDOW_BYTES)
            while self._sent and size >= self._sent[0][0]:
                sent, self.place = self._sent.popleft()
                size -= sent
            if self._sent and size:
                self._sent[0] = self._sent[0][0] - size, self._sent[0][1]
            kept.changed.notify_all()
        kept.program.nudge()

    def feed(self, data: bytes, *, last: bool) -> None:
        """Give the program input, if this is the follow that does."""
        with self._lock:
            kept = self._kept
        if kept is None:
            return
        with kept.changed:
            if not self.feeds or kept.input_has_ended:
                return
            kept.input_has_ended = last
        kept.program.feed(data, last=last)

    def _send_all(self, kept: KeptProgram) -> None:
        while (message := self._next(kept)) is not None:
            kind, body = message
            if kind == messages.FOLLOW_END:
                self.stop()  # first: with the end the number is free
            self.notify(kind, {"Process": self.process, **body})

    def _next(self, kept: KeptProgram) -> tuple[int, dict[str, Any]] | None:
        """What is to be said next, when there is something. None: it is over."""
        with kept.changed:
            while not self._is_over:
                found = None
                if self.has_output and self._credit > 0:
                    found = kept.ring.next(self._cursor, min(self._credit, messages.CHUNK_BYTES))
                if found:
                    (stream, offset, data), place = found
                    self._credit -= len(data)
                    self._sent.append((len(data), place))
                    return messages.RUN_OUTPUT, {
                        "Stream": stream,
                        "Data": base64.b64encode(data).decode(),
                        "At": offset,
                    }
                has_all = not self.has_output or self._credit > 0
                if has_all and (kept.has_ended or not self.lives):
                    return messages.FOLLOW_END, kept.end()
                kept.changed.wait()
        return None


class Follows:
    """Those of one session, by the numbers that its host gave them. They end with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[int, Follow] = {}
        self._is_over = False

    def new(self, body: Mapping[str, Any], notify: Notify) -> Follow:
        """A follow that has not begun.

        Raises:
            Fault: the request is wrong, its number is taken, or there are too many.
        """
        follow = Follow(process_number(body), notify, body, self._forget)
        with self._lock:
            if self._is_over:
                raise Fault("the host has gone")
            if follow.process in self._known:
                raise Fault(f"process {follow.process} is followed already", kind="invalid")
            if len(self._known) >= AT_MOST_FOLLOWS:
                raise Fault(f"{AT_MOST_FOLLOWS} programs are followed already")
            self._known[follow.process] = follow
        return follow

    def has(self, number: object) -> bool:
        """Is that the number of a follow?"""
        with self._lock:
            return number in self._known

    def tell(self, kind: int, body: Mapping[str, Any]) -> None:
        """Pass on what the host says. To a follow that is over, it is nothing."""
        with self._lock:
            follow = self._known.get(body.get("Process", 0))
        if follow is None:
            return
        match kind:
            case messages.RUN_INPUT:
                follow.feed(data_of(body), last=body.get("Eof") is True)
            case messages.RUN_CREDIT:
                follow.add_credit(number_of(body.get("Bytes"), messages.OUTPUT_WINDOW_BYTES))
            case messages.UNFOLLOW:
                follow.stop()

    def end_all(self) -> None:
        """The host is gone. The programs go on."""
        with self._lock:
            self._is_over = True
            follows = list(self._known.values())
        for follow in follows:
            follow.stop()

    def _forget(self, follow: Follow) -> None:
        with self._lock:
            if self._known.get(follow.process) is follow:
                del self._known[follow.process]


class Kept:
    """All kept programs of this guest, in the order of their numbers. Thread-safe."""

    def __init__(self, *, room_bytes: int | None = None) -> None:
        """`room_bytes`: for all rings together; None: a quarter of the guest's memory."""
        self._room_bytes = _quarter_of_memory() if room_bytes is None else room_bytes
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._known: dict[int, KeptProgram] = {}

    def start(self, body: Mapping[str, Any], follow: Follow | None) -> dict[str, Any]:
        """Start the program of a START request, followed from its first byte by `follow`; gives the answer.

        A host that had no answer may ask again: there is one program of an id, and no second one is started.

        Raises:
            Fault: the request is wrong, its name is taken, there is no room, or it cannot be started.
        """
        command = Command(dict(body))
        size = number_of(
            body.get("RingBytes", messages.RING_BYTES),
            messages.MAX_RING_BYTES,
            lowest=messages.MIN_RING_BYTES,
            what="RingBytes",
        )
        kept, is_new = self._add(_id(body), _name(body), command, size)
        if not is_new:
            return {"Program": kept.told(), **(follow.begin(kept) if follow else {})}
        try:
            given = follow.begin(kept) if follow else {}
            kept.program.start()
        except BaseException:
            with self._lock:
                self._known.pop(kept.number, None)
            raise
        return {"Program": kept.told(), **given}

    def get(self, body: Mapping[str, Any]) -> KeptProgram:
        """The program that a request is about.

        Raises:
            Fault: there is no such program, or its number is another one's.
        """
        number, id = body.get("Number"), body.get("Id")
        with self._lock:
            for kept in self._known.values():
                is_it = kept.number == number if number is not None else kept.id == id
                if is_it and id in (None, kept.id):
                    return kept
        raise Fault(f"there is no program {str(id if number is None else number)[:_MAX_NAME]}", kind="no_program")

    def after(self, number: int) -> list[KeptProgram]:
        """Those with higher numbers."""
        with self._lock:
            return [kept for kept in self._known.values() if kept.number > number]

    def signal(self, body: Mapping[str, Any]) -> None:
        """Send a signal to a program and what it started in its process group.

        Raises:
            Fault: there is no such program or signal, or it has ended ("ended").
        """
        kept = self.get(body)
        number = number_of(body.get("Signal"), MAX_SIGNAL, what="Signal")
        if kept.has_ended:
            raise Fault(f"program {kept.number} has ended", kind="ended")
        kept.program.signal(number)

    def resize(self, body: Mapping[str, Any]) -> None:
        """Set the size of a program's terminal. One that has ended takes nothing, which is no fault.

        Raises:
            Fault: there is no such program, it has no terminal, or the size is none.
        """
        self.get(body).program.resize(Size.of(body))

    def kill(self, body: Mapping[str, Any], deadline: float) -> None:
        """Kill a program with all that it started, also if it has ended and left something behind.

        Raises:
            Fault: there is no such program, or the kernel does not let it go by `deadline`.
        """
        kept = self.get(body)
        with kept.changed:
            kept.is_killed = True
        kept.program.kill()
        kept.program.nudge()
        with kept.changed:
            if not kept.changed.wait_for(lambda: kept.has_ended, max(0.0, deadline - time.monotonic())):
                raise Fault(f"program {kept.number} was killed and does not end", kind="timeout")
        kept.program.wait_until_empty(max(0.0, deadline - time.monotonic()))

    def forget(self, body: Mapping[str, Any]) -> None:
        """Drop what is kept of a program that has ended. What it left behind goes on.

        Raises:
            Fault: there is no such program, or it runs.
        """
        kept = self.get(body)
        if not kept.has_ended:
            raise Fault(f"program {kept.number} runs", kind="running")
        with self._lock:
            self._drop(kept)

    def followed(self) -> list[str]:
        """The programs that run and that a host reads from or writes to, for people."""
        with self._lock:
            known = list(self._known.values())
        return [kept.program.name for kept in known if kept.is_followed()]

    def _add(self, id: str, name: str | None, command: Command, size: int) -> tuple[KeptProgram, bool]:
        with self._lock:
            for kept in self._known.values():
                if kept.id == id:
                    return kept, False
            if name is not None and any(kept.name == name for kept in self._known.values()):
                raise Fault(f"another program has the name {name}", kind="invalid")
            running = [kept for kept in self._known.values() if not kept.has_ended]
            if len(running) >= AT_MOST:
                raise Fault(f"{AT_MOST} programs run already")
            taken = sum(kept.ring.size for kept in running)
            if taken + size > self._room_bytes:
                raise Fault(
                    f"the output of programs that run takes {taken} bytes, and {size} more do not fit: "
                    f"{self._room_bytes}, a quarter of the guest's memory, are for it"
                )
            for kept in [kept for kept in self._known.values() if kept.has_ended]:
                taken = sum(one.ring.size for one in self._known.values())
                if taken + size <= self._room_bytes and len(self._known) < AT_MOST:
                    break
                self._drop(kept)
            kept = KeptProgram(next(self._numbers), id, name, command, Ring(size))
            self._known[kept.number] = kept
        return kept, True

    def _drop(self, kept: KeptProgram) -> None:
        if self._known.pop(kept.number, None):
            kept.program.let_go()


def _id(body: Mapping[str, Any]) -> str:
    id = body.get("Id")
    if id is None:
        return os.urandom(8).hex()
    if not isinstance(id, str) or not 0 < len(id) <= _MAX_NAME or not id.isascii() or not id.isalnum():
        raise Fault(f"Id must have 1 to {_MAX_NAME} letters and digits", kind="invalid")
    return id


def _name(body: Mapping[str, Any]) -> str | None:
    name = body.get("Name")
    if name is None:
        return None
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable() or name.isdigit():
        raise Fault(f"Name must be a word of 1 to {_MAX_NAME} printable characters, and no number", kind="invalid")
    return name


def _shown(argv: Sequence[str]) -> list[str]:
    shown, size = [], 0
    for word in argv:
        size += len(word) + 1
        if size > _MAX_COMMAND:
            shown.append("...")
            break
        shown.append(word)
    return shown


def _quarter_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
