"""What a type checker knows of the public calls; mypy and pyright read this, and nothing of it runs but the last."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import assert_type

import msgspec
import pytest

from utilityvm import (
    GENERATED,
    Acquiring,
    CallerKey,
    DiskFormat,
    DiskSpec,
    MountConfig,
    MountedDisk,
    MountSettings,
    ScratchKey,
    SCSIMount,
    UtilityVM,
    VMAccess,
)
from utilityvm.errors import UtilityVMError
from utilityvm.vm.config import DiskSettings


async def a_disk_with_a_guest_path_has_one(vm: UtilityVM, maybe: str | None) -> None:
    async with vm.add_scsi("/a", "/data") as disk:
        assert_type(disk, MountedDisk)
        assert_type(disk.guest_path, PurePosixPath)
    assert_type(await vm.add_scsi("/a", GENERATED, read_only=True), MountedDisk)
    assert_type(await vm.add_scsi_physical_disk("/dev/x", PurePosixPath("/data")), MountedDisk)
    assert_type(await vm.add_scsi("/a"), SCSIMount)
    assert_type(await vm.add_scsi("/a", maybe), SCSIMount)
    assert_type((await vm.add_scsi("/a")).guest_path, PurePosixPath | None)
    assert_type(UtilityVM.start("worker"), Acquiring[UtilityVM])


async def all_of_many_are_mounts(vm: UtilityVM, disks: list[DiskSpec]) -> None:
    assert_type(await vm.add_scsi_many(disks), list[SCSIMount])
    assert_type(await vm.add_scsi_many(disks, which="all"), list[SCSIMount])
    assert_type(await vm.add_scsi_many(disks, which="each"), list[SCSIMount | UtilityVMError])


async def words_and_enums_are_taken_alike(vm: UtilityVM) -> None:
    await vm.add_scsi("/a", access="group", format="raw")
    await vm.add_scsi("/a", access=VMAccess.GROUP, format=DiskFormat.RAW)


def test_the_keywords_of_a_call_are_the_fields_of_a_disk() -> None:
    parameters = inspect.signature(DiskSpec).parameters
    rest = {"host_path", "guest_path", "physical", "mount"}
    assert set(DiskSettings.__annotations__) == parameters.keys() - rest
    for name, annotation in DiskSettings.__annotations__.items():
        assert annotation.__forward_arg__ == parameters[name].annotation, name


def test_the_keywords_of_a_mount_are_the_fields_of_its_config() -> None:
    """`MountSettings` says to type checkers what `MountConfig` declares."""
    kinds = typing.get_type_hints(MountSettings)
    for field in msgspec.structs.fields(MountConfig):
        kind, meta = typing.get_args(field.type)
        assert kinds.pop(field.name) in (kind, KEYWORDS.get(field.name)), field.name
        assert meta.description.endswith("."), field.name
    assert kinds == {}


# Where a caller's type is wider or more exact than what is kept.
KEYWORDS: dict[str, object] = {"options": Sequence[str], "encryption": ScratchKey | CallerKey | None}


def test_a_disk_holds_the_settings_of_its_mount() -> None:
    spec = DiskSpec(host_path="/a", guest_path="/data", read_only=True, options=["noatime"])
    assert spec == DiskSpec(host_path="/a", guest_path="/data", mount=spec.mount)
    writable = DiskSpec(host_path="/a", mount=spec.mount, read_only=False)
    assert (writable.read_only, writable.mount.options) == (False, spec.mount.options)
    with pytest.raises(TypeError, match="colour"):
        DiskSpec(host_path="/a", colour="red")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("call", "settings"), [(UtilityVM.add_scsi, DiskSettings), (UtilityVM.add_scsi_physical_disk, MountSettings)]
)
def test_a_call_names_its_keywords_and_their_defaults(call: object, settings: type) -> None:
    assert callable(call)
    parameters = inspect.signature(call).parameters
    assert set(parameters) == {
        "self",
        "host_path",
        "guest_path",
        "holder",
        "on_busy",
        "timeout_s",
        *settings.__annotations__,
    }
    assert (
        parameters["access"].default is VMAccess.INDIVIDUAL if settings is DiskSettings else "access" not in parameters
    )
