"""The settings of a mount as a document: all of them, and never a key."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utilityvm.scsi import mount_config
from utilityvm.scsi.mount_config import CallerKey, MountConfig, ScratchKey, Verity

KEY = b"a key that nobody may ever read."


@given(
    st.builds(
        MountConfig,
        partition=st.integers(0, 255),
        read_only=st.booleans(),
        options=st.lists(st.text()).map(tuple),
        filesystem=st.none() | st.text(),
        ensure_filesystem=st.booleans(),
        reformat=st.booleans(),
        block_device=st.booleans(),
        encryption=st.sampled_from([None, ScratchKey(), CallerKey(b"")]),
        verity=st.none() | st.builds(Verity, root_hash=st.binary(), hash_offset_bytes=st.integers(0, 1 << 62)),
    )
)
def test_what_was_written_is_read(config: MountConfig) -> None:
    assert mount_config.from_json(mount_config.to_json(config)) == config


def test_a_setting_that_is_the_default_is_not_written() -> None:
    """So that a document without a later setting is still read as it was meant."""
    assert mount_config.to_json(MountConfig()) == "{}"
    assert mount_config.to_json(MountConfig(partition=1)) == '{"partition":1}'


def test_a_setting_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="later"):
        mount_config.from_json('{"later": true}')


@pytest.mark.parametrize(
    "text", ["", "null", "[]", '{"partition": -1}', '{"encryption": "rot13"}', '{"encryption": {}}']
)
def test_what_is_no_document_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        mount_config.from_json(text)


def test_no_key_gets_into_a_document_or_a_log() -> None:
    config = MountConfig(encryption=CallerKey(KEY))
    assert mount_config.to_json(config) == '{"encryption":"caller"}'
    assert KEY.decode() not in repr(config)
    for encode in (msgspec.json.encode, msgspec.msgpack.encode, msgspec.to_builtins):
        with pytest.raises((TypeError, NotImplementedError)):
            encode(config)


def test_keys_are_equal_by_what_they_are() -> None:
    assert {CallerKey(KEY), CallerKey(KEY), ScratchKey(), ScratchKey()} == {CallerKey(KEY), ScratchKey()}
    assert CallerKey(KEY) != CallerKey(b"")
