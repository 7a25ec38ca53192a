"""Errors over the wire: each class of `utilityvm.errors` as a problem document (RFC 9457), and back."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import utilityvm.errors as errors
from utilityvm.errors import UtilityVMError
from utilityvm.scsi.slot import Slot
from utilityvm.server.types import Problem
from utilityvm.text import clean

CONTENT_TYPE: Final = "application/problem+json"

# The first that fits. What a client does differently is the class; the number is for proxies and people.
STATUS: Final[tuple[tuple[type[UtilityVMError], int], ...]] = (
    (errors.VMNotFound, 404),
    (errors.NotAttached, 404),
    (errors.TemplateNotFound, 404),
    (errors.AlreadyReleased, 404),
    (errors.AccessDenied, 403),
    (errors.InvalidRequest, 422),
    (errors.NotSupported, 422),
    (errors.RequestError, 409),
    (errors.HostRefused, 409),
    (errors.GuestRefused, 409),
    (errors.VMGone, 409),
    (errors.ImageError, 422),
    (errors.TemplateDamaged, 422),
    (errors.DeadlineExceeded, 504),
    (errors.OutcomeUnknown, 502),
    (errors.ProtocolError, 502),
    (errors.UnsafePath, 502),
    (errors.UtilityVMError, 500),
)
_LISTS: Final = ("holders", "users", "console")
_SLOT_PARTS: Final = 2


def status_of(error: UtilityVMError) -> int:
    return next(status for kind, status in STATUS if isinstance(error, kind))


def problem_of(error: UtilityVMError, *, status: int | None = None) -> Problem:
    """The document of an error. A class of another module is to clients its parent in `errors`."""
    kind = next(one for one in type(error).__mro__ if one.__module__ == errors.__name__)
    return Problem(
        type=f"urn:utilityvm:error:{kind.__name__}",
        title=(kind.__doc__ or kind.__name__).strip().partition("\n")[0],
        status=status or status_of(error),
        detail=clean(str(error)),  # it may repeat the request
        kind=kind.__name__,
        vm=error.vm,
        slot=_text(error.slot),
        host_path=_text(error.host_path),
        remedy=_text(error.remedy),
        owner=_text(getattr(error, "owner", None) or None),
        reason=_text(getattr(error, "kind", None)),
        message=_text(getattr(error, "message", None)),
        kept=_text(getattr(error, "kept", None)),
        **{name: list(map(str, getattr(error, name))) for name in _LISTS if getattr(error, name, None)},
    )


def _text(value: object) -> str | None:
    """Plain text: what a guest said is of a class of its own."""
    return None if value is None else "".join(str(value))


def error_of(problem: Problem) -> UtilityVMError:
    """The error of a document, as the server raised it. A class that is not known here is `UtilityVMError`."""
    kind = getattr(errors, problem.kind, UtilityVMError)
    if not (isinstance(kind, type) and issubclass(kind, UtilityVMError)):
        kind = UtilityVMError
    error = kind.__new__(kind)
    UtilityVMError.__init__(
        error,
        problem.detail,
        vm=problem.vm,
        slot=None if problem.slot is None else _slot(problem.slot),
        host_path=problem.host_path,
        remedy=problem.remedy,
    )
    if isinstance(error, (errors.NoFreeSlot, errors.GuestBusy)):
        error.holders = tuple(problem.holders or ())
    if isinstance(error, errors.TemplateInUse):
        error.users = tuple(problem.users or ())
    if isinstance(error, errors.StartFailed):
        error.console = tuple(problem.console or ())
    if isinstance(error, errors.VMOwned):
        error.owner = problem.owner or ""
    if isinstance(error, errors.GuestRefused):
        error.kind = problem.reason
    if isinstance(error, errors.ProtocolError):
        error.message = problem.message
    if isinstance(error, errors.StoreDamaged):
        error.kept = Path(problem.kept or "")
    return error


def _slot(text: str) -> Slot | None:
    parts = text.split(":")
    return Slot(*map(int, parts)) if len(parts) == _SLOT_PARTS and all(part.isdigit() for part in parts) else None
