"""computecore.dll by a stand-in: functions with the C signatures, over the VM of `testing.hcs`."""

from __future__ import annotations

import asyncio
import ctypes
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
import pytest

from utilityvm.errors import AccessDenied, DeadlineExceeded, HostRefused, OutcomeUnknown, SetupError, VMGone, VMNotFound
from utilityvm.hosts.hcs import system as hcs
from utilityvm.hosts.hcs.computecore import GENERIC_ALL, SIGNATURES, ComputeCore, HcsSystem
from utilityvm.hosts.hcs.documents import Attachment, Slot, attach_request, detach_request, encode
from utilityvm.hosts.hcs.host import GroupAccess, HcsHost
from utilityvm.hosts.hcs.system import HcsRefused
from utilityvm.scsi.ports import DiskRequest
from utilityvm.testing.hcs import HcsWorld, Refused

PATH = "C:\\données\\диск 😀.vhdx"
SLOT = Slot(0, 1)


class StandInLibrary:
    """The functions of the DLL, as pointers to C functions that change a world. It counts its handles and texts."""

    def __init__(self, world: HcsWorld) -> None:
        self.world = world
        self.answers: dict[int, tuple[int, str] | None] = {}  # by operation: code and document, None while it runs
        self.closed: list[str] = []
        self.texts: dict[int, Any] = {}
        self.open_code = 0
        self.begin_code = 0
        self.code: int | None = None  # what every operation ends with, if not as the world says
        self.answered = threading.Event()  # operations end when it is set
        self.answered.set()
        self.waits: list[int] = []
        self._callbacks: list[Any] = []
        self._next = 0x1000
        self._lock = threading.Lock()
        for name in SIGNATURES:
            setattr(self, name, self._exported(name))

    def _exported(self, name: str) -> Any:
        result, arguments = SIGNATURES[name]
        callback = ctypes.CFUNCTYPE(result, *arguments)(getattr(self, f"_{name}"))
        self._callbacks.append(callback)
        address = ctypes.cast(callback, ctypes.c_void_p).value
        assert address is not None
        return ctypes.CFUNCTYPE(ctypes.c_int)(address)  # without its types, as from a DLL

    def _handle(self) -> int:
        with self._lock:
            self._next += 1
            return self._next

    def _give(self, text: str, where: Any) -> None:
        if text:
            buffer = ctypes.create_unicode_buffer(text)
            self.texts[ctypes.addressof(buffer)] = buffer
            where[0] = ctypes.addressof(buffer)

    def free(self, address: int) -> None:
        del self.texts[address]

    def _HcsCreateOperation(self, context: int | None, callback: int | None) -> int:
        assert (context, callback) == (None, None)
        handle = self._handle()
        self.answers[handle] = None
        return handle

    def _HcsCloseOperation(self, operation: int) -> None:
        del self.answers[operation]
        self.closed.append("operation")

    def _HcsGetOperationResult(self, operation: int, text: Any) -> int:
        return self._HcsWaitForOperationResult(operation, 0, text)

    def _HcsWaitForOperationResult(self, operation: int, timeout_ms: int, text: Any) -> int:
        self.waits.append(timeout_ms)
        if not self.answered.wait(timeout_ms / 1000):
            return ctypes.c_int32(hcs.HCS_E_OPERATION_TIMEOUT).value
        answer = self.answers[operation]
        assert answer is not None
        self._give(answer[1], text)
        return ctypes.c_int32(answer[0]).value

    def _HcsOpenComputeSystem(self, id: str, access: int, system: Any) -> int:
        assert access == GENERIC_ALL
        if self.open_code:
            return ctypes.c_int32(self.open_code).value
        if id != self.world.id:
            return ctypes.c_int32(hcs.HCS_E_SYSTEM_NOT_FOUND).value
        system[0] = self._handle()
        return 0

    def _HcsCloseComputeSystem(self, system: int) -> None:
        self.closed.append("system")

    def _HcsModifyComputeSystem(self, system: int, operation: int, document: str, identity: int | None) -> int:
        assert identity is None
        if self.begin_code:
            return ctypes.c_int32(self.begin_code).value
        if self.code is not None:
            self.answers[operation] = (self.code, "")
            return 0
        try:
            self.world.apply(document)
            self.answers[operation] = (0, "")
        except Refused as error:
            said = {"Error": ctypes.c_int32(error.hresult).value, "ErrorMessage": str(error)}
            self.answers[operation] = (error.hresult, msgspec.json.encode(said).decode())
        return 0

    def _HcsGetComputeSystemProperties(self, system: int, operation: int, query: str | None) -> int:
        properties = {"Id": self.world.id, "State": self.world.state, "Query": query}
        self.answers[operation] = (0, msgspec.json.encode(properties).decode())
        return 0

    def _HcsGrantVmAccess(self, vm_id: str, path: str) -> int:
        return self._access(path, lambda rights: rights.add(vm_id))

    def _HcsRevokeVmAccess(self, vm_id: str, path: str) -> int:
        return self._access(path, lambda rights: rights.discard(vm_id))

    def _HcsGrantVmGroupAccess(self, path: str) -> int:
        return self._access(path, lambda rights: rights.add("group"))

    def _HcsRevokeVmGroupAccess(self, path: str) -> int:
        return self._access(path, lambda rights: rights.discard("group"))

    def _access(self, path: str, change: Callable[[set[str]], None]) -> int:
        if (file := self.world.file(path)) is None:
            return ctypes.c_int32(hcs.HRESULT_ERROR_FILE_NOT_FOUND).value
        change(file.rights)
        return 0


@pytest.fixture
def world() -> HcsWorld:
    world = HcsWorld()
    world.add_file(PATH)
    return world


@pytest.fixture
def library(world: HcsWorld) -> Iterator[StandInLibrary]:
    library = StandInLibrary(world)
    yield library
    library.answered.set()


@pytest.fixture
def core(library: StandInLibrary) -> ComputeCore:
    return ComputeCore(library, free=library.free)


@pytest.fixture
async def opened(core: ComputeCore, library: StandInLibrary, world: HcsWorld) -> AsyncIterator[HcsSystem]:
    opened = await HcsSystem.open(world.id, core=core)
    yield opened
    library.answered.set()
    await opened.close()
    assert library.texts == {}, "a text was not freed"
    assert library.answers == {}, "an operation was not closed"
    assert library.closed.count("system") == 1


ADD = encode(attach_request(SLOT, Attachment(type="VirtualDisk", path=PATH)))
REMOVE = encode(detach_request(SLOT))


async def test_a_document_is_done_and_answered(opened: HcsSystem, world: HcsWorld) -> None:
    world.file(PATH).rights.add(world.id)  # type: ignore[union-attr]
    assert await (await opened.modify(ADD)).result(timeout_s=5) == ""
    assert world.bus[SLOT]["Path"] == PATH
    await (await opened.modify(REMOVE)).result(timeout_s=5)
    assert world.bus == {}


async def test_a_refusal_has_hcss_code_and_words(opened: HcsSystem) -> None:
    operation = await opened.modify(ADD)
    for _ in range(2):
        with pytest.raises(HcsRefused, match=r"may not open .*диск 😀\.vhdx \(0x80070005\)") as caught:
            await operation.result(timeout_s=5)
        assert caught.value.hresult == hcs.E_ACCESSDENIED


async def test_properties_are_text(opened: HcsSystem) -> None:
    text = await (await opened.properties()).result(timeout_s=5)
    assert msgspec.json.decode(text) == {"Id": "vm-1", "State": "Running", "Query": None}


async def test_an_answer_that_comes_late_is_had_by_asking_again(
    opened: HcsSystem, library: StandInLibrary, world: HcsWorld
) -> None:
    world.file(PATH).rights.add(world.id)  # type: ignore[union-attr]
    library.answered.clear()
    operation = await opened.modify(ADD)
    with pytest.raises(DeadlineExceeded):
        await operation.result(timeout_s=0.01)
    assert library.closed == []
    library.answered.set()
    assert await operation.result(timeout_s=5) == ""
    assert library.closed == ["operation"]


async def test_those_who_wait_for_one_answer_share_one_wait(opened: HcsSystem, library: StandInLibrary) -> None:
    library.answered.clear()
    operation = await opened.properties()
    waiting = [asyncio.ensure_future(operation.result(timeout_s=30)) for _ in range(3)]
    waiting[0].cancel()
    while not library.waits:
        await asyncio.sleep(0)
    waiting[1].cancel()
    library.answered.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(results[2], str)
    assert len(library.waits) == 1


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (hcs.HCS_E_CONNECTION_CLOSED, OutcomeUnknown),
        (hcs.HCS_E_CONNECTION_TIMEOUT, OutcomeUnknown),
        (hcs.HCS_E_SERVICE_DISCONNECT, OutcomeUnknown),
        (hcs.HRESULT_RPC_S_SERVER_UNAVAILABLE, OutcomeUnknown),
        (hcs.HCS_E_SYSTEM_ALREADY_STOPPED, VMGone),
        (hcs.HCS_E_SYSTEM_NOT_FOUND, VMGone),
        (hcs.HCS_E_INVALID_STATE, HostRefused),
        (hcs.E_FAIL, HostRefused),
        (hcs.HCS_E_INVALID_JSON, HostRefused),
    ],
)
async def test_a_code_is_an_error_by_what_to_do_next(
    opened: HcsSystem, library: StandInLibrary, code: int, error: type[Exception]
) -> None:
    library.code = code
    operation = await opened.modify(ADD)
    with pytest.raises(error) as caught:
        await operation.result(timeout_s=5)
    assert type(caught.value) in (error, HcsRefused)
    assert f"{code:#010x}" in str(caught.value)


async def test_an_operation_that_does_not_begin_is_closed(opened: HcsSystem, library: StandInLibrary) -> None:
    library.begin_code = hcs.HCS_E_INVALID_STATE
    with pytest.raises(HcsRefused):
        await opened.modify(ADD)
    assert library.closed == ["operation"]


async def test_an_operation_without_an_answer_is_closed_with_its_system(
    core: ComputeCore, library: StandInLibrary, world: HcsWorld
) -> None:
    system = await HcsSystem.open(world.id, core=core)
    library.answered.clear()
    await system.properties()
    await system.close()
    assert library.closed == ["operation", "system"]
    await system.close()
    assert library.closed == ["operation", "system"]


async def test_rights_are_given_and_taken(opened: HcsSystem, world: HcsWorld) -> None:
    file = world.file(PATH)
    assert file is not None
    await opened.grant(PATH, group=False)
    await opened.grant(PATH, group=True)
    assert file.rights == {world.id, "group"}
    await opened.revoke(PATH, group=False)
    await opened.revoke(PATH, group=True)
    assert file.rights == set()
    with pytest.raises(HcsRefused, match="missing"):
        await opened.grant("C:\\missing.vhdx", group=False)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (hcs.HCS_E_SYSTEM_NOT_FOUND, VMNotFound),
        (hcs.HCS_E_ACCESS_DENIED, AccessDenied),
        (hcs.E_ACCESSDENIED, AccessDenied),
        (hcs.E_FAIL, HcsRefused),
    ],
)
async def test_a_system_that_cannot_be_opened(
    core: ComputeCore, library: StandInLibrary, code: int, error: type[Exception]
) -> None:
    library.open_code = code
    with pytest.raises(error):
        await HcsSystem.open("vm-1", core=core)


async def test_a_function_that_this_windows_lacks_is_named(library: StandInLibrary, world: HcsWorld) -> None:
    delattr(library, "HcsGrantVmGroupAccess")
    system = await HcsSystem.open(world.id, core=ComputeCore(library, free=library.free))
    with pytest.raises(SetupError, match="HcsGrantVmGroupAccess"):
        await system.grant(PATH, group=True)
    await system.close()


async def test_the_host_backend_works_through_it(opened: HcsSystem, world: HcsWorld) -> None:
    host = HcsHost(opened, disks=world.disks, group_access=GroupAccess())
    disk = await host.open(DiskRequest(host_path=PATH, read_only=True))
    await host.attach(SLOT, disk, attachment="a1", timeout_s=5)
    assert await host.probe(SLOT, attachment="a1", timeout_s=5)
    await host.detach(SLOT, attachment="a1", timeout_s=5)
    assert world.bus == {}
    assert world.file(PATH).rights == set()  # type: ignore[union-attr]


@pytest.mark.skipif(sys.platform == "win32", reason="this is Windows")
async def test_off_windows_it_says_so_kindly() -> None:
    with pytest.raises(SetupError, match="part of Windows") as caught:
        await HcsSystem.open("vm-1")
    assert "QEMU" in str(caught.value.remedy)
