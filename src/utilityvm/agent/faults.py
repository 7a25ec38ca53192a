"""The one error that the agent answers with."""

from __future__ import annotations

from collections.abc import Sequence

from utilityvm.bridge import messages


class Fault(Exception):
    """A request cannot be done; nothing was changed by it.

    `kind` is what the host does with it: "refused", "busy" (`holders` says who), "invalid", "not_found", "timeout",
    "unknown" or "no_filesystem", which is refused with advice. `remedy` is what the caller can do.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: str = "refused",
        code: int = messages.E_FAIL,
        holders: Sequence[str] = (),
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind
        self.code = code
        self.holders = list(holders)
        self.remedy = remedy
