"""Our end of the bridge to one guest: connected, connected anew when that ends, and asked."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any, Final, Protocol

from utilityvm.bridge import messages
from utilityvm.errors import (
    DeadlineExceeded,
    GuestRefused,
    NotSupported,
    ProtocolError,
    UtilityVMError,
    VMGone,
)
from utilityvm.guests import answers
from utilityvm.guests.bridge_client import BridgeClient, NotNegotiated
from utilityvm.guests.connection import Source
from utilityvm.guests.mount_settings import (
    nonzero,
)
from utilityvm.guests.program import Said, heard
from utilityvm.guests.refusals import Where, refusal
from utilityvm.log import logger
from utilityvm.machine.oserrors import typed_errors
from utilityvm.scsi.slot import Slot

_log = logger(__name__)

ANSWER_S: Final = 0.4  # our agent keeps the caller's deadline itself; this long we wait for it to say so
_AHEAD: Final = 0.05  # of the time that the caller gives, which the agent gets less, so that its words come in time
_MAX_AHEAD_S: Final = 0.25
_RENEGOTIATE_TIMES: Final = 3  # for one request; who then still is not negotiated with never will be
_SHORT_LIVED_S: Final = 5.0  # a connection that ended sooner is not followed by the next at once
_PAUSES_S: Final = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)


class _Speaks(Protocol):
    """What hears what the guest says of a process."""

    def take(self, said: Said) -> None: ...


@typed_errors
class GuestSession:
    """What can be asked of any guest. When the connection or the agent ends, the next request connects anew."""

    def __init__(self, source: Source, *, vm: str | None = None) -> None:
        self._source = source
        self._vm = vm
        self._client: BridgeClient | None = None
        self._first: tuple[int, dict[str, Any]] | None = None  # what is asked with the negotiate
        self._connecting = asyncio.Lock()
        self._connected_at = float("-inf")
        self._short_lived = 0  # connections in a row
        self._closed = False
        self._numbers = itertools.count(1)
        self._last_number = 0
        self._is_known = False  # to be ours, before it ever answered
        self._programs: dict[int, _Speaks] = {}

    async def close(self) -> None:
        """Hang up. Programs that we run in the guest end; mounts stay. Twice is once."""
        self._closed = True
        self._source.close()
        if self._client:
            await self._client.close()

    async def hang_up(self) -> None:
        """End the connection; the next request connects anew. Programs that we run in the guest end; mounts stay."""
        if self._client:
            await self._client.close()

    @property
    def has_our_agent(self) -> bool:
        """Does our own agent answer, and not another guest of the same protocol?"""
        return self._is_known if self._client is None else self._client.is_ours

    @property
    def boot_id(self) -> str | None:
        """The kernel's id of this boot of the guest, as it was when we connected; None if it is not our agent."""
        about = self._client.about if self._client else None
        return about.boot_id if about else None

    def _take_notification(self, kind: int, body: dict[str, Any]) -> None:
        if kind == messages.CONTAINER_NOTIFICATION:
            return  # hcsshim's gcs tells of its containers; we have none
        said = heard(kind, body, vm=self._vm)
        if program := self._programs.get(said.process):
            program.take(said)
        elif said.process > self._last_number:
            raise ProtocolError(f"the guest speaks of process {said.process}, which we never started", vm=self._vm)

    async def _connected(self, deadline: float) -> BridgeClient:
        """The connection; made anew if it, or the agent, ended."""
        if self._client and not self._client.gone.done():
            return self._client
        left = max(deadline - time.monotonic(), 0.0)
        try:
            async with asyncio.timeout(left):
                await self._connecting.acquire()
        except TimeoutError:
            raise DeadlineExceeded(f"no connection to the guest within {left:g} s", vm=self._vm) from None
        try:
            return await self._connect(deadline)
        finally:
            self._connecting.release()

    async def _connect(self, deadline: float) -> BridgeClient:
        if self._client and not self._client.gone.done():
            return self._client  # another was quicker
        if self._closed:
            raise VMGone("the connection was closed", vm=self._vm)
        if self._client:
            await self._client.close()
            await self._pause(deadline)
        self._connected_at = time.monotonic()
        streams = await self._source.open(timeout_s=max(deadline - time.monotonic(), 0.0), vm=self._vm)
        self._client = await BridgeClient.over(
            streams,
            timeout_s=max(deadline - time.monotonic(), 0.0),
            vm=self._vm,
            on_notify=self._take_notification,
            first=self._first,
        )
        return self._client

    async def _pause(self, deadline: float) -> None:
        """Before a new connection: an agent that ends one after the other is not dialled as fast as it can."""
        is_short_lived = time.monotonic() - self._connected_at < _SHORT_LIVED_S
        self._short_lived = self._short_lived + 1 if is_short_lived else 0
        pause_s = _PAUSES_S[min(max(self._short_lived - 1, 0), len(_PAUSES_S) - 1)]
        await asyncio.sleep(max(min(pause_s, deadline - time.monotonic()), 0.0))

    async def _ask(
        self,
        kind: int,
        body: dict[str, Any],
        timeout_s: float,
        where: Where | None = None,
        *,
        force: bool = False,
    ) -> dict[str, Any]:
        """The answer to a request; sent again only if it met an agent that had not looked at it."""
        deadline = time.monotonic() + timeout_s
        was_ours = self.has_our_agent
        renegotiated = 0
        while True:
            client = await self._connected(deadline)
            left = max(deadline - time.monotonic(), 0.0)
            if client.is_ours:
                agents = left - min(left * _AHEAD, _MAX_AHEAD_S)
                body[messages.EXTENSION] = {"TimeoutMs": int(agents * 1000), **nonzero(Force=force)}
            elif was_ours:
                raise GuestRefused("another agent answers than before", vm=self._vm, remedy="close, and connect again")
            try:
                answer = await client.request(kind, body, timeout_s=left + (ANSWER_S if client.is_ours else 0.0))
            except NotNegotiated:
                if time.monotonic() >= deadline:
                    raise
                continue
            if client.must_negotiate(kind, answer) and renegotiated < _RENEGOTIATE_TIMES:
                renegotiated += 1
                await self._negotiate_again(client, deadline)
                continue
            return self._checked(answer, where)

    async def _negotiate_again(self, client: BridgeClient, deadline: float) -> None:
        """Negotiate with a gcs that was started again. Of several requests that meet it, each does, and one is taken.

        Raises:
            GuestRefused: it failed; the request that met the new gcs was not looked at.
            VMGone: the connection ended.
        """
        try:
            await client.negotiate_again(timeout_s=max(deadline - time.monotonic(), 0.0))
        except VMGone:
            raise
        except UtilityVMError as error:
            raise GuestRefused(f"the guest's agent was started again: {error}", vm=self._vm) from error
        _log.info("the guest's agent was started again, and negotiated with", vm=self._vm)

    def _checked(self, answer: dict[str, Any], where: Where | None) -> dict[str, Any]:
        """The answer, if it is a yes; else the error of `refusals`."""
        response = answers.read(answers.Response, answer, vm=self._vm)
        if response.result:
            raise refusal(response, where, vm=self._vm)
        return answer

    def _need_our_agent(self, what: str, slot: Slot | None = None) -> None:
        if self._client and not self.has_our_agent:
            raise NotSupported(
                f"this guest's agent cannot {what}", vm=self._vm, slot=slot, remedy="use utilityvm's guest image"
            )
