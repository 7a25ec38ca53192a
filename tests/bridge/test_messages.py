from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from utilityvm.bridge import messages
from utilityvm.bridge.frame import encode, guest_json, host_json

VECTORS = json.loads((Path(__file__).parent.parent / "vectors/gcs.json").read_text())
BY_NAME: dict[str, dict[str, Any]] = {message["name"]: message for message in VECTORS["messages"]}
MOUNTED = {"MountPath": "/run/mounts/scsi/m0", "Lun": 1}


def test_types_are_those_of_gcs() -> None:
    types = VECTORS["message_types"]
    assert int(types["NegotiateProtocol"], 16) == messages.NEGOTIATE
    assert int(types["ModifySettings"], 16) == messages.MODIFY
    assert int(types["ContainerNotification"], 16) == messages.CONTAINER_NOTIFICATION


def test_no_type_of_ours_is_one_of_gcs() -> None:
    theirs = {int(number, 16) & ~messages.KIND_MASK for number in VECTORS["message_types"].values()}
    ours = [value for name, value in vars(messages).items() if name.startswith(("PING", "RUN", "PROBE", "MOUNTS"))]
    assert ours
    assert not {value & ~messages.KIND_MASK for value in ours} & theirs
    assert len(set(ours)) == len(ours)


@pytest.mark.parametrize("message", [m for m in VECTORS["messages"] if m["type"].startswith("Response")])
def test_a_response_has_the_type_that_its_request_asks_for(message: dict[str, Any]) -> None:
    name = message["type"].removeprefix("Response(").removesuffix(")")
    assert messages.response_to(int(VECTORS["message_types"][name], 16)) == int(message["type_hex"], 16)


def test_codes_are_those_of_gcs() -> None:
    codes = VECTORS["hresults"]
    for code, name in (
        (messages.E_FAIL, "fail_0x80004005"),
        (messages.E_NOT_IMPLEMENTED, "not_implemented_0x80004001"),
        (messages.E_UNSUPPORTED_VERSION, "unsupported_protocol_version_0xc037010c"),
        (messages.E_INVALID_JSON, "invalid_json_0xc037010d"),
        (messages.E_NO_SUCH_SYSTEM, "system_not_found_0xc037010e"),
    ):
        assert messages.signed(code) == codes[name]


def test_negotiate_is_the_recorded_one() -> None:
    recorded = BY_NAME["negotiate_request"]
    assert encode(messages.NEGOTIATE, 0, host_json(messages.negotiate_request())).hex() == recorded["hex"]


@pytest.mark.parametrize(
    ("name", "request_type", "resource", "settings"),
    [
        ("modify_add_disk", "Add", "MappedVirtualDisk", {**MOUNTED, "ReadOnly": True, "Options": ["ro"]}),
        ("modify_fails_with_stack", "Remove", "MappedVirtualDisk", MOUNTED),
        ("modify_remove_scsi_device", "Remove", "SCSIDevice", {"Lun": 1}),
    ],
)
def test_modify_is_the_recorded_one(name: str, request_type: str, resource: str, settings: dict[str, Any]) -> None:
    recorded = BY_NAME[f"{name}_request"]
    body = messages.modify_request(request_type, resource, settings)
    assert encode(messages.MODIFY, recorded["id"], host_json(body)).hex() == recorded["hex"]


def test_success_and_failure_are_the_recorded_ones() -> None:
    done, failed = BY_NAME["modify_add_disk_response"], BY_NAME["modify_fails_plain_response"]
    assert guest_json(messages.success()).decode() == done["body"]
    text = "failed to remove symlink: input/output error"
    assert guest_json(messages.failure(messages.E_FAIL, text)).decode() == failed["body"]


def test_a_failure_fits_a_frame_however_long_its_text() -> None:
    body = messages.failure(messages.E_FAIL, "<" * 100_000)
    assert encode(messages.response_to(messages.MODIFY), 1, guest_json(body))
