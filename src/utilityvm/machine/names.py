"""What is passed as a name is text: looked at before anything is done with it."""

from __future__ import annotations

from utilityvm.errors import InvalidRequest


def check_text(what: str, value: object) -> None:
    """Raises:
    InvalidRequest: the value is not text; `what` says whose name it should be.
    """
    if not isinstance(value, str):
        raise InvalidRequest(f"{what} {value!r} is not a text", remedy=f"give the name of the {what} as a str")
