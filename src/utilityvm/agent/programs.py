"""What the requests about programs do: those that end with their session, and those that are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from utilityvm.agent.faults import Fault
from utilityvm.agent.kept import Follow, Kept
from utilityvm.agent.run import number_of, process_number
from utilityvm.agent.template import Template
from utilityvm.bridge import messages

if TYPE_CHECKING:
    from utilityvm.agent.serve import Call, Handler, Session

_PAGE_BYTES: Final = 32768  # of a list in one answer


class ProgramCalls:
    """Their handlers. A program is not started while the VM is frozen."""

    def __init__(self, template: Template, kept: Kept) -> None:
        self._template = template
        self._kept = kept
        self.handlers: dict[int, Handler] = {
            messages.PROGRAMS: self._list,
            messages.SIGNAL: self._signal,
            messages.RESIZE: self._resize,
            messages.KILL: self._kill,
            messages.FORGET: self._forget,
        }

    def prepared(self, call: Call) -> tuple[Handler, Callable[[], object]]:
        """What starts the program of a RUN or a START request, and what gives it up if that cannot be called.

        The host can speak of its process from now on.

        Raises:
            Fault: the request is wrong, or the VM is frozen.
        """
        with self._template.changing():
            return (self._run if call.frame.kind == messages.RUN else self._start)(call)

    def follow(self, call: Call) -> dict[str, Any]:
        """Handles FOLLOW. It waits for nothing."""
        kept = self._kept.get(call.body)
        follow = _new_follow(call.session, call.body)
        try:
            return {"Program": kept.told(), **follow.begin(kept)}
        except BaseException:
            follow.stop()
            raise

    def cut_off(self, call: Call) -> list[str]:
        """The programs that would lose their host if the VM ended now, for people."""
        return [*call.session.programs.running(), *self._kept.followed()]

    def _run(self, call: Call) -> tuple[Handler, Callable[[], object]]:
        if call.session.follows.has(process_number(call.body)):
            raise Fault(f"process {call.body['Process']} runs already", kind="invalid")
        program = call.session.programs.take(call.body)

        def start(_call: Call) -> dict[str, Any]:
            program.start()
            return {}

        return start, program.give_up

    def _start(self, call: Call) -> tuple[Handler, Callable[[], object]]:
        wanted = call.body.get("Follow")
        follow = _new_follow(call.session, wanted) if isinstance(wanted, dict) else None

        def give_up() -> None:
            if follow:
                follow.stop()

        def start(call: Call) -> dict[str, Any]:
            try:
                with self._template.changing():
                    return self._kept.start(call.body, follow)
            except BaseException:
                give_up()
                raise

        return start, give_up

    def _list(self, call: Call) -> dict[str, Any]:
        after = number_of(call.body.get("After", 0), 1 << 62, lowest=0, what="After")
        found = self._kept.after(after)
        page = fitting(kept.told() for kept in found)
        return {"Programs": page, "More": len(page) < len(found)}

    def _signal(self, call: Call) -> dict[str, Any]:
        self._kept.signal(call.body)
        return {}

    def _resize(self, call: Call) -> dict[str, Any]:
        self._kept.resize(call.body)
        return {}

    def _kill(self, call: Call) -> dict[str, Any]:
        self._kept.kill(call.body, call.due)
        return {}

    def _forget(self, call: Call) -> dict[str, Any]:
        self._kept.forget(call.body)
        return {}


def fitting(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first entries, as many as fit an answer; at least one if there is one."""
    size = 0
    taken: list[dict[str, Any]] = []
    for entry in entries:
        size += len(json.dumps(entry))
        if taken and size > _PAGE_BYTES:
            break
        taken.append(entry)
    return taken


def _new_follow(session: Session, body: dict[str, Any]) -> Follow:
    if session.programs.has(process_number(body)):
        raise Fault(f"process {body['Process']} runs already", kind="invalid")
    return session.follows.new(body, session.notify)
