"""What the frames mean: GCS's own messages as recorded, and ours beside them in a category of their own.

A message's type is `0xKCCNNNVV`: kind (request, response, notification), category, number, version. GCS's category is
001, the compute system; ours is 0F0. The real guest answers ours with NOT_IMPLEMENTED, and is never sent them.

Running a program takes one request and a stream of notifications, with a window in each direction, so that neither
side holds more than a window's bytes for a slow reader::

    host                                     guest
    RUN {Process, Argv, ...}          ->
                                      <-     response
    RUN_INPUT {Process, Data, Eof}    ->                            at most INPUT_WINDOW_BYTES not yet
                                      <-     RUN_CREDIT {Bytes}     taken by the program
                                      <-     RUN_OUTPUT {Data}      at most OUTPUT_WINDOW_BYTES not yet
    RUN_CREDIT {Process, Bytes}       ->                            taken by the host
    RUN_SIGNAL {Process, Signal}      ->
    RUN_CANCEL {Process}              ->                            kill it with all that it started; no more is said
                                      <-     RUN_EXIT {ExitCode}    the last of it

The host chooses the number of a process, a new one each time, so that it can speak of it before it was answered.

A *kept* program belongs to the guest, which gives it a number and an id, keeps the end of its output in a ring, and its
exit code until it is forgotten. It outlives the host. `Process` is then the number of one host's *follow* of it::

    START {Argv, ..., Follow}         ->                            Follow is as FOLLOW's body, or nobody follows
                                      <-     response {Program}
    FOLLOW {Process, Number, Id,      ->                            from these offsets of the streams on
            Out, Err, ...}            <-     response {Program, Feeds, TakenAt, GivenAt}
                                      <-     RUN_OUTPUT {Data, At}  At, the offset, is larger than awaited if the ring
    RUN_CREDIT {Process, Bytes}       ->                            has dropped what was between
    RUN_INPUT {Process, Data, Eof}    ->                            by the one follow that feeds it
                                      <-     RUN_CREDIT {Bytes, At} so much input it has taken in all
    RESIZE {Number, Id, Rows, Cols}   ->                            of one that was started with a Terminal
    UNFOLLOW {Process}                ->                            no more is said; the program goes on
                                      <-     FOLLOW_END {ExitCode}  the last of it; without a code it still runs
"""

from __future__ import annotations

from typing import Any, Final

NULL_GUID: Final = "00000000-0000-0000-0000-000000000000"  # the VM itself, as a container; and no activity
PROTOCOL_VERSION: Final = 4

REQUEST: Final = 0x10000000
RESPONSE: Final = 0x20000000
NOTIFICATION: Final = 0x30000000
KIND_MASK: Final = 0xF0000000

# GCS's.
NEGOTIATE: Final = 0x10100B01
MODIFY: Final = 0x10100A01
CONTAINER_NOTIFICATION: Final = 0x30100101  # a container ended; we have none

# Ours. Requests of the host:
PING: Final = 0x10F00101
RUN: Final = 0x10F00201
PROBE: Final = 0x10F00801
MOUNTS: Final = 0x10F00901
GROW: Final = 0x10F00A01  # {Check}: only say whether what is mounted can grow, were the disk of so many bytes
SHUTDOWN: Final = 0x10F00B01
INFO: Final = 0x10F00C01
QUIESCE: Final = 0x10F00E01  # {HoldMs}: freeze, to become a template; thaw again if nothing more is heard for so long
THAW: Final = 0x10F00F01
UNIQUE: Final = 0x10F01001  # {Seed, Hostname, MachineId, ClockNs}: this is a clone, and becomes a VM of its own
START: Final = 0x10F01101
PROGRAMS: Final = 0x10F01201  # {After}: those with higher numbers
FOLLOW: Final = 0x10F01301
SIGNAL: Final = 0x10F01401  # {Number, Id, Signal}
KILL: Final = 0x10F01501  # {Number, Id}: it, and all that it started
FORGET: Final = 0x10F01601  # {Number, Id}
RESIZE: Final = 0x10F01901  # {Number, Id, Rows, Cols}: of its terminal
# Notifications of the host:
UNFOLLOW: Final = 0x30F01701
RUN_INPUT: Final = 0x30F00301
RUN_SIGNAL: Final = 0x30F00401
RUN_CANCEL: Final = 0x30F00D01
# Notifications of the guest:
RUN_OUTPUT: Final = 0x30F00501
RUN_EXIT: Final = 0x30F00701
FOLLOW_END: Final = 0x30F01801
# Notifications of both:
RUN_CREDIT: Final = 0x30F00601

INPUT_WINDOW_BYTES: Final = 262144
OUTPUT_WINDOW_BYTES: Final = 262144
RING_BYTES: Final = 1 << 20  # of a kept program's output, if the host does not say
MIN_RING_BYTES: Final = 4096
MAX_RING_BYTES: Final = 16 << 20
# A word in place of a program's name: the agent copies files itself (`agent.copying`). No program can have that name
# on the PATH, so that an older agent says that there is none.
COPY_PROGRAM: Final = "utilityvm:copy"
MAX_TERMINAL: Final = 65535  # rows or columns: the kernel keeps 16 bits
CHUNK_BYTES: Final = 32768  # of input or output in one message; in base64 it fits a frame

# The member that carries what GCS has no word for; only our agent is ever sent it.
EXTENSION: Final = "Utilityvm"

NOT_NEGOTIATED: Final = "not_negotiated"  # the Kind of a refusal to a host that did not begin with a negotiate

E_FAIL: Final = 0x80004005
E_NOT_IMPLEMENTED: Final = 0x80004001
E_UNSUPPORTED_VERSION: Final = 0xC037010C
E_INVALID_JSON: Final = 0xC037010D
E_NO_SUCH_SYSTEM: Final = 0xC037010E

_NO_LINE: Final = 0xFFFFFFFF  # what the real guest says when it does not know
_MAX_TEXT: Final = 4096  # characters of an error message


def response_to(kind: int) -> int:
    """The type of the response to a request of type `kind`."""
    return kind & ~KIND_MASK | RESPONSE


def signed(code: int) -> int:
    """An HRESULT as the signed number that travels in JSON."""
    return code - (1 << 32) if code & 0x80000000 else code


def negotiate_request() -> dict[str, Any]:
    """The body of the first message on a connection."""
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
    """The body of a response that says yes."""
    return {"Result": 0, "ActivityId": activity, **fields}


def failure(
    code: int, message: str, *, activity: str = NULL_GUID, extension: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The body of a response that says no, as GCS's; a long `message` is cut so that it fits a frame."""
    if len(message) > _MAX_TEXT:
        message = message[:_MAX_TEXT] + "..."
    body: dict[str, Any] = {"Result": signed(code), "ActivityId": activity, "ErrorMessage": message}
    body["ErrorRecords"] = [
        {"Result": signed(code), "Message": message, "ModuleName": "gcs", "FileName": "", "Line": _NO_LINE}
    ]
    if extension:
        body[EXTENSION] = extension
    return body
