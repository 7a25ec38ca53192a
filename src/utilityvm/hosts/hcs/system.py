"""A compute system, as the backends see it: documents go in, answers come out, some of them late.

HCS answers a modification when it has been made, and it may take longer than a caller waits. The modification is then
not cancelled (HCS may have made it all the same, and would not say): the operation stays open, and whoever asks it
again gets the answer that came meanwhile. So an unknown outcome becomes a known one as soon as HCS has answered.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, Protocol

import msgspec

from utilityvm.errors import DeadlineExceeded, HostRefused, OutcomeUnknown, UtilityVMError, VMGone

# Names as in winerror.h.
S_OK: Final = 0
E_NOTIMPL: Final = 0x80004001
E_FAIL: Final = 0x80004005
E_ACCESSDENIED: Final = 0x80070005
E_INVALIDARG: Final = 0x80070057
HRESULT_ERROR_FILE_NOT_FOUND: Final = 0x80070002
HRESULT_ERROR_PATH_NOT_FOUND: Final = 0x80070003
HRESULT_ERROR_SHARING_VIOLATION: Final = 0x80070020
HRESULT_ERROR_ALREADY_EXISTS: Final = 0x800700B7
HRESULT_ERROR_NOT_FOUND: Final = 0x80070490
HRESULT_RPC_S_SERVER_UNAVAILABLE: Final = 0x800706BA
HRESULT_RPC_S_CALL_FAILED: Final = 0x800706BE
HCS_E_INVALID_STATE: Final = 0x80370105
HCS_E_UNEXPECTED_EXIT: Final = 0x80370106
HCS_E_TERMINATED: Final = 0x80370107
HCS_E_CONNECTION_TIMEOUT: Final = 0x80370109
HCS_E_CONNECTION_CLOSED: Final = 0x8037010A
HCS_E_INVALID_JSON: Final = 0x8037010D
HCS_E_SYSTEM_NOT_FOUND: Final = 0x8037010E
HCS_E_SYSTEM_ALREADY_STOPPED: Final = 0x80370110
HCS_E_OPERATION_PENDING: Final = 0x80370117
HCS_E_OPERATION_TIMEOUT: Final = 0x80370118
HCS_E_ACCESS_DENIED: Final = 0x8037011B
HCS_E_GUEST_CRITICAL_ERROR: Final = 0x8037011C
HCS_E_SERVICE_DISCONNECT: Final = 0x8037011E

# HCS did not say whether it was done, or the guest did not tell HCS.
_NO_ANSWER: Final = frozenset(
    {
        HCS_E_CONNECTION_TIMEOUT,
        HCS_E_CONNECTION_CLOSED,
        HCS_E_OPERATION_PENDING,
        HCS_E_OPERATION_TIMEOUT,
        HCS_E_SERVICE_DISCONNECT,
        HRESULT_RPC_S_SERVER_UNAVAILABLE,
        HRESULT_RPC_S_CALL_FAILED,
    }
)
_GONE: Final = frozenset(
    {
        HCS_E_UNEXPECTED_EXIT,
        HCS_E_TERMINATED,
        HCS_E_SYSTEM_NOT_FOUND,
        HCS_E_SYSTEM_ALREADY_STOPPED,
        HCS_E_GUEST_CRITICAL_ERROR,
    }
)


class HcsRefused(HostRefused):
    """HCS said no; `hresult` is its code, unsigned, and `reason` what it said."""

    def __init__(self, text: str, *, hresult: int, reason: str, vm: str | None = None) -> None:
        super().__init__(f"{text}: {reason}", vm=vm)
        self.hresult = hresult
        self.reason = reason


class Operation(Protocol):
    """A modification or a query that was begun."""

    async def result(self, *, timeout_s: float) -> str:
        """HCS's result document, often empty. True on return: it was done.

        After DeadlineExceeded it may be asked again, and goes on waiting. After any other answer it gives that again.

        Raises:
            HcsRefused: HCS, or through it the guest, said no.
            DeadlineExceeded: no answer within `timeout_s` seconds; it goes on.
            OutcomeUnknown: there will be no answer.
            VMGone: the VM ended.
        """
        ...


class ComputeSystem(Protocol):
    """A running VM of HCS's."""

    @property
    def id(self) -> str: ...

    async def modify(self, document: str) -> Operation:
        """Begin a modification.

        Raises:
            HcsRefused: it was not begun.
            OutcomeUnknown: HCS does not answer; it may have begun.
            VMGone: the VM ended.
        """
        ...

    async def properties(self, query: str | None = None) -> Operation:
        """Begin a query; its result document has Id, SystemType, State and what the query names.

        Raises:
            as `modify`.
        """
        ...

    async def grant(self, path: str, *, group: bool) -> None:
        """Give the VM, or the `group` of all VMs, the right to a file.

        Raises:
            HcsRefused: it was not given.
        """
        ...

    async def revoke(self, path: str, *, group: bool) -> None:
        """Take that right back.

        Raises:
            HcsRefused: the right is still there.
        """
        ...


class Step:
    """What was sent about one thing, and where its answer may still come from: one modification at a time."""

    def __init__(self) -> None:
        self._begun: asyncio.Future[Operation] | None = None

    @property
    def may_be_answered(self) -> bool:
        """Is there a modification whose answer was not had, and may come?"""
        return self._begun is not None

    async def send(self, system: ComputeSystem, document: str, deadline: float) -> None:
        """Send a modification, and wait for its answer until `deadline` (of `time.monotonic`).

        A caller that goes away, or whose time is up, leaves it to be answered.

        Raises:
            as `answer`.
        """
        self._begun = asyncio.ensure_future(system.modify(document))
        await self.answer(deadline)

    async def answer(self, deadline: float) -> None:
        """Wait for the answer of what was sent.

        Raises:
            HcsRefused: it is no.
            OutcomeUnknown: there is none; `may_be_answered` says whether one may come.
            VMGone: the VM ended.
        """
        begun = self._begun
        assert begun is not None
        await asyncio.wait({begun}, timeout=_left(deadline))
        if not begun.done():
            raise DeadlineExceeded("HCS did not take the document in time")
        try:
            await begun.result().result(timeout_s=_left(deadline))
        except DeadlineExceeded:
            raise
        except (HcsRefused, OutcomeUnknown):
            self._begun = None
            raise
        self._begun = None


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


class _ResultError(msgspec.Struct, rename="pascal"):
    """The document of a failed operation. Source: HCS schema, ResultError."""

    error: int = 0
    error_message: str = ""


def failure(what: str, hresult: int, document: str = "", *, vm: str | None = None) -> UtilityVMError:
    """The error for an HRESULT that is none of success, by what a caller does next."""
    hresult &= 0xFFFFFFFF
    try:
        said = msgspec.json.decode(document, type=_ResultError).error_message.strip() if document else ""
    except msgspec.DecodeError:
        said = document.strip()
    reason = f"{said} ({hresult:#010x})" if said else f"HRESULT {hresult:#010x}"
    if hresult == HCS_E_OPERATION_TIMEOUT:
        return DeadlineExceeded(f"{what}: no answer in time", vm=vm)
    if hresult in _NO_ANSWER:
        return OutcomeUnknown(f"{what}: {reason}", vm=vm)
    if hresult in _GONE:
        return VMGone(f"{what}: {reason}", vm=vm)
    return HcsRefused(what, hresult=hresult, reason=reason, vm=vm)
