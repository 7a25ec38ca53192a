"""What VMs need of this machine, and how to mend what is missing: what `uvm doctor` prints."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utilityvm.errors import UtilityVMError
from utilityvm.guestimage import build
from utilityvm.hosts.qemu import accelerator, confinement, emulator
from utilityvm.machine import paths
from utilityvm.machine.oserrors import typed
from utilityvm.machine.programs import find_program
from utilityvm.machine.threads import in_thread
from utilityvm.store import Store, VMState
from utilityvm.text import count, size

_FIX_OF_WALLS = "apt-get install bubblewrap"
_FIX_OF_LAYER = {
    confinement.Layer.CGROUP: "none needed; to bound what VMs take: docs/security.md, A cgroup for each VM"
}
_IMAGE_SPACE_BYTES = 1_200_000_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `doctor` looked at."""

    what: str  # "qemu", "guest image", …
    verdict: Literal["ok", "note", "fault"]  # a fault keeps VMs from running, a note does not
    detail: str
    fix: str | None = None  # what to do about it, often a command


@typed
async def doctor() -> list[Finding]:
    """Look at everything that VMs need on this machine; the findings are in the order in which to mend them.

    Nothing is changed. VMs can run if no verdict is "fault".
    """
    return [
        Finding("python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})"),
        *await _qemu(),
        *await in_thread(list, _files()),
    ]


def _files() -> Iterator[Finding]:
    """What can be looked at without starting anything."""
    yield _program("qemu-img", "qemu-utils", "images cannot be made or converted")
    yield _program("setpriv", "util-linux", "QEMU cannot be started", needed=True)
    yield from _programs_of_the_image()
    yield _image()
    yield from _folders()
    yield _vms()


async def _qemu() -> list[Finding]:
    try:
        found = await emulator.find()
    except UtilityVMError as error:
        return [Finding("qemu", "fault", str(error), error.remedy)]
    findings = [Finding("qemu", "ok", f"{found.version} ({found.path}, {found.machine})")]
    walls = await confinement.survey(found, confinement.Mode.AUTO)
    findings.append(Finding("confinement", "ok", "; ".join(walls.on)))
    for why in dict.fromkeys(walls.off.values()):
        layers = [layer for layer, reason in walls.off.items() if reason == why]
        detail = f"QEMU has not: {'; '.join(layers)} ({why})"
        findings.append(Finding("confinement", "note", detail, _FIX_OF_LAYER.get(layers[0], _FIX_OF_WALLS)))
    try:
        chosen = await accelerator.choose(found)
    except UtilityVMError as error:
        return [*findings, Finding("accelerator", "fault", str(error), error.remedy)]
    if chosen.name != "tcg":
        return [*findings, Finding("accelerator", "ok", f"{chosen.name}: {chosen.reason}")]
    return [*findings, Finding("accelerator", "note", f"tcg: {chosen.reason}", await in_thread(_fix_of_tcg))]


def _fix_of_tcg() -> str:
    if Path("/dev/kvm").exists() and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "as root: /usr/sbin/adduser USER kvm; then log in again"
    return "VMs work, but slowly; for KVM, enable virtualisation in the firmware, or nesting on the host"


def _program(name: str, package: str, without: str, *, needed: bool = False) -> Finding:
    try:
        return Finding(name, "ok", str(find_program(name, package=package)))
    except UtilityVMError as error:
        return Finding(name, "fault" if needed else "note", f"{error}: {without}", error.remedy)


def _programs_of_the_image() -> Iterator[Finding]:
    """They are needed only to build the guest image, so they are no fault where that is there."""
    try:
        needed = build.find() is None
    except UtilityVMError:
        needed = True
    without = "the guest image cannot be built"
    for name, package in (("mmdebstrap", "mmdebstrap"), ("mkfs.ext4", "e2fsprogs"), ("depmod", "kmod")):
        yield _program(name, package, without, needed=needed)


def _image() -> Finding:
    try:
        image = build.find()
    except UtilityVMError as error:
        return Finding("guest image", "fault", str(error), error.remedy)
    if image is None:
        free = shutil.disk_usage(_existing(paths.cache_dir())).free
        if free < _IMAGE_SPACE_BYTES:
            return Finding(
                "guest image",
                "fault",
                f"not built, and {paths.cache_dir()} has {size(free)} free; it needs {size(_IMAGE_SPACE_BYTES)}",
                "make room, or set XDG_CACHE_HOME to a folder on a larger disk",
            )
        return Finding("guest image", "fault", "not built", "uvm image build")
    try:
        build.verify(image)
    except UtilityVMError as error:
        return Finding("guest image", "fault", str(error), error.remedy)
    return Finding("guest image", "ok", f"{image.key} ({size(image.size_bytes)}, {image.suite}, {image.kernel.parent})")


def _folders() -> Iterator[Finding]:
    for what, folder, variable in (
        ("state folder", paths.state_dir(), "UTILITYVM_STATE_DIR"),
        ("runtime folder", paths.runtime_dir(), "UTILITYVM_RUNTIME_DIR"),
        ("cache folder", paths.cache_dir(), "UTILITYVM_CACHE_DIR"),
    ):
        fault, fix = _fault_of(folder, variable)
        yield Finding(what, "fault" if fault else "ok", fault or str(folder), fix if fault else None)


def _fault_of(folder: Path, variable: str) -> tuple[str | None, str]:
    choose = f"set {variable} to a folder of your own"
    place = _existing(folder)
    status = place.stat()
    if not stat.S_ISDIR(status.st_mode):
        return f"{place} is not a folder", f"move it away, or {choose}"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} cannot be written", choose
    if place == folder and status.st_uid != os.geteuid():
        return f"{folder} belongs to another user (id {status.st_uid})", choose
    if place == folder and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {folder}", f"chmod go-w {folder}"
    return None, choose


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that there is."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _vms() -> Finding:
    if not paths.store_file().exists():
        return Finding("store", "ok", "no VM was ever started here")
    try:
        with Store.open() as store:
            vms = store.vms()
    except UtilityVMError as error:
        return Finding("store", "fault", str(error), error.remedy)
    dead = [vm.name for vm in vms if vm.seen_state is VMState.DEAD]
    if dead:
        return Finding("store", "note", f"{count(len(dead), 'dead VM')}: {', '.join(dead)}", f"uvm stop {dead[0]}")
    return Finding("store", "ok", count(len(vms), "VM"))
