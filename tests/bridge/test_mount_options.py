"""Mount options are those of mount(8), and it is told from its manual what each is."""

from __future__ import annotations

import pytest

from utilityvm.bridge.mount_options import (
    MS_MANDLOCK,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_NOSYMFOLLOW,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_SHARED,
    MS_SILENT,
    parse,
    split,
)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["ro,noexec", "sync"], ["ro", "noexec", "sync"]),
        (['context="u:object_r:t:s0:c460,c902"'], ['context="u:object_r:t:s0:c460,c902"']),
        (['context="a,ro,noexec,b",ro'], ['context="a,ro,noexec,b"', "ro"]),
        (['ro,fscontext="a,b",context="c,d"'], ["ro", 'fscontext="a,b"', 'context="c,d"']),
    ],
)
def test_a_comma_in_quotes_does_not_end_an_option(options: list[str], parts: list[str]) -> None:
    assert list(split(options)) == parts


def test_a_quoted_option_reaches_the_file_system_as_it_is() -> None:
    assert parse(['noatime,context="a,ro,noexec,b"'], read_only=False).data == 'context="a,ro,noexec,b"'


@pytest.mark.parametrize("options", [['context="a,b'], ['"'], ['a="b"c"'], ['context="a', 'b"']])
def test_a_quote_that_is_not_closed_is_refused(options: list[str]) -> None:
    with pytest.raises(ValueError, match="quote"):
        parse(options, read_only=False)


@pytest.mark.parametrize(
    "option",
    [
        "defaults",
        "auto",
        "noauto",
        "nofail",
        "_netdev",
        "nouser",
        "nousers",
        "noowner",
        "nogroup",
        "comment=systemd.automount",
        "x-systemd.automount",
        "x-systemd.device-timeout=5",
        "x-",
        "X-anything=1",
        "X-mount.mkdir=0755",
        "uhelper=udisks2",
        "user=tester",
        "",
    ],
)
def test_what_mount_keeps_for_itself_does_not_reach_the_kernel(option: str) -> None:
    assert parse([option], read_only=False) == (0, (), "")


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (["nosymfollow"], MS_NOSYMFOLLOW),
        (["nosymfollow,symfollow"], 0),
        (["silent"], MS_SILENT),
        (["silent", "loud"], 0),
        (["mand"], MS_MANDLOCK),
        (["ro", "rw"], 0),
        (["rw", "ro"], MS_RDONLY),
        (["noexec,exec"], 0),
        (["user"], MS_NOEXEC | MS_NOSUID | MS_NODEV),
        (["user,exec"], MS_NOSUID | MS_NODEV),
        (["exec,users"], MS_NOEXEC | MS_NOSUID | MS_NODEV),
        (["owner"], MS_NOSUID | MS_NODEV),
        (["group,suid,dev"], 0),
        (["user=tester"], 0),
    ],
)
def test_of_flags_that_contradict_each_other_the_later_counts(options: list[str], flags: int) -> None:
    assert parse(options, read_only=False).flags == flags


def test_propagation_is_kept_in_its_order() -> None:
    assert parse(["rprivate,shared"], read_only=False).propagation == (MS_PRIVATE | MS_REC, MS_SHARED)


@pytest.mark.parametrize(
    "option",
    [
        "bind",
        "rbind",
        "move",
        "remount",
        "loop",
        "loop=/dev/loop0",
        "offset=512",
        "sizelimit=1",
        "verity.roothash=00",
        "encryption=aes",
        "X-mount.subdir=a",
        "X-mount.owner=1",
        "x-mount.idmap=/proc/1/ns/user",
    ],
)
def test_an_option_that_asks_for_another_act_is_refused_by_its_name(option: str) -> None:
    with pytest.raises(ValueError, match=option.replace(".", r"\.")):
        parse([f"ro,{option}"], read_only=False)


def test_rw_contradicts_a_read_only_disk() -> None:
    with pytest.raises(ValueError, match="rw contradicts read_only"):
        parse(["noexec,rw"], read_only=True)
    assert parse(["ro"], read_only=True).flags == MS_RDONLY


@pytest.mark.parametrize(
    "option", ["data=journal", "errors=remount-ro", "compress=zstd:3", "nouuid", "subvol=a", "uid=0"]
)
def test_what_is_not_mounts_is_the_file_systems(option: str) -> None:
    assert parse([option], read_only=False).data == option
