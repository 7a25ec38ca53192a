"""The contract of the backends: what every `HostBackend` and every `GuestBackend` does, as rules that can be tried.

    class MyVM(ContractVM): ...            # a VM on your backends

    @asynccontextmanager
    async def make() -> AsyncIterator[ContractVM]:
        yield MyVM()                       # started here, ended after the block

    await check_host_backend(make)
    await check_guest_backend(make)

The fakes of `utilityvm.testing` and the real backends keep the same rules: what is true of one is true of the others.
No test framework is needed. With pytest, `HOST_RULES` and `GUEST_RULES` give a test for each rule: a coroutine function
of a VM without disks, which it leaves without disks.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from types import ModuleType
from typing import Final, TypeAlias

from utilityvm.testing.contract import guest, host
from utilityvm.testing.contract.check import NotTried
from utilityvm.testing.contract.vm import ContractVM

Rule: TypeAlias = Callable[[ContractVM], Awaitable[None]]
MakeVM: TypeAlias = Callable[[], AbstractAsyncContextManager[ContractVM]]


def _rules(module: ModuleType) -> dict[str, Rule]:
    own = inspect.getmembers_static(module, inspect.iscoroutinefunction)
    return {name: rule for name, rule in own if rule.__module__ == module.__name__ and not name.startswith("_")}


HOST_RULES: Final[Mapping[str, Rule]] = _rules(host)
GUEST_RULES: Final[Mapping[str, Rule]] = _rules(guest)


async def check_host_backend(make_vm: MakeVM) -> list[str]:
    """Try every rule of host backends, each on a VM of its own. Says which could not be tried, and why, a line each.

    Raises:
        AssertionError: a rule does not hold; a note names it.
        others: what a step raised that should have been done.
    """
    return await _check(HOST_RULES, make_vm)


async def check_guest_backend(make_vm: MakeVM) -> list[str]:
    """Try every rule of guest backends. See `check_host_backend`."""
    return await _check(GUEST_RULES, make_vm)


async def _check(rules: Mapping[str, Rule], make_vm: MakeVM) -> list[str]:
    not_tried = []
    for name, rule in rules.items():
        try:
            async with make_vm() as vm:
                await rule(vm)
                left = await vm.left()
                assert not left, f"left in the VM: {', '.join(left)}"
        except NotTried as why:
            not_tried.append(f"{name}: {why}")
        except Exception as error:
            error.add_note(f"rule: {name.replace('_', ' ')}")
            raise
    return not_tried


__all__ = ["GUEST_RULES", "HOST_RULES", "ContractVM", "NotTried", "check_guest_backend", "check_host_backend"]
