"""The synchronous API has what the asynchronous one has, and its calls can be made from anywhere."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, assert_type

import pytest

import utilityvm
from utilityvm import sync
from utilityvm.errors import InvalidRequest, VMNotFound, WrongLoop
from utilityvm.sync import generate, portal

OPERATORS = {"__aenter__": "__enter__", "__aexit__": "__exit__", "__aiter__": "__iter__", "__anext__": "__next__"}
RENAMED = {**OPERATORS, "aclose": "close"}


def members(kind: type) -> dict[str, Any]:
    found = {name: inspect.getattr_static(kind, name) for name in dir(kind)}
    return {name: thing for name, thing in found.items() if not name.startswith("_") or name in OPERATORS}


def test_every_public_name_is_there() -> None:
    assert set(sync.__all__) == set(utilityvm.__all__) - generate.LEFT_OUT
    for name in sync.__all__:
        assert getattr(sync, name) is not None
        assert name in dir(sync)
        if name not in (*generate.CLASSES, *generate.FUNCTIONS):
            assert getattr(sync, name) is getattr(utilityvm, name)


def test_nothing_that_has_to_be_awaited_is_left() -> None:
    """A class or a function that is asynchronous has a synchronous counterpart, or is left out by name."""
    for name in set(utilityvm.__all__) - generate.LEFT_OUT - {"errors"}:
        thing = getattr(sync, name)
        is_public_class = inspect.isclass(thing) and thing.__module__.startswith("utilityvm")
        for part in [thing, *(members(thing).values() if is_public_class else ())]:
            part = getattr(part, "__func__", part)
            assert not inspect.iscoroutinefunction(part), (name, part)
            assert not inspect.isasyncgenfunction(part), (name, part)


@pytest.mark.parametrize("name", generate.CLASSES)
def test_each_class_has_the_members_of_the_asynchronous_one(name: str) -> None:
    ours, theirs = getattr(sync, name), getattr(utilityvm, name)
    wanted = {RENAMED.get(member, member): thing for member, thing in members(theirs).items()}
    for owner, member in generate.DEPRECATED:
        if owner == name:
            del wanted[member]
    given = {**members(ours), **{one: getattr(ours, one) for one in OPERATORS.values() if hasattr(ours, one)}}
    assert set(given) - set(generate.ATTRIBUTES.get(name, ())) == set(wanted) - set(generate.ATTRIBUTES.get(name, ()))
    for member, thing in wanted.items():
        other = given[member]
        assert isinstance(other, property) == isinstance(thing, property), member
        assert isinstance(other, classmethod) == isinstance(thing, classmethod), member
        if isinstance(thing, property) or member.startswith("__"):
            continue
        theirs_of, ours_of = (inspect.signature(getattr(one, "__func__", one)) for one in (thing, other))
        for parameter in theirs_of.parameters.values():
            if parameter.name in ours_of.parameters:
                assert ours_of.parameters[parameter.name].default == parameter.default, (member, parameter.name)
                assert ours_of.parameters[parameter.name].kind is parameter.kind, (member, parameter.name)
            else:
                assert "settings" in ours_of.parameters, (member, parameter.name)
        assert bool(inspect.getdoc(other)) == bool(inspect.getdoc(thing)), member


@pytest.mark.parametrize("name", generate.CLASSES)
def test_each_attribute_that_a_constructor_sets_is_there(name: str) -> None:
    kind = getattr(utilityvm, name)
    init = inspect.unwrap(kind.__init__)
    set_there = {word for word in init.__code__.co_names if not word.startswith("_")}
    stored = {
        instruction.argval
        for instruction in __import__("dis").get_instructions(init)
        if instruction.opname == "STORE_ATTR" and not instruction.argval.startswith("_")
    }
    assert stored <= set_there | stored
    assert stored <= set(members(getattr(sync, name))), "give its type in generate.ATTRIBUTES"


async def twice(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


def test_a_call_waits_for_its_result_and_raises_its_error() -> None:
    assert portal.call(twice, 4) == 8
    assert portal.call(lambda: 5) == 5
    with pytest.raises(VMNotFound):
        sync.UtilityVM.open("nobody")
    with pytest.raises(InvalidRequest):
        sync.UtilityVM.open("nobody", wait_s=-1)


def test_threads_call_at_the_same_time() -> None:
    """Each waits until the other's call has begun, so one after the other they would not end."""
    both = asyncio.Barrier(2)
    threads = [threading.Thread(target=portal.call, args=(both.wait,), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_where_an_event_loop_runs_it_can_be_called_too() -> None:
    """As in Jupyter."""

    async def cell() -> Any:
        return portal.call(twice, 1)

    assert asyncio.run(cell()) == 2


def test_a_call_in_the_loops_own_thread_is_refused() -> None:
    with pytest.raises(WrongLoop):
        portal.call(lambda: portal.call(twice, 1))


def test_the_callers_context_is_that_of_the_call() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("mine")
    assert portal.call(variable.get) == "mine"


def test_ctrl_c_cancels_the_call_and_waits_until_it_has_cleaned_up() -> None:
    seen: list[str] = []

    async def work() -> None:
        threading.main_thread()
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            seen.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        portal.call(work)
    assert seen == ["cleaned up"]


def test_a_callers_functions_may_block_and_make_calls() -> None:
    got: list[object] = []

    async def stream(stdin: AsyncIterator[bytes], stdout: Callable[[bytes], Any]) -> None:
        async for piece in stdin:
            await stdout(piece)

    def slow(data: bytes) -> None:
        time.sleep(0.01)
        got.append((data, portal.call(twice, 1)))

    portal.call(lambda: stream(portal.feed(iter([b"a", b"b"])), portal.sink(slow)))
    assert got == [(b"a", 2), (b"b", 2)]
    with pytest.raises(ZeroDivisionError):
        portal.call(lambda: stream(portal.feed([b"a"]), portal.sink(lambda _: 1 // 0)))


def test_a_fork_has_a_loop_of_its_own() -> None:
    portal.call(twice, 1)
    if (child := os.fork()) == 0:
        os._exit(portal.call(twice, 21))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42


def test_a_list_of_what_has_a_face_comes_as_faces() -> None:
    made = utilityvm.ScsiEvents(time.time)
    first, second = portal.call(lambda: [made, made])
    assert isinstance(first, sync.ScsiEvents)
    assert first == second
    assert hash(first) == hash(second)
    assert first != portal.call(lambda: utilityvm.ScsiEvents(time.time))
    first.close()
    assert list(first) == []


def typed(vm: sync.UtilityVM) -> None:
    """For the type checkers alone."""
    with sync.UtilityVM.start("worker") as started:
        assert_type(started, sync.UtilityVM)
    assert_type(vm.add_scsi("a", "/a"), sync.MountedDisk)
    assert_type(vm.add_scsi("a"), sync.SCSIMount)
    assert_type(vm.run(["a"], text=True).stdout, str)
    assert_type(vm.run(["a"]).stdout, bytes)
    assert_type(sync.connect().vm("worker").run(["a"]).exit_code, int)
    assert_type(sync.VMConfig(name="worker"), utilityvm.VMConfig)
