"""Answers the bridge: every request once, with its id, in whatever order the work is done.

A *session* is one host on the port. It begins with a negotiate request and ends when the host hangs up, or when another
negotiate request comes: over virtio-serial a host that went and came again may be seen as no interruption at all, so a
second negotiate is a new host and not a mistake. (The real guest, whose connections cannot blend, refuses it.) Programs
that the host runs end with the session; mounts stay.
"""

from __future__ import annotations

import base64
import binascii
import os
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from utilityvm.agent.faults import Fault
from utilityvm.agent.port import Port
from utilityvm.agent.run import Programs
from utilityvm.agent.workers import Workers
from utilityvm.bridge import messages
from utilityvm.bridge.frame import Decoder, Frame, FrameError, encode, guest_json

DEFAULT_DEADLINE_S: Final = 60.0
MAX_DEADLINE_S: Final = 600.0
MAX_REQUESTS: Final = 512  # under way at once
_NEGOTIATE_HEAD: Final = messages.NEGOTIATE.to_bytes(4, "little")


class Disks(Protocol):
    """The disk side of the agent."""

    def add(self, settings: dict[str, Any], deadline: float) -> None: ...
    def remove(self, settings: dict[str, Any], deadline: float, *, force: bool = False) -> None: ...
    def eject(self, controller: int, lun: int, deadline: float, *, force: bool = False) -> None: ...
    def probe(self, controller: int, lun: int) -> dict[str, Any]: ...
    def grow(self, controller: int, lun: int, deadline: float) -> dict[str, Any]: ...
    def mounts(self) -> list[dict[str, Any]]: ...


class Session:
    """One host that negotiated; `number` is the port's name for it."""

    def __init__(self, port: Port, number: int) -> None:
        self._port = port
        self.number = number
        self.programs = Programs(self.notify)

    def send(self, kind: int, id: int, body: dict[str, Any]) -> bool:
        return self._port.write(encode(kind, id, guest_json(body)), session=self.number)

    def notify(self, kind: int, body: dict[str, Any]) -> bool:
        return self.send(kind, 0, body)


class Serve:
    """The bridge's guest end on one port."""

    def __init__(self, port: Port, disks: Disks, *, shutdown: Callable[[], None]) -> None:
        self._port = port
        self._disks = disks
        self._shutdown = shutdown
        self._workers = Workers(at_most=MAX_REQUESTS)
        self._decoder = Decoder()
        self._session: Session | None = None
        self._handlers: dict[int, Callable[[Session, dict[str, Any]], dict[str, Any]]] = {
            messages.MODIFY: self._modify,
            messages.RUN: self._run,
            messages.RUN_INPUT: self._run_input,
            messages.RUN_SIGNAL: self._run_signal,
            messages.PROBE: self._probe,
            messages.MOUNTS: lambda _session, _body: {"Mounts": self._disks.mounts()},
            messages.GROW: self._grow,
            messages.SHUTDOWN: self._power_off,
        }

    def forever(self) -> None:
        """Serve one host after the other."""
        while True:
            self.step()

    def step(self) -> bool:
        """Take what the host sent. False: it hung up; the next step waits for the next."""
        data = self._port.read()
        if not data:
            self._end_session()
            self._port.wait_host()
            return False
        if not self._decoder.is_between_frames and data.startswith(_NEGOTIATE_HEAD):
            # A host died in the middle of a frame, and this is the next one's first.
            self._decoder = Decoder()
        try:
            for frame in self._decoder.feed(data):
                self._take(frame)
        except FrameError as error:
            # The stream has no beginning any more. What the host sends next is lost until it negotiates anew.
            self._decoder = Decoder()
            self._refuse_stream(error)
        return True

    def _end_session(self) -> None:
        self._decoder = Decoder()
        if self._session:
            self._session.programs.end_all()
            self._session = None

    def _refuse_stream(self, error: FrameError) -> None:
        session = self._session or Session(self._port, self._port.session)
        body = messages.failure(messages.E_INVALID_JSON, str(error))
        session.send(messages.response_to(messages.NEGOTIATE), 0, body)
        self._end_session()

    def _take(self, frame: Frame) -> None:
        if frame.kind == messages.RUN_CREDIT:
            self._add_credit(frame)
            return
        if frame.kind & messages.KIND_MASK != messages.REQUEST:
            return  # a response or a notification that we never asked for
        if frame.kind == messages.NEGOTIATE:
            self._negotiate(frame)
            return
        session = self._session
        handler = self._handlers.get(frame.kind) if session else None
        if frame.kind == messages.PING and session:
            self._answer(session, frame, lambda _session, _body: self._about())
        elif session is None or handler is None:
            reply = session or Session(self._port, self._port.session)
            text = f"message {frame.kind:#010x} is not supported" + ("" if session else " before a negotiate")
            body = messages.failure(messages.E_NOT_IMPLEMENTED, text)
            reply.send(messages.response_to(frame.kind), frame.id, body)
        elif not self._workers.do(lambda: self._answer(session, frame, handler)):
            body = messages.failure(messages.E_FAIL, f"{MAX_REQUESTS} requests are under way and none ends")
            session.send(messages.response_to(frame.kind), frame.id, body)

    def _answer(
        self, session: Session, frame: Frame, handler: Callable[[Session, dict[str, Any]], dict[str, Any]]
    ) -> None:
        activity = messages.NULL_GUID
        try:
            body = _checked(frame)
            activity = body.get("ActivityId", activity)
            answer = messages.success(activity, **handler(session, body))
        except Fault as fault:
            extension = {"Kind": fault.kind, "Holders": fault.holders}
            answer = messages.failure(fault.code, fault.message, activity=activity, extension=extension)
        except OSError as error:
            answer = messages.failure(messages.E_FAIL, str(error), activity=activity)
        except Exception as error:  # whatever it is, the host must hear of it
            text = f"the agent failed: {type(error).__name__}: {error}"
            answer = messages.failure(messages.E_FAIL, text, activity=activity, extension={"Kind": "unknown"})
        session.send(messages.response_to(frame.kind), frame.id, answer)

    def _negotiate(self, frame: Frame) -> None:
        self._end_session()
        session = Session(self._port, self._port.begin_session())
        try:
            body = frame.body()
            low, high = int(body.get("MinimumVersion", 0)), int(body.get("MaximumVersion", 0))
            if not low <= messages.PROTOCOL_VERSION <= high:
                text = f"protocol versions {low} to {high} are not supported, {messages.PROTOCOL_VERSION} is"
                raise Fault(text, code=messages.E_UNSUPPORTED_VERSION)
        except (Fault, FrameError, TypeError, ValueError) as error:
            code = error.code if isinstance(error, Fault) else messages.E_INVALID_JSON
            session.send(messages.response_to(frame.kind), frame.id, messages.failure(code, str(error)))
            return
        self._session = session
        capabilities = {"RuntimeOsType": "linux", messages.EXTENSION: {"Agent": 1, **self._about()}}
        answer = messages.success(Version=messages.PROTOCOL_VERSION, Capabilities=capabilities)
        session.send(messages.response_to(frame.kind), frame.id, answer)

    def _about(self) -> dict[str, Any]:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot_id = file.read().strip()
        return {"BootId": boot_id, "Kernel": os.uname().release}

    def _add_credit(self, frame: Frame) -> None:
        try:
            body = frame.body()
            if self._session:
                self._session.programs.get(body).add_credit(int(body["Bytes"]))
        except (Fault, FrameError, KeyError, TypeError, ValueError):
            pass  # the program ended first, or nonsense: there is nobody to answer

    def _modify(self, session: Session, body: dict[str, Any]) -> dict[str, Any]:
        request = body.get("Request")
        if not isinstance(request, dict):
            raise Fault("a ModifySettings without a Request", code=messages.E_INVALID_JSON, kind="invalid")
        what, resource = request.get("RequestType") or "Add", request.get("ResourceType")
        settings = request.get("Settings") or {}
        extension = body.get(messages.EXTENSION) or {}
        if not isinstance(settings, dict) or not isinstance(extension, dict):
            raise Fault("Settings must be an object", code=messages.E_INVALID_JSON, kind="invalid")
        for name in ("Lun", "Controller"):
            value = settings.get(name, 0)
            if not isinstance(value, int) or not 0 <= value <= 255:
                raise Fault(f"{name} {value!r} is no number of 0 to 255", code=messages.E_INVALID_JSON, kind="invalid")
        deadline, force = _deadline(extension), bool(extension.get("Force"))
        match what, resource:
            case "Add", "MappedVirtualDisk":
                self._disks.add(settings, deadline)
            case "Remove", "MappedVirtualDisk":
                self._disks.remove(settings, deadline, force=force)
            case "Remove", "SCSIDevice":
                self._disks.eject(settings.get("Controller", 0), settings.get("Lun", 0), deadline, force=force)
            case _, "MappedVirtualDisk" | "SCSIDevice":
                raise Fault(f'the RequestType "{what}" is not supported', kind="invalid")
            case _:
                raise Fault(f'the ResourceType "{resource}" is not supported', kind="invalid")
        return {}

    def _run(self, session: Session, body: dict[str, Any]) -> dict[str, Any]:
        return session.programs.start(body)

    def _run_input(self, session: Session, body: dict[str, Any]) -> dict[str, Any]:
        try:
            data = base64.b64decode(body.get("Data", ""), validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise Fault(f"Data is not base64: {error}", kind="invalid") from None
        session.programs.get(body).write(data, last=bool(body.get("Eof")))
        return {}

    def _run_signal(self, session: Session, body: dict[str, Any]) -> dict[str, Any]:
        session.programs.get(body).signal(int(body.get("Signal", 9)))
        return {}

    def _probe(self, session: Session, body: dict[str, Any]) -> dict[str, Any]:
        return self._disks.probe(int(body.get("Controller", 0)), int(body.get("Lun", 0)))

    def _grow(self, session: Session, body: dict[str, Any]) -> dict[str, Any]:
        deadline = _deadline(body.get(messages.EXTENSION) or {})
        return self._disks.grow(int(body.get("Controller", 0)), int(body.get("Lun", 0)), deadline)

    def _power_off(self, session: Session, body: dict[str, Any]) -> dict[str, Any]:
        self._shutdown()
        return {}


def _checked(frame: Frame) -> dict[str, Any]:
    try:
        body = frame.body()
    except FrameError as error:
        raise Fault(str(error), code=messages.E_INVALID_JSON, kind="invalid") from None
    container = body.get("ContainerId", messages.NULL_GUID)
    if container != messages.NULL_GUID:
        raise Fault(f"there is no container {container!r}", code=messages.E_NO_SUCH_SYSTEM, kind="not_found")
    return body


def _deadline(extension: dict[str, Any]) -> float:
    try:
        seconds = float(extension.get("TimeoutMs", DEFAULT_DEADLINE_S * 1000)) / 1000
    except (TypeError, ValueError):
        raise Fault("TimeoutMs is no number", kind="invalid") from None
    return time.monotonic() + min(max(seconds, 0.0), MAX_DEADLINE_S)
