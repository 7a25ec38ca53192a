"""How this VM becomes a template, and how a clone becomes itself.

A template is this VM frozen, stopped and saved by the host, programs and all; every clone goes on from that instant.
While it is frozen nothing may be changed. If the host says nothing more the VM is freed again after a while; that time
stands still while the VM is stopped, and in a clone it ends when the clone is made itself.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from utilityvm.agent import hooks
from utilityvm.agent.faults import Fault
from utilityvm.agent.freezing import Freezer
from utilityvm.agent.identity import Given, Identity
from utilityvm.agent.watch import Watch

_MAX_HOLD_S: Final = 3600.0
_HOOKS_S: Final = 30.0  # for those that are told `thaw` without a host that waits for them
_MAX_TOLD: Final = 50
_FROZEN: Final = "the VM is frozen to become a template, or is just being frozen: nothing may be changed"


class Template:
    """This VM, running or frozen. Thread-safe."""

    def __init__(self, freezer: Freezer, identity: Identity, *, folder: str = hooks.FOLDER) -> None:
        self._freezer = freezer
        self._identity = identity
        self._folder = folder
        self._turn = threading.Lock()  # guards the three below, and the freezer and the identity
        self._gate = _Gate()
        self._told: list[str] = []  # the hooks that were told `save`
        self._clone_hooks: list[str] | None = None  # known since it was frozen
        self._hold: _Hold | None = None  # while it is frozen
        self._watch = Watch(self._free)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Something is changed within; the VM is not frozen meanwhile.

        Raises:
            Fault: it is frozen.
        """
        self._gate.enter()
        try:
            yield
        finally:
            self._gate.leave()

    def quiesce(self, deadline: float, *, hold_s: float, programs: Callable[[], Sequence[str]]) -> dict[str, Any]:
        """Freeze. Frozen is done already, and is held anew. On a fault everything goes on as before.

        Raises:
            Fault: a program of the host's runs (`programs` names them), a hook or the kernel refused.
        """
        with self._taking_turns(deadline):
            flushed: list[str] = []
            if self._hold is None:
                self._gate.close(deadline)
                try:
                    if running := programs():
                        text = "programs that the host runs would be cut off in a template"
                        raise Fault(text, kind="busy", holders=running)
                    flushed = self._freeze(deadline)
                except BaseException:
                    self._gate.open()
                    raise
            self._hold = _Hold(time.monotonic() + min(hold_s, _MAX_HOLD_S))
            self._watch.add(self._hold)
            return {"Flushed": flushed[:_MAX_TOLD]}

    def thaw(self, deadline: float) -> None:
        """Go on as before. Not frozen is done already.

        Raises:
            Fault: a file system stays frozen, or a hook failed after all were thawed.
        """
        with self._taking_turns(deadline):
            self._end_hold()
            self._thaw(deadline)

    def has_clone_hooks(self) -> bool:
        """Will `make_unique` run programs? Without them it takes no time to speak of."""
        return bool(self._hooks_of_clone())

    def _hooks_of_clone(self) -> list[str]:
        return hooks.found(self._folder) if self._clone_hooks is None else self._clone_hooks

    def make_unique(
        self, given: Given, deadline: float, *, tell: Callable[[dict[str, Any]], None] = lambda _answer: None
    ) -> dict[str, Any]:
        """Be a clone of its own: draw anew, take name and ids, thaw, and tell the hooks. May be done again.

        `tell` gets the answer as soon as the clone is its own, and may have got it when a fault is raised: the thaw
        needs the disks, and whoever asks for something next waits for it anyway. If that fails nothing may be changed.

        Raises:
            Fault: a step failed, named; the clone is not fit to be used.
        """
        with self._taking_turns(deadline):
            self._identity.draw_anew(given)
            paths = self._hooks_of_clone()
            if paths or not self._identity.is_in_memory:
                self._end_hold()
                self._freezer.thaw()
                boot_id = self._identity.become(given)
            else:
                boot_id = self._identity.become(given)
                tell({"BootId": boot_id})
                self._end_hold()
                try:
                    self._freezer.thaw()
                except Fault as fault:
                    self._gate.say(f"the clone is not fit to be used: {fault.message}")
                    raise
            self._told.clear()
            self._clone_hooks = None
            self._gate.open()
            if paths:
                env = {"UTILITYVM_NAME": given.hostname, "UTILITYVM_MACHINE_ID": given.machine_id}
                hooks.run(paths, hooks.CLONE, deadline, env=env)
            return {"BootId": boot_id}

    def _freeze(self, deadline: float) -> list[str]:
        try:
            for path in hooks.found(self._folder):
                self._told.append(path)  # also the one that fails may have begun
                hooks.run([path], hooks.SAVE, deadline)
            self._clone_hooks = hooks.found(self._folder)
            self._identity.prepare()
            # What is garbage now would be in every clone, and its collector would copy each page that it looks at.
            gc.collect()
            gc.freeze()
            return self._freezer.freeze(deadline)
        except BaseException:
            self._thaw(time.monotonic() + _HOOKS_S, is_undone=True)
            raise

    def _thaw(self, deadline: float, *, is_undone: bool = False) -> None:
        try:
            self._freezer.thaw()
        finally:
            gc.unfreeze()
            self._gate.open()
            told, self._told, self._clone_hooks = self._told[::-1], [], None
            failures = []
            for path in told:
                try:
                    hooks.run([path], hooks.THAW, deadline)
                except Fault as fault:
                    failures.append(fault)
            if failures and not is_undone:
                raise failures[0]

    def _end_hold(self) -> None:
        if self._hold:
            self._watch.remove(self._hold)
            self._hold = None

    def _free(self, hold: _Hold) -> None:
        """The host has said nothing more for too long."""
        with self._turn:
            if self._hold is hold:
                self._hold = None
                try:
                    self._thaw(time.monotonic() + _HOOKS_S)
                except Fault:
                    pass  # nobody is there to hear of it

    @contextmanager
    def _taking_turns(self, deadline: float) -> Iterator[None]:
        if not self._turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise Fault("another request to freeze or thaw does not end", kind="timeout")
        try:
            yield
        finally:
            self._turn.release()


class _Hold:
    """How long the VM stays frozen for a host that says nothing more; for `Watch`."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline


class _Gate:
    """Lets in those who change something, or, once closed, nobody."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._is_closed = False
        self._why = _FROZEN

    def enter(self) -> None:
        with self._changed:
            if self._is_closed:
                raise Fault(self._why)
            self._inside += 1

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def close(self, deadline: float) -> None:
        """Let nobody in any more, and wait until nobody is inside.

        Raises:
            Fault: somebody stays inside; it is open again.
        """
        with self._changed:
            self._is_closed, self._why = True, _FROZEN
            if not self._changed.wait_for(lambda: not self._inside, max(0.0, deadline - time.monotonic())):
                self._is_closed = False
                raise Fault("a request that changes disks does not end", kind="timeout")

    def say(self, why: str) -> None:
        """What is told to those who are not let in, until it is closed anew."""
        with self._changed:
            self._why = why

    def open(self) -> None:
        with self._changed:
            self._is_closed = False
