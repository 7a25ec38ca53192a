from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from utilityvm.errors import InvalidRequest, ProtocolError
from utilityvm.hosts.hcs import gob, gobstream
from utilityvm.hosts.hcs.gob import Form, SCSIMount

VECTORS = json.loads((Path(__file__).parents[2] / "vectors/gob.json").read_text())
GOOD = bytes.fromhex(VECTORS["decode"][0]["hex"])

# What Go accepts and we refuse, on purpose.
STRICTER = {"slot_out_of_range_ok", "trailing_garbage_ok"}


def named(vectors: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


@named(VECTORS["encode"])
def test_encoding_is_byte_for_byte(vector: dict[str, Any]) -> None:
    assert gob.encode(SCSIMount(**vector["input"])).hex() == vector["hex"]


@named(VECTORS["decode"])
def test_decoding_accepts_what_go_writes_and_refuses_the_rest(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    if vector["rejected"] or vector["name"] in STRICTER:
        with pytest.raises(ProtocolError, match="no gob stream"):
            gob.decode(data)
        return
    mount = gob.decode(data)
    fields = dataclasses.asdict(mount)
    fields["host_path"] = fields["host_path"].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    assert fields == vector["fields_after"]
    assert gob.encode(mount) == data


@named(VECTORS["outer"])
def test_the_outer_forms_are_byte_for_byte(vector: dict[str, Any]) -> None:
    mounts = [SCSIMount(**each) for each in vector["inputs"]]
    assert gob.encode_outer(Form(vector["name"]), mounts).hex() == vector["hex"]
    assert gob.decode_outer(bytes.fromhex(vector["hex"])) == mounts


# Written by Go 1.19, whose ids begin at 65: a decoder must not rely on them.
OTHER_IDS = {
    "slice of values": (
        "0dff83020102ff840001ff82000015ff8105010109534353494d6f756e7401ff820000005cff84000231030600010b0c0008433a5c6c"
        "2e766864050c00022f6c0304000003040002030200010e0c000b5669727475616c4469736b25030600010c0c0009433a5c732e766864"
        "78030c0000030400000304000003020000030c0000"
    ),
    "array": (
        "0fff83010102ff840001ff82010400000aff81050102ff860000005cff84000231030600010b0c0008433a5c6c2e766864050c00022f"
        "6c0304000003040002030200010e0c000b5669727475616c4469736b25030600010c0c0009433a5c732e76686478030c000003040000"
        "0304000003020000030c0000"
    ),
    "interface slice": (
        "0cff81020102ff8200011000001dff8200020e2a75766d2e534353494d6f756e74ff83050102ff860000006fff843300310306000"
        "10b0c0008433a5c6c2e766864050c00022f6c0304000003040002030200010e0c000b5669727475616c4469736b0e2a75766d2e53"
        "4353494d6f756e74ff84270025030600010c0c0009433a5c732e76686478030c0000030400000304000003020000030c0000"
    ),
}


@pytest.mark.parametrize("data", OTHER_IDS.values(), ids=OTHER_IDS.keys())
def test_streams_with_other_ids_are_read(data: str) -> None:
    expected = [SCSIMount(**each) for each in VECTORS["outer"][1]["inputs"]]
    assert gob.decode_outer(bytes.fromhex(data)) == expected


# Written by Go 1.19: a struct as hcsshim's template, with members of every kind.
EVERY_KIND = (
    "ff8fff810301010e54656d706c617465436f6e66696701ff82000105010f53657269616c56657273696f6e4944010600010d54656d706c"
    "61746555564d4944010c00011454656d706c61746555564d5265736f757263657301ff8400011554656d706c61746555564d437265617465"
    "4f70747301ff8600011354656d706c617465436f6e7461696e65724944010c0000001eff83020101105b5d6d61696e2e436c6f6e656162"
    "6c6501ff84000110000032ff850301010b4f7074696f6e7357434f5701ff8600010201074f7074696f6e7301ff880001064c6179657273"
    "01ff8e00000050ff87030101074f7074696f6e7301ff8800010801024944010c0001014e01080001014d01ff8a0001044465657001ff8800"
    "010142010a00010143010e00010341727201ff8c000103416e79011000000021ff89040101116d61705b737472696e675d737472696e6701"
    "ff8a00010c010c000018ff8b010101085b335d75696e743801ff8c0001060106000016ff8d020101085b5d737472696e6701ff8e00010c00"
    "0027ff820101010675766d2d696401030e2a75766d2e534353494d6f756e74ff8f050102ff92000000ff88ff90330031030600010b0c0008"
    "433a5c6c2e766864050c00022f6c0304000003040002030200010e0c000b5669727475616c4469736b0e2a75766d2e534353494d6f756e74"
    "ff90270025030600010c0c0009433a5c732e76686478030c0000030400000304000003020000030c00000e2a75766d2e56534d4253686172"
    "65ff93050102ff9600000052ff94070005736861726501010102696401fef83f010101610162010104646565700603000000000102010201"
    "fef03f4001030100020106737472696e670c050003616e790001020178017900010363696400"
)


def test_a_struct_with_members_of_every_kind_is_read() -> None:
    value = gob.decode_value(bytes.fromhex(EVERY_KIND))
    assert isinstance(value, dict)
    assert value["TemplateUVMID"] == "uvm-id"
    assert [resource.name for resource in value["TemplateUVMResources"]] == [
        "*uvm.SCSIMount",
        "*uvm.SCSIMount",
        "*uvm.VSMBShare",
    ]
    assert value["TemplateUVMCreateOpts"] == {
        "Options": {
            "ID": "id",
            "N": 1.5,
            "M": {"a": "b"},
            "Deep": {"ID": "deep", "Arr": [0, 0, 0]},
            "B": b"\1\2",
            "C": 1 + 2j,
            "Arr": [1, 0, 2],
            "Any": gob.Boxed("string", "any"),
        },
        "Layers": ["x", "y"],
    }


# Written by Go 1.19: interfaces that hold structs that hold interfaces, defined where they first come up.
NESTED = (
    "40ff81030101054f7574657201ff8200010701014e010c0001014901100001014a01ff840001015001ff860001014601080001015501"
    "0a0001014501ff840000001cff830201010e5b5d696e74657266616365207b7d01ff8400011000001fff8503010105496e6e657201ff"
    "860001020101410104000101580110000000ff9eff8201016e010b2a6d61696e2e496e6e6572ff8626010201096d61696e2e44656570"
    "ff87030101044465657001ff8800010101015301ff8a00000016ff89020101085b5d737472696e6701ff8a00010c000009ff88050101"
    "0178000001060b2a6d61696e2e496e6e6572ff860c01030103696e740402000a0000146d61705b737472696e675d6d61696e2e446565"
    "70ff8b040102ff8c00010c01ff8800003bff8c090001016b010101790006737472696e670c0300017307666c6f61743634080400fe04"
    "4004626f6f6c020200010101060001fee03f01010900"
)


def test_interfaces_in_interfaces_are_read() -> None:
    assert gob.decode_value(bytes.fromhex(NESTED)) == {
        "N": "n",
        "I": gob.Boxed("*main.Inner", {"A": 1, "X": gob.Boxed("main.Deep", {"S": ["x"]})}),
        "J": [
            gob.Boxed("*main.Inner", {"A": -2, "X": gob.Boxed("int", 5)}),
            None,
            gob.Boxed("map[string]main.Deep", {"k": {"S": ["y"]}}),
            gob.Boxed("string", "s"),
            gob.Boxed("float64", 2.5),
            gob.Boxed("bool", True),
        ],
        "P": {"A": 3},
        "F": 0.5,
        "U": b"\t",
    }


def test_a_resource_that_is_no_mount_is_refused_by_name() -> None:
    with pytest.raises(ProtocolError, match=r"\*uvm\.VSMBShare"):
        gob.decode_outer(bytes.fromhex(EVERY_KIND))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"controller": 4}, "slots are 0:0 to 3:63"),
        ({"controller": -1}, "slots are 0:0 to 3:63"),
        ({"lun": 64}, "slots are 0:0 to 3:63"),
        ({"lun": -1}, "slots are 0:0 to 3:63"),
        ({"attachment_type": "virtualdisk"}, "attachment type"),
        ({"attachment_type": "Iso" * 100}, "attachment type"),
        ({"serial_version_id": 0}, "version 0"),
        ({"serial_version_id": 2}, "version 2"),
    ],
)
def test_a_mount_that_cannot_be_is_refused(change: dict[str, Any], what: str) -> None:
    mount = dataclasses.replace(gob.decode(GOOD), **change)
    with pytest.raises(ProtocolError, match=what):
        gob.decode(gob.encode(mount))


@pytest.mark.parametrize(
    "change",
    [
        {"serial_version_id": -1},
        {"serial_version_id": 1 << 32},
        {"controller": 1 << 63},
        {"lun": 1 << 31},
        {"lun": -(1 << 31) - 1},
        {"host_path": "\ud800"},
    ],
)
def test_what_go_has_no_room_for_is_not_encoded(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        gob.encode(dataclasses.replace(gob.decode(GOOD), **change))


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_no_beginning_of_a_mount_is_a_mount(length: int) -> None:
    with pytest.raises(ProtocolError):
        gob.decode(GOOD[:length])


def test_nothing_may_follow_a_mount() -> None:
    for tail in (b"\0", b"\x03\x06\x00\x01", GOOD):
        with pytest.raises(ProtocolError):
            gob.decode(GOOD + tail)
    for vector in VECTORS["outer"]:
        with pytest.raises(ProtocolError, match="follow its end"):
            gob.decode_outer(bytes.fromhex(vector["hex"]) + b"\0")


MOUNTS = st.builds(
    SCSIMount,
    host_path=st.text(),
    uvm_path=st.text(),
    controller=st.integers(0, 3),
    lun=st.integers(0, 63),
    read_only=st.booleans(),
    attachment_type=st.sampled_from(sorted(gob.ATTACHMENT_TYPES)),
)


@given(MOUNTS)
def test_any_mount_comes_back(mount: SCSIMount) -> None:
    assert gob.decode(gob.encode(mount)) == mount


@given(st.sampled_from(Form), st.lists(MOUNTS, min_size=1, max_size=4))
def test_mounts_come_back_from_every_form(form: Form, mounts: list[SCSIMount]) -> None:
    mounts = mounts[:1] if form is Form.SINGLE else mounts
    assert gob.decode_outer(gob.encode_outer(form, mounts)) == mounts


@pytest.mark.parametrize("form", [Form.SLICE, Form.INTERFACE_SLICE, Form.STRUCT_WITH_INTERFACE_SLICE])
def test_no_mounts_come_back_from_every_form(form: Form) -> None:
    assert gob.decode_outer(gob.encode_outer(form, [])) == []


def test_one_is_not_two() -> None:
    with pytest.raises(InvalidRequest):
        gob.encode_outer(Form.SINGLE, [])


STREAMS = [
    GOOD,
    bytes.fromhex(EVERY_KIND),
    bytes.fromhex(NESTED),
    *(bytes.fromhex(vector["hex"]) for vector in VECTORS["outer"]),
]
STREAMS += [bytes.fromhex(data) for data in OTHER_IDS.values()]


@st.composite
def broken_streams(draw: st.DrawFn) -> bytes:
    """A stream with some of its bytes changed, taken out or put in."""
    data = bytearray(draw(st.sampled_from(STREAMS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


def refuse_or_give_back(data: bytes) -> None:
    for read in (gob.decode, gob.decode_outer, gob.decode_value):
        try:
            read(data)
        except ProtocolError:
            continue
    try:
        mount = gob.decode(data)
    except ProtocolError:
        return
    assert gob.decode(gob.encode(mount)) == mount


@settings(max_examples=500, deadline=None)
@given(broken_streams())
def test_a_broken_stream_is_refused_or_read(data: bytes) -> None:
    refuse_or_give_back(data)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(bytes.fromhex("ffffffffffffffff"))
def test_noise_is_refused_or_read(data: bytes) -> None:
    refuse_or_give_back(data)


def test_a_small_stream_takes_little_memory_whatever_it_says() -> None:
    uints = gobstream.type_definition(
        64, gobstream.SLICE, gobstream.common_type("", 64) + b"\1" + gobstream.encode_int(gobstream.UINT)
    )
    claims = [
        gobstream.message(uints)
        + gobstream.message(gobstream.encode_int(64) + b"\0" + gobstream.encode_uint(count) + b"\1" * 100)
        for count in (101, 1 << 20, 1 << 31, (1 << 64) - 1)
    ]
    claims += [gobstream.encode_uint(1 << 40) + b"\x06\0\1", b"\x08\x0c\0\xfc\x7f\xff\xff\xff\0"]
    tracemalloc.start()
    try:
        for data in claims:
            with pytest.raises(ProtocolError):
                gob.decode_value(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_nesting_has_an_end() -> None:
    lists = gobstream.type_definition(
        64, gobstream.SLICE, gobstream.common_type("", 64) + b"\1" + gobstream.encode_int(64)
    )
    for depth, is_read in ((50, True), (200, False), (100_000, False)):
        value = gobstream.encode_int(64) + b"\0" + b"\1" * depth + b"\0"
        data = gobstream.message(lists) + gobstream.message(value)
        if is_read:
            gob.decode_value(data)
        else:
            with pytest.raises(ProtocolError, match="deep"):
                gob.decode_value(data)


def test_an_error_shows_what_came_and_where() -> None:
    with pytest.raises(ProtocolError, match="at byte") as caught:
        gob.decode(GOOD[:20])
    assert str(caught.value.message).startswith(GOOD[:8].hex())
