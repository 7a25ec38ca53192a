"""Answers the bridge: every request once, with its id, in whatever order the work is done.

A *session* is one host on the port. It begins with a negotiate request and ends when the host hangs up, or when another
negotiate request comes: over virtio-serial a host that went and came again may be seen as no interruption at all, so a
second negotiate is a new host and not a mistake. (The real guest, whose connections cannot blend, refuses it.) Programs
that the host runs end with the session; mounts and kept programs stay.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

from utilityvm.agent.faults import Fault
from utilityvm.agent.identity import BOOT_ID, Given
from utilityvm.agent.kept import Follows, Kept
from utilityvm.agent.port import Port
from utilityvm.agent.programs import ProgramCalls, fitting
from utilityvm.agent.run import Programs
from utilityvm.agent.template import Template
from utilityvm.agent.watch import Watch
from utilityvm.agent.workers import Workers
from utilityvm.bridge import messages
from utilityvm.bridge.frame import Decoder, Frame, FrameError, encode, guest_json

VERSION: Final = 4  # of what this agent can do beyond GCS; 2: templates; 3: kept programs, users, limits; 4: terminals
DEFAULT_DEADLINE_S: Final = 60.0
DEFAULT_HOLD_S: Final = 60.0
MAX_DEADLINE_S: Final = 3600.0
MAX_REQUESTS: Final = 512  # under way at once
_GRACE_S: Final = 0.2  # after its deadline a request is answered for its handler, which seems stuck
_MAX_HOLDERS: Final = 50
_MAX_REASON: Final = 500  # characters

# The members of Settings that GCS knows, and what Go would take for each.
_UINT8: Final = range(256)
_UINT64: Final = range(1 << 64)
_SETTINGS: Final[dict[str, range | type]] = {
    "MountPath": str,
    "Lun": _UINT8,
    "Controller": _UINT8,
    "Partition": _UINT64,
    "ReadOnly": bool,
    "Encrypted": bool,
    "Options": list,
    "BlockDev": bool,
    "EnsureFilesystem": bool,
    "Filesystem": str,
    messages.EXTENSION: dict,
}

_KNOWN_NOTIFICATIONS: Final = (
    messages.RUN_INPUT,
    messages.RUN_CREDIT,
    messages.RUN_SIGNAL,
    messages.RUN_CANCEL,
    messages.UNFOLLOW,
)


class Disks(Protocol):
    """The disk side of the agent. Called from many threads at once."""

    def add(self, settings: dict[str, Any], deadline: float) -> list[str]: ...  # what is to be said of it
    def remove(self, settings: dict[str, Any], deadline: float, *, force: bool = False) -> None: ...
    def eject(self, controller: int, lun: int, deadline: float, *, force: bool = False) -> None: ...
    def probe(self, controller: int, lun: int) -> dict[str, Any]: ...
    def check_grow(self, controller: int, lun: int, size_bytes: int, deadline: float) -> None: ...
    def grow(self, controller: int, lun: int, deadline: float) -> dict[str, Any]: ...
    def mounts(self) -> list[dict[str, Any]]: ...


class Session:
    """One host that negotiated; `number` is the port's name for it."""

    def __init__(self, port: Port, number: int) -> None:
        self._port = port
        self.number = number
        self.programs = Programs(self.notify)
        self.follows = Follows()

    def answer(self, request: Frame, body: dict[str, Any]) -> None:
        """Send the response to `request`. If the host is gone, it is dropped."""
        kind = messages.response_to(request.kind)
        try:
            data = encode(kind, request.id, guest_json(body))
        except (FrameError, TypeError, ValueError) as error:
            data = encode(kind, request.id, guest_json(messages.failure(messages.E_FAIL, f"no answer: {error}")))
        self._port.write(data, session=self.number)

    def end(self) -> None:
        """The host is gone."""
        self.programs.end_all()
        self.follows.end_all()

    def notify(self, kind: int, body: dict[str, Any]) -> None:
        self._port.write(encode(kind, 0, guest_json(body)), session=self.number)


class Call:
    """A request that a worker has, until it is answered."""

    def __init__(self, session: Session, frame: Frame, body: dict[str, Any]) -> None:
        activity = body.get("ActivityId")
        extension = body.get(messages.EXTENSION)
        self.session = session
        self.frame = frame
        self.body = body
        self.extension: dict[str, Any] = extension if isinstance(extension, dict) else {}
        self.activity = activity if isinstance(activity, str) and len(activity) <= 64 else messages.NULL_GUID
        self.seconds = _seconds(self.extension.get("TimeoutMs"), DEFAULT_DEADLINE_S)
        self.due = time.monotonic() + self.seconds
        self.deadline = self.due + _GRACE_S  # of the answer, for `Watch`
        self._answered = threading.Lock()
        self.has_ended = threading.Event()  # nothing is done for it any more, answered or not

    @property
    def slot(self) -> tuple[object, object]:
        """Where the disk is that it is about, as the host wrote it."""
        about: Any = self.body
        if self.frame.kind == messages.MODIFY:
            request = about.get("Request")
            about = request.get("Settings") if isinstance(request, dict) else None
        return (about.get("Controller") or 0, about.get("Lun") or 0) if isinstance(about, dict) else (None, None)

    def answer(self, fields: dict[str, Any]) -> None:
        self._send(messages.success(self.activity, **fields))

    def refuse(self, fault: Fault) -> None:
        holders = [str(holder)[:200] for holder in fault.holders[:_MAX_HOLDERS]]
        extension: dict[str, Any] = {"Kind": fault.kind, "Holders": holders}
        if fault.remedy:
            extension["Remedy"] = fault.remedy
        self._send(messages.failure(fault.code, fault.message, activity=self.activity, extension=extension))

    def _send(self, body: dict[str, Any]) -> None:
        if self._answered.acquire(blocking=False):  # for good: a second answer would break the protocol
            self.session.answer(self.frame, body)


Handler = Callable[[Call], dict[str, Any]]


class Serve:
    """The bridge's guest end on one port."""

    def __init__(
        self,
        port: Port,
        disks: Disks,
        template: Template,
        *,
        shutdown: Callable[[float], Sequence[str]],
        power_off: Callable[[], None],
    ) -> None:
        """`shutdown` ends everything by a time and gives what is not clean then; `power_off` follows it."""
        self._port = port
        self._disks = disks
        self._template = template
        self._shutdown = shutdown
        self._turn_off = power_off
        self._workers = Workers(at_most=MAX_REQUESTS)
        self._watch = Watch(_expire)
        self._decoder = _decoder()
        self._session: Session | None = None
        self._programs = ProgramCalls(template, Kept())
        self._changes: list[Call] = []  # what may be changing disks, whichever host asked for it
        # What does not change is read here, and not when a clone's first answer waits for it.
        self._kernel = os.uname().release
        with open(BOOT_ID) as file:
            self._boot_id = file.read().strip()
        self._at_once: dict[int, Handler] = {
            messages.PING: lambda _call: {},
            messages.INFO: lambda _call: self._about(),
        }
        self._in_a_worker: dict[int, Handler] = {
            messages.MODIFY: self._modify,
            messages.RUN: lambda _call: {},  # see `_hand_over`
            messages.PROBE: self._probe,
            messages.MOUNTS: self._mounts,
            messages.GROW: self._grow,
            messages.QUIESCE: self._quiesce,
            messages.THAW: self._thaw,
            messages.SHUTDOWN: self._power_off,
            messages.START: lambda _call: {},  # see `_hand_over`
            **self._programs.handlers,
        }

    def forever(self) -> None:
        """Serve one host after the other."""
        while True:
            self.step()

    def step(self) -> bool:
        """Take what the host sends next. False: it hung up, and the next step waits for another."""
        data = self._port.read()
        if not data:
            self._decoder = _decoder()
            self._end_session()
            return False
        try:
            for frame in self._decoder.feed(data):
                self._take(frame)
        except FrameError as error:
            # The stream has no frames any more. Say so to whoever it is, and wait for a host that negotiates.
            self._decoder = _decoder()
            self._reply(Frame(messages.NEGOTIATE, 0, b""), messages.E_INVALID_JSON, str(error))
            self._end_session()
            self._port.begin_session()
        return True

    def _end_session(self) -> None:
        if self._session:
            self._session.end()
            self._session = None

    def _reply(self, frame: Frame, code: int, text: str) -> None:
        session = self._session or Session(self._port, self._port.session)
        session.answer(frame, messages.failure(code, text))

    def _take(self, frame: Frame) -> None:
        if frame.kind in _KNOWN_NOTIFICATIONS:
            self._tell(frame)
        elif frame.kind & messages.KIND_MASK != messages.REQUEST:
            pass  # a response or a notification that nobody waits for
        elif frame.kind == messages.NEGOTIATE:
            self._negotiate(frame)
        elif self._session is None:
            text = f"message {frame.kind:#010x} is not supported before a negotiate"
            body = messages.failure(messages.E_NOT_IMPLEMENTED, text, extension={"Kind": messages.NOT_NEGOTIATED})
            Session(self._port, self._port.session).answer(frame, body)
        elif handler := self._at_once.get(frame.kind):
            if call := self._checked(self._session, frame):
                call.answer(handler(call))
        elif frame.kind == messages.UNIQUE:
            if call := self._checked(self._session, frame):
                # A clone's first request, and nobody waits behind it: another thread would only cost time. But a hook
                # may take as long as it likes.
                (self._hand_over if self._template.has_clone_hooks() else self._work)(call, self._make_unique)
        elif frame.kind == messages.FOLLOW:
            if call := self._checked(self._session, frame):
                self._work(
                    call, self._programs.follow
                )  # it waits for nothing, and the host may end it with the next message
        elif handler := self._in_a_worker.get(frame.kind):
            if call := self._checked(self._session, frame):
                self._hand_over(call, handler)
        else:
            self._reply(frame, messages.E_NOT_IMPLEMENTED, f"message {frame.kind:#010x} is not supported")

    def _checked(self, session: Session, frame: Frame) -> Call | None:
        """The request, or None if it was refused already."""
        try:
            body = frame.body()
        except FrameError as error:
            self._reply(frame, messages.E_INVALID_JSON, str(error))
            return None
        container = body.get("ContainerId", messages.NULL_GUID)
        if container != messages.NULL_GUID:
            self._reply(frame, messages.E_NO_SUCH_SYSTEM, f"there is no container {str(container)[:100]!r}")
            return None
        return Call(session, frame, body)

    def _hand_over(self, call: Call, handler: Handler) -> None:
        give_up: Callable[[], object] = lambda: None  # noqa: E731
        if call.frame.kind in (messages.RUN, messages.START):
            # Known at once: what the host says about the program next may come before a worker has begun.
            try:
                handler, give_up = self._programs.prepared(call)
            except Fault as fault:
                call.refuse(fault)
                return
        elif call.frame.kind in (messages.MODIFY, messages.GROW):
            self._changes = [*(change for change in self._changes if not change.has_ended.is_set()), call]
        elif call.frame.kind == messages.PROBE:
            handler = partial(self._probe, before=self._changes)
        if not self._watch_over(call) or not self._workers.do(lambda: self._work(call, handler)):
            self._end(call)
            give_up()
            call.refuse(
                Fault(f"the agent has no thread free for it: at most {MAX_REQUESTS} requests are under way at once")
            )

    def _watch_over(self, call: Call) -> bool:
        try:
            self._watch.add(call)
        except RuntimeError:  # there is no thread for that either
            return False
        return True

    def _work(self, call: Call, handler: Handler) -> None:
        try:
            call.answer(handler(call))
        except Fault as fault:
            call.refuse(fault)
        except OSError as error:
            call.refuse(Fault(str(error)))
        except Exception as error:  # whatever it is, the host must hear of it
            call.refuse(Fault(f"the agent failed: {type(error).__name__}: {error}", kind="unknown"))
        finally:
            self._end(call)

    def _end(self, call: Call) -> None:
        self._watch.remove(call)
        call.has_ended.set()

    def _negotiate(self, frame: Frame) -> None:
        self._end_session()
        session = Session(self._port, self._port.begin_session())
        try:
            body = frame.body()
        except FrameError as error:
            session.answer(frame, messages.failure(messages.E_INVALID_JSON, str(error)))
            return
        low, high = body.get("MinimumVersion", 0), body.get("MaximumVersion", 0)
        if not isinstance(low, int) or not isinstance(high, int):
            session.answer(frame, messages.failure(messages.E_INVALID_JSON, "the versions are no numbers"))
        elif not low <= messages.PROTOCOL_VERSION <= high:
            text = f"protocol versions {low} to {high} are not supported, {messages.PROTOCOL_VERSION} is"
            session.answer(frame, messages.failure(messages.E_UNSUPPORTED_VERSION, text))
        else:
            self._session = session
            capabilities = {"RuntimeOsType": "linux", messages.EXTENSION: self._about()}
            session.answer(frame, messages.success(Version=messages.PROTOCOL_VERSION, Capabilities=capabilities))

    def _tell(self, frame: Frame) -> None:
        try:
            if self._session:
                body = frame.body()
                self._session.programs.tell(frame.kind, body)
                self._session.follows.tell(frame.kind, body)
        except Exception:
            pass  # it makes no sense, whatever it is: nobody waits for an answer, and others wait for the agent

    def _modify(self, call: Call) -> dict[str, Any]:
        with self._template.changing():
            notes = self._change_disks(call)
        return {messages.EXTENSION: {"Notes": notes}} if notes else {}

    def _change_disks(self, call: Call) -> list[str]:
        request = call.body.get("Request")
        if not isinstance(request, dict):
            raise Fault("a ModifySettings without a Request", code=messages.E_INVALID_JSON, kind="invalid")
        what, resource = request.get("RequestType") or "Add", request.get("ResourceType")
        force = call.extension.get("Force") is True
        match what, resource:
            case "Add", "MappedVirtualDisk":
                return self._disks.add(_settings(request), call.due)
            case "Remove", "MappedVirtualDisk":
                self._disks.remove(_settings(request), call.due, force=force)
            case "Remove", "SCSIDevice":
                self._disks.eject(*_slot(_settings(request)), call.due, force=force)
            case _, "MappedVirtualDisk" | "SCSIDevice":
                raise Fault(f'the RequestType "{what}" is not supported', kind="invalid")
            case _:
                raise Fault(f'the ResourceType "{resource}" is not supported', kind="invalid")
        return []

    def _grow(self, call: Call) -> dict[str, Any]:
        if (to_bytes := call.body.get("Check")) is not None:
            if not isinstance(to_bytes, int):
                raise Fault("Check must be a number of bytes", kind="invalid")
            self._disks.check_grow(*_slot(call.body), to_bytes, call.due)
            return {}
        with self._template.changing():
            return self._disks.grow(*_slot(call.body), call.due)

    def _probe(self, call: Call, *, before: Sequence[Call] = ()) -> dict[str, Any]:
        """What is so when all that was asked for `before` has ended: a host that died may have asked for it."""
        slot = _slot(call.body)
        for change in before:
            if change.slot == slot and not change.has_ended.wait(max(0.0, call.due - time.monotonic())):
                raise Fault(f"another request on the disk at {slot[0]}:{slot[1]} does not end", kind="timeout")
        return self._disks.probe(*slot)

    def _quiesce(self, call: Call) -> dict[str, Any]:
        hold_s = _seconds(call.body.get("HoldMs"), DEFAULT_HOLD_S)
        return self._template.quiesce(call.due, hold_s=hold_s, programs=partial(self._programs.cut_off, call))

    def _thaw(self, call: Call) -> dict[str, Any]:
        self._template.thaw(call.due)
        return {}

    def _make_unique(self, call: Call) -> dict[str, Any]:
        answer = self._template.make_unique(Given.of(call.body), call.due, tell=call.answer)
        self._boot_id = answer["BootId"]
        return answer

    def _about(self) -> dict[str, Any]:
        uptime_ms = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
        return {"Agent": VERSION, "Kernel": self._kernel, "BootId": self._boot_id, "UptimeMs": uptime_ms}

    def _mounts(self, call: Call) -> dict[str, Any]:
        """The mounts whose paths come after `After`, as many as fit a frame; `More` says that there are more."""
        after = call.body.get("After") or ""
        if not isinstance(after, str):
            raise Fault("After must be a guest path", kind="invalid")
        entries = sorted((entry for entry in self._disks.mounts() if entry["MountPath"] > after), key=_path_of)
        page = fitting(entries)
        return {"Mounts": page, "More": len(page) < len(entries)}

    def _power_off(self, call: Call) -> dict[str, Any]:
        try:
            unclean = [text[:_MAX_REASON] for text in self._shutdown(call.due)][:_MAX_HOLDERS]
            call.answer({"Unclean": unclean})
        finally:
            self._turn_off()
        return {}


def _decoder() -> Decoder:
    # A host may die in the middle of a frame, and the next one's negotiate follow with nothing between.
    return Decoder(anew_at=messages.NEGOTIATE)


def _expire(call: Call) -> None:
    text = f"it was not done within {call.seconds:g} s, and its end is not in sight"
    call.refuse(Fault(text, kind="timeout"))


def _path_of(entry: dict[str, Any]) -> str:
    return str(entry["MountPath"])


def _settings(request: dict[str, Any]) -> dict[str, Any]:
    """The Settings, each member of the type that GCS gives it.

    Raises:
        Fault: one is not.
    """
    settings = request.get("Settings") or {}
    if not isinstance(settings, dict):
        raise Fault("Settings must be an object", code=messages.E_INVALID_JSON, kind="invalid")
    given = {name: value for name, value in settings.items() if value is not None}
    for name, value in given.items():
        wanted = _SETTINGS.get(name, object)
        if isinstance(wanted, range):
            is_right = isinstance(value, int) and not isinstance(value, bool) and value in wanted
        elif wanted is list:
            is_right = isinstance(value, list) and all(isinstance(word, str) for word in value)
        else:
            is_right = isinstance(value, wanted)
        if not is_right:
            what = f"a number of 0 to {wanted[-1]}" if isinstance(wanted, range) else f"a {wanted.__name__}"
            text = f"{name} must be {what}, and is {str(value)[:100]!r}"
            raise Fault(text, code=messages.E_INVALID_JSON, kind="invalid")
    return given


def _slot(body: dict[str, Any]) -> tuple[int, int]:
    controller, lun = body.get("Controller", 0), body.get("Lun", 0)
    if not isinstance(controller, int) or not isinstance(lun, int):
        raise Fault("Controller and Lun must be numbers", code=messages.E_INVALID_JSON, kind="invalid")
    return controller, lun


def _seconds(milliseconds: object, default: float) -> float:
    """A time that the host gave: its own, or `default` if it says nothing that makes sense."""
    if not isinstance(milliseconds, int | float) or isinstance(milliseconds, bool):
        return default
    return min(max(milliseconds / 1000, 0.0), MAX_DEADLINE_S)
