"""computecore.dll, Windows' way to HCS, by ctypes: the functions that are used here, typed, and a VM on top of them.

HCS works by operations: a call begins one, and its result is waited for and asked for. A wait blocks a thread of its
own pool, and the event loop goes on. Waiting ends when the caller's time does, and the operation stays open: closing
it would cancel it, and nobody would know what became of it (see `system`).

Never run on Windows. Its tests hand it a stand-in for the library, made of callbacks with these very signatures.

Source: Microsoft, "Host Compute System API reference" (computecore.h); texts that HCS returns are freed by LocalFree.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Self

from utilityvm.errors import AccessDenied, SetupError, UtilityVMError, VMNotFound
from utilityvm.hosts.hcs.system import (
    E_ACCESSDENIED,
    HCS_E_ACCESS_DENIED,
    HCS_E_OPERATION_TIMEOUT,
    HCS_E_SYSTEM_NOT_FOUND,
    failure,
)

GENERIC_ALL: Final = 0x10000000
INFINITE: Final = 0xFFFFFFFF
_WAITERS: Final = 64

HRESULT = ctypes.c_int32
HCS_SYSTEM = ctypes.c_void_p
HCS_OPERATION = ctypes.c_void_p
HANDLE = ctypes.c_void_p
DWORD = ctypes.c_uint32
PCWSTR = ctypes.c_wchar_p
PWSTR = ctypes.c_void_p  # a text that HCS made, to be freed: not c_wchar_p, which would copy it and lose the address

# What each function takes, and what it gives back.
SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "HcsCreateOperation":            (HCS_OPERATION, (ctypes.c_void_p, ctypes.c_void_p)),
    "HcsCloseOperation":             (None,          (HCS_OPERATION,)),
    "HcsGetOperationResult":         (HRESULT,       (HCS_OPERATION, ctypes.POINTER(PWSTR))),
    "HcsWaitForOperationResult":     (HRESULT,       (HCS_OPERATION, DWORD, ctypes.POINTER(PWSTR))),
    "HcsOpenComputeSystem":          (HRESULT,       (PCWSTR, DWORD, ctypes.POINTER(HCS_SYSTEM))),
    "HcsCloseComputeSystem":         (None,          (HCS_SYSTEM,)),
    "HcsModifyComputeSystem":        (HRESULT,       (HCS_SYSTEM, HCS_OPERATION, PCWSTR, HANDLE)),
    "HcsGetComputeSystemProperties": (HRESULT,       (HCS_SYSTEM, HCS_OPERATION, PCWSTR)),
    "HcsGrantVmAccess":              (HRESULT,       (PCWSTR, PCWSTR)),
    "HcsRevokeVmAccess":             (HRESULT,       (PCWSTR, PCWSTR)),
    "HcsGrantVmGroupAccess":         (HRESULT,       (PCWSTR,)),
    "HcsRevokeVmGroupAccess":        (HRESULT,       (PCWSTR,)),
}  # fmt: skip


class ComputeCore:
    """The functions by their names, with their types set. A function that this Windows lacks is named when called."""

    def __init__(self, library: object, *, free: Callable[[int], object]) -> None:
        """`library` is what ctypes loads; `free` is given the address of each text that it returned. See `load`."""
        self._library = library
        self._free = free
        self._functions: dict[str, Callable[..., Any]] = {}

    @classmethod
    def load(cls) -> Self:
        """The library of this Windows.

        Raises:
            SetupError: this is no Windows, or it has no HCS.
        """
        loader = getattr(ctypes, "WinDLL", None)
        if loader is None:
            raise SetupError(
                "HCS is a part of Windows, and this is none", remedy="use the QEMU host, which runs on Linux"
            )
        try:
            library = loader("computecore.dll", winmode=0x800)  # LOAD_LIBRARY_SEARCH_SYSTEM32
            local_free = loader("kernel32.dll", winmode=0x800).LocalFree
        except OSError as error:
            raise SetupError(
                f"computecore.dll cannot be loaded: {error}",
                remedy="turn on the Windows features Hyper-V and Containers (Windows 10 1809, Server 2019, or newer)",
            ) from error
        local_free.restype, local_free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
        return cls(library, free=local_free)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of `SIGNATURES`. Blocks for as long as it does.

        Raises:
            SetupError: this Windows does not have it.
        """
        if (function := self._functions.get(name)) is None:
            try:
                function = getattr(self._library, name)
            except AttributeError as error:
                raise SetupError(f"this Windows has no {name}", remedy="use a newer one") from error
            function.restype, function.argtypes = SIGNATURES[name]
            self._functions[name] = function
        return function(*arguments)

    def take(self, text: ctypes.c_void_p) -> str:
        """The text that a function returned, which is freed."""
        if not text.value:
            return ""
        try:
            return ctypes.wstring_at(text.value)
        finally:
            self._free(text.value)


class HcsOperation:
    """An operation that was begun. Closed when it has been answered, or with its system."""

    def __init__(self, system: HcsSystem, handle: int, what: str) -> None:
        self._system = system
        self._handle: int | None = handle
        self._what = what
        self._answer: str | UtilityVMError | None = None
        self._waiting: asyncio.Future[None] | None = None

    async def result(self, *, timeout_s: float) -> str:
        """See `system.Operation.result`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self._answer is None:
            # One thread waits at a time, also for callers that came later: whoever gets the answer closes the handle.
            if self._waiting is None or self._waiting.done():
                self._waiting = self._system.in_thread(self._wait, _milliseconds(deadline - loop.time()))
            try:
                async with asyncio.timeout_at(deadline):
                    await asyncio.shield(self._waiting)
            except TimeoutError:
                break
            if loop.time() >= deadline:
                break
        if isinstance(self._answer, str):
            return self._answer
        raise self._answer or failure(self._what, HCS_E_OPERATION_TIMEOUT, vm=self._system.id)

    def close(self) -> None:
        """Give the handle back. An operation that is under way is cancelled by that."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._system.core.call("HcsCloseOperation", handle)

    def _wait(self, timeout_ms: int) -> None:
        if self._handle is None:
            return
        text = PWSTR()
        hresult = self._system.core.call("HcsWaitForOperationResult", self._handle, timeout_ms, ctypes.byref(text))
        document = self._system.core.take(text)
        if hresult & 0xFFFFFFFF == HCS_E_OPERATION_TIMEOUT:
            return
        if hresult >= 0:
            self._answer = document
        else:
            self._answer = failure(self._what, hresult, document, vm=self._system.id)
        self.close()
        self._system.forget(self)


class HcsSystem:
    """A VM that HCS runs, opened by its id. Implements `system.ComputeSystem`."""

    def __init__(self, core: ComputeCore, id: str, handle: int) -> None:
        """Use `open`."""
        self.core = core
        self._id = id
        self._handle: int | None = handle
        self._operations: set[HcsOperation] = set()
        self._threads = ThreadPoolExecutor(_WAITERS, thread_name_prefix=f"hcs-{id}")

    @classmethod
    async def open(cls, id: str, *, core: ComputeCore | None = None) -> Self:
        """The running compute system of that id. It goes on when we close it, if it was created so.

        Raises:
            SetupError: there is no HCS here.
            VMNotFound: HCS knows no system of that id.
            AccessDenied: this user may not.
            HcsRefused: HCS said no.
        """
        core = core or ComputeCore.load()
        handle = HCS_SYSTEM()
        hresult = await asyncio.to_thread(core.call, "HcsOpenComputeSystem", id, GENERIC_ALL, ctypes.byref(handle))
        code = hresult & 0xFFFFFFFF
        if code == HCS_E_SYSTEM_NOT_FOUND:
            raise VMNotFound(f"HCS knows no compute system {id}", vm=id, remedy="`hcsdiag list` shows those there are")
        if code in (E_ACCESSDENIED, HCS_E_ACCESS_DENIED):
            raise AccessDenied(
                f"this user may not open {id}", vm=id, remedy="be an administrator, or in Hyper-V Administrators"
            )
        if hresult < 0:
            raise failure(f"open {id}", hresult, vm=id)
        assert handle.value is not None
        return cls(core, id, handle.value)

    @property
    def id(self) -> str:
        return self._id

    async def modify(self, document: str) -> HcsOperation:
        """See `system.ComputeSystem.modify`."""
        return await self._begin("modify", "HcsModifyComputeSystem", document, None)

    async def properties(self, query: str | None = None) -> HcsOperation:
        """See `system.ComputeSystem.properties`."""
        return await self._begin("query", "HcsGetComputeSystemProperties", query)

    async def grant(self, path: str, *, group: bool) -> None:
        """See `system.ComputeSystem.grant`."""
        await self._access("Grant", path, group=group)

    async def revoke(self, path: str, *, group: bool) -> None:
        """See `system.ComputeSystem.revoke`."""
        await self._access("Revoke", path, group=group)

    async def close(self) -> None:
        """Let go of the system and of what was not answered. Returns when the waits that are under way have ended.

        Twice is once.
        """
        await asyncio.to_thread(self._threads.shutdown)
        for operation in list(self._operations):
            operation.close()
        self._operations.clear()
        handle, self._handle = self._handle, None
        if handle is not None:
            self.core.call("HcsCloseComputeSystem", handle)

    def in_thread(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def forget(self, operation: HcsOperation) -> None:
        self._operations.discard(operation)

    async def _begin(self, what: str, name: str, *arguments: Any) -> HcsOperation:
        # Shielded: a caller that goes away leaves the operation to be closed with the system.
        return await asyncio.shield(self.in_thread(self._begin_blocking, f"{what} {self._id}", name, *arguments))

    def _begin_blocking(self, what: str, name: str, *arguments: Any) -> HcsOperation:
        handle = self.core.call("HcsCreateOperation", None, None)
        if not handle:
            raise failure(f"{what}: HcsCreateOperation", -1, vm=self._id)
        operation = HcsOperation(self, handle, what)
        hresult = self.core.call(name, self._handle, handle, *arguments)
        if hresult < 0:
            operation.close()
            raise failure(what, hresult, vm=self._id)
        self._operations.add(operation)
        return operation

    async def _access(self, verb: str, path: str, *, group: bool) -> None:
        name, arguments = (f"Hcs{verb}VmGroupAccess", (path,)) if group else (f"Hcs{verb}VmAccess", (self._id, path))
        hresult = await self.in_thread(self.core.call, name, *arguments)
        if hresult < 0:
            raise failure(f"{verb.lower()} the right to {path}", hresult, vm=self._id)


def _milliseconds(timeout_s: float) -> int:
    return max(0, min(math.ceil(timeout_s * 1000), INFINITE - 1))
