"""The settings of a mount as a document: all of them, and never a key."""

from __future__ import annotations

from pathlib import PurePosixPath

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utilityvm.bridge import mount_options
from utilityvm.bridge.mount_options import MS_NOATIME, MS_NODEV, MS_NOEXEC, MS_NOSUID
from utilityvm.errors import InvalidRequest
from utilityvm.guests.mount_settings import check_config, disk_settings
from utilityvm.scsi import mount_config
from utilityvm.scsi.mount import same_mount
from utilityvm.scsi.mount_config import CallerKey, MountConfig, ScratchKey, Verity
from utilityvm.scsi.slot import Slot

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


def test_an_untrusted_disk_is_mounted_so_that_nothing_on_it_runs() -> None:
    """Whatever the caller's own options say: of two that contradict each other, mount(8) takes the later one."""
    config = MountConfig(options=("exec", "noatime"), untrusted=True)
    assert config.mount_options == ("exec", "noatime", "nosuid", "nodev", "noexec")
    flags = mount_options.parse(config.mount_options, read_only=False).flags
    assert flags == MS_NOATIME | MS_NOSUID | MS_NODEV | MS_NOEXEC
    settings = disk_settings(Slot(0, 1), config, PurePosixPath("/data"))
    assert settings["Options"] == list(config.mount_options), "so the guest is told"


def test_an_untrusted_mount_is_shared_with_no_other() -> None:
    assert not same_mount(MountConfig(), MountConfig(untrusted=True))


def test_a_published_device_cannot_be_untrusted() -> None:
    """The guest's programs open the device itself: there is no mount that could hold them back."""
    with pytest.raises(InvalidRequest, match="takes no mount options"):
        check_config(MountConfig(block_device=True, untrusted=True))
