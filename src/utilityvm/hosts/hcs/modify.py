"""The seed's `modify`: one document with a host's part and a guest's part, sent in the right order and undone.

The manager does not need it, because it takes each step by itself (see `host` and `guest`). It is for who has whole
documents, as hcsshim's callers do.

Source: hcsshim internal/uvm/modify.go (2021).
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from utilityvm.errors import GuestRefused, UtilityVMError
from utilityvm.hosts.hcs.documents import ModifySettingRequest, RequestType, encode, split
from utilityvm.hosts.hcs.system import ComputeSystem
from utilityvm.log import logger

_log = logger(__name__)


class GuestConnection(Protocol):
    """A connection of ours into the guest."""

    async def modify(self, document: str, *, timeout_s: float) -> None:
        """Have the guest do what the document, a guest request, says.

        Raises:
            GuestRefused: it said no.
            OutcomeUnknown: no answer.
        """
        ...


async def modify(
    request: ModifySettingRequest,
    *,
    system: ComputeSystem,
    guest: GuestConnection | None = None,
    timeout_s: float,
) -> None:
    """Do what the request says; each of its parts may take `timeout_s` seconds.

    Without a connection to the guest, or without a part for it, HCS gets the whole document and hands the guest's part
    on. With both, an Add attaches and then mounts, and takes the disk off the bus again if the mount fails; a Remove
    unmounts, and then detaches.

    Raises:
        HcsRefused: the host's part was refused. On a Remove the guest's part was done before.
        GuestRefused: the guest's part was refused. On an Add the disk is off the bus again; if that failed, the message
            says so, and `__cause__` is a group of both errors. On a Remove nothing changed.
        OutcomeUnknown: a part was not answered. On an Add, if it was the guest's, the disk is off the bus again: what
            the guest did with it is gone with the VM's device.
    """
    parts = split(request) if guest is not None else []
    if len(parts) < 2 or guest is None:
        if guest is not None and parts and parts[0].to == "gcs":
            await guest.modify(parts[0].json, timeout_s=timeout_s)
        else:
            await _to_host(system, request, timeout_s)
        return
    first, second = parts
    if first.to == "gcs":
        await guest.modify(first.json, timeout_s=timeout_s)
        await _to_host(system, second.document, timeout_s)
        return
    await _to_host(system, first.document, timeout_s)
    try:
        await guest.modify(second.json, timeout_s=timeout_s)
    except UtilityVMError as error:
        await _roll_back(system, first.document, error, timeout_s)
        raise


async def _to_host(system: ComputeSystem, document: object, timeout_s: float) -> None:
    operation = await system.modify(encode(document))
    await operation.result(timeout_s=timeout_s)


async def _roll_back(system: ComputeSystem, document: object, error: UtilityVMError, timeout_s: float) -> None:
    """Send the document again as a Remove: with its settings, which HCS ignores there, as the seed does."""
    assert isinstance(document, ModifySettingRequest)
    undo = msgspec.structs.replace(document, request_type=RequestType.REMOVE)
    try:
        await _to_host(system, undo, timeout_s)
    except UtilityVMError as second:
        raise GuestRefused(
            f"{error}; and the disk is still attached: {second}", vm=system.id, remedy="send the Remove again"
        ) from ExceptionGroup("mounting and taking back", [error, second])
