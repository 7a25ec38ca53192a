"""What the frames mean: GCS's own messages as recorded, and ours beside them in a category of their own."""

from __future__ import annotations

from typing import Any, Final

NULL_GUID: Final = "00000000-0000-0000-0000-000000000000"  # the VM itself, as a container; and no activity
PROTOCOL_VERSION: Final = 4

REQUEST: Final = 0x10000000
RESPONSE: Final = 0x20000000
NOTIFICATION: Final = 0x30000000
KIND_MASK: Final = 0xF0000000

# GCS: category 0x001, the compute system.
NEGOTIATE: Final = 0x10100B01
MODIFY: Final = 0x10100A01

# Ours: category 0x0F0. The real guest answers them with NOT_IMPLEMENTED; we never send them there.
PING: Final = 0x10F00101
RUN: Final = 0x10F00201  # start a program
RUN_INPUT: Final = 0x10F00301  # bytes for its standard input; answered when they were taken
RUN_SIGNAL: Final = 0x10F00401
RUN_OUTPUT: Final = 0x30F00501  # guest to host: bytes of its standard output or error
RUN_CREDIT: Final = 0x30F00601  # host to guest: so many of them were taken
RUN_EXIT: Final = 0x30F00701  # guest to host: it ended; no output comes after this
PROBE: Final = 0x10F00801
MOUNTS: Final = 0x10F00901
GROW: Final = 0x10F00A01
SHUTDOWN: Final = 0x10F00B01

OUTPUT_WINDOW_BYTES: Final = 262144  # of a program's output may be under way before the host takes some
OUTPUT_CHUNK_BYTES: Final = 32768  # base64 of it fits a frame

# The member that carries what GCS has no word for; only our agent is ever sent it.
EXTENSION: Final = "Utilityvm"


def response_to(kind: int) -> int:
    """The type of the response to a request of type `kind`."""
    return kind & ~KIND_MASK | RESPONSE


def signed(code: int) -> int:
    """An HRESULT as the signed number that travels in JSON."""
    return code - (1 << 32) if code & 0x80000000 else code


E_FAIL: Final = 0x80004005
E_NOT_IMPLEMENTED: Final = 0x80004001
E_UNSUPPORTED_VERSION: Final = 0xC037010C
E_INVALID_JSON: Final = 0xC037010D
E_NO_SUCH_SYSTEM: Final = 0xC037010E


def negotiate_request() -> dict[str, Any]:
    return {
        "ContainerId": "",
        "ActivityId": NULL_GUID,
        "MinimumVersion": PROTOCOL_VERSION,
        "MaximumVersion": PROTOCOL_VERSION,
    }


def request(**fields: Any) -> dict[str, Any]:
    """The body of a request to the VM itself."""
    return {"ContainerId": NULL_GUID, "ActivityId": NULL_GUID, **fields}


def modify_request(
    request_type: str, resource_type: str, settings: dict[str, Any], *, extension: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The body of a ModifySettings request; `settings` without zeros, in GCS's order."""
    inner = {"RequestType": request_type, "ResourceType": resource_type, "Settings": settings}
    body = request(Request=inner)
    if extension:
        body[EXTENSION] = extension
    return body


def success(activity: str = NULL_GUID, **fields: Any) -> dict[str, Any]:
    return {"Result": 0, "ActivityId": activity, **fields}


def failure(
    code: int, message: str, *, activity: str = NULL_GUID, extension: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The body of a response that says no."""
    record = {"Result": signed(code), "Message": message, "ModuleName": "utilityvm", "FileName": "", "Line": 0}
    body: dict[str, Any] = {
        "Result": signed(code),
        "ActivityId": activity,
        "ErrorMessage": message,
        "ErrorRecords": [record],
    }
    if extension:
        body[EXTENSION] = extension
    return body
