"""Templates, clones and pools on real VMs."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import pytest_asyncio

from owners import until_no_process_of
from points import rounds
from utilityvm import (
    CallerKey,
    ClonePool,
    DiskInUse,
    DiskSpec,
    GuestRefused,
    InvalidRequest,
    Migrating,
    NotSupported,
    SetupError,
    Slot,
    Template,
    TemplateDamaged,
    TemplateDiffers,
    TemplateExists,
    TemplateInUse,
    TemplateNotFound,
    UtilityVM,
    UtilityVMError,
    VMExists,
    VMNotRunning,
)
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.hosts.qemu import QemuHost, memory
from utilityvm.machine import paths
from utilityvm.machine.programs import find_program, run
from utilityvm.scsi.manager import ScsiManager
from utilityvm.scsi.ports import DiskFormat
from utilityvm.store import SqliteJournal, Store
from utilityvm.templates import catalog
from utilityvm.templates import save as saving
from utilityvm.testing.images import ext4_image, read_file
from utilityvm.vm import booting

Uvm = Callable[..., "CompletedProcess[str]"]

pytestmark = pytest.mark.real

WRITTEN, MORE, SHARED, SPARE = Slot(0, 1), Slot(0, 2), Slot(0, 3), Slot(0, 4)
CLONES = int(os.environ.get("UTILITYVM_CLONES", rounds(3, long=10)))  # alive at once
UNIQUE = rounds(6, long=20)
HOOKS = "/etc/utilityvm/template.d"


@dataclasses.dataclass(frozen=True)
class Warm:
    """The template of this file, and the images that it is made of."""

    template: Template
    written: Path  # VHDX, writable at /data
    more: Path  # qcow2, writable at /more
    shared: Path  # raw, read-only at /shared
    spare: Path  # raw, attached without a mount

    def files(self) -> list[Path]:
        disks = [self.written, self.more, self.shared, self.spare]
        return [*disks, *(path for path in sorted(self.template.folder.rglob("*")) if path.is_file())]

    def digests(self) -> dict[Path, str]:
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.files()}


@pytest_asyncio.fixture(scope="module")
async def warm(booted: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Warm]:
    folder = tmp_path_factory.mktemp("warm")
    written = ext4_image(folder / "written.vhdx", {"base": "vhdx\n"}, image_format=DiskFormat.VHDX)
    more = ext4_image(folder / "more.qcow2", {"base": "qcow2\n"}, image_format=DiskFormat.QCOW2)
    shared = ext4_image(folder / "shared.raw", {"base": "shared\n"})
    spare = ext4_image(folder / "spare.raw", {"base": "spare\n"})
    vm = await UtilityVM.clone(booted, "warmed")
    try:
        await vm.add_scsi(written, "/data")
        await vm.add_scsi(more, "/more")
        await vm.add_scsi(shared, "/shared", read_only=True)
        await vm.add_scsi(spare)
        await output(
            vm, "echo warm > /data/warm; echo kept > /run/kept; echo 0 > /run/count; sleep 1000 >/dev/null 2>&1 &"
        )
        template = await vm.save_as_template("warm")
    finally:
        await vm.stop()
    yield Warm(template, written, more, shared, spare)


async def output(vm: UtilityVM, script: str) -> str:
    result = await vm.run(["sh", "-c", f"exec 2>&1; {script}"])
    assert result.exit_code == 0, result.stdout.decode()
    return result.stdout.decode()


def left_of(name: str) -> list[str]:
    """What there is of a VM of that name."""
    left = [str(path) for path in paths.vm_dir(name).glob("*")]
    with Store.open() as store:
        vms = store.vms()
    left += [vm.name for vm in vms if vm.name == name]
    known = {vm.uuid for vm in vms if vm.name != name}
    return left + [str(path) for path in (paths.state_dir() / "overlays").glob("*/*") if path.parent.name not in known]


async def test_a_clone_goes_on_where_the_template_was(warm: Warm) -> None:
    async with UtilityVM.clone("warm", "one") as vm:
        assert [(str(view.slot), view.read_only, view.references) for view in vm.scsi_slots()] == [
            ("0:1", False, 1),
            ("0:2", False, 1),
            ("0:3", True, 1),
            ("0:4", False, 1),
        ]
        assert [str(view.guest_path) for view in vm.scsi_mounts()] == ["/data", "/more", "/shared"]
        assert {mount.holder for mount in vm.scsi_reservations()} == {"template warm"}
        text = await output(vm, "cat /run/kept /data/warm /data/base /more/base /shared/base; pgrep -c sleep; hostname")
        assert text == "kept\nwarm\nvhdx\nqcow2\nshared\n1\none\n"


async def test_clones_see_the_template_and_their_own_writes_only(warm: Warm, tmp_path: Path) -> None:
    before = warm.digests()
    clones = [await UtilityVM.clone("warm", f"writer{number}") for number in range(CLONES)]
    try:
        for vm in clones:
            await output(
                vm, f"echo {vm.name} > /data/mine; echo {vm.name} > /more/base; echo {vm.name} >> /run/kept; sync"
            )
        for vm in clones:
            text = await output(vm, "cat /data/mine /more/base /run/kept; ls /data")
            assert text == f"{vm.name}\n{vm.name}\nkept\n{vm.name}\nbase\nlost+found\nmine\nwarm\n"
            refused = await vm.run(["sh", "-c", "echo no > /shared/base"])
            assert refused.exit_code != 0, "a read-only disk stays read-only in every clone"
    finally:
        for vm in clones:
            await vm.stop()
    assert warm.digests() == before, "clones change nothing of the template, to the byte"
    assert catalog.verify(catalog.load("warm")) == []
    assert [left_of(vm.name) for vm in clones] == [[]] * CLONES


async def test_the_disks_of_a_clone_are_released_one_by_one_and_others_come(warm: Warm, disk: Path) -> None:
    async with UtilityVM.clone("warm", "busy") as vm:
        extra = await vm.add_scsi(disk, "/extra")
        again = await vm.add_scsi(warm.shared, "/shared", read_only=True)
        assert (str(extra.slot), again.slot, again.ref_count) == ("0:5", SHARED, 2)
        for mount in vm.scsi_reservations():
            await mount.release()
        assert vm.scsi_slots() == []
        assert "/data" not in await output(vm, "cat /proc/mounts")
        async with vm.add_scsi(warm.shared, "/again", read_only=True) as mount:
            assert mount.slot == WRITTEN, "the slots are free"
            assert await output(vm, "cat /again/base") == "shared\n"


async def test_no_two_clones_are_alike(warm: Warm) -> None:
    script = (
        "head -c 16 /dev/urandom | sha256sum; cat /etc/machine-id /proc/sys/kernel/random/boot_id;"
        "cat /proc/sys/kernel/random/uuid; hostname; cat /etc/hostname"
    )
    clones: list[UtilityVM] = []
    try:
        for number in range(UNIQUE):
            clones.append(await UtilityVM.clone("warm", f"unique{number}"))
        assert all(vm.is_running for vm in clones)
        answers = [text.splitlines() for text in await asyncio.gather(*(output(vm, script) for vm in clones))]
        for position, values in enumerate(zip(*answers, strict=True)):
            assert len(set(values)) == len(clones), f"line {position} of {answers[0]}"
        assert [answer[4] for answer in answers] == [vm.name for vm in clones]
        late = await UtilityVM.clone("warm", "late")
        clones.append(late)
        apart_s = float(await output(late, "date +%s.%N")) - time.time()
        assert abs(apart_s) < 60, "its clock is the host's, not the template's"
    finally:
        await asyncio.gather(*(vm.stop() for vm in clones))


async def test_a_hook_makes_what_a_clone_must_not_share(booted: str) -> None:
    vm = await UtilityVM.clone(booted, "hooked")
    hook = "#!/bin/sh\\necho $1 $UTILITYVM_NAME >> /run/hooked\\n"
    try:
        await output(vm, f"mkdir -p {HOOKS} && printf '{hook}' > {HOOKS}/10-keys && chmod +x {HOOKS}/10-keys")
        await vm.save_as_template("hooked")
        async with UtilityVM.clone("hooked", "keyed") as clone:
            assert await output(clone, "cat /run/hooked") == "save\nclone keyed\n"
    finally:
        await vm.stop()
        with Store.open() as store:
            catalog.remove("hooked", store)


async def test_a_failed_save_lets_the_vm_go_on(booted: str, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = await UtilityVM.clone(booted, "going")
    try:
        await vm.add_scsi(disk, "/data")
        await output(vm, f"mkdir -p {HOOKS} && printf '#!/bin/sh\\nexit 3\\n' > {HOOKS}/no && chmod +x {HOOKS}/no")
        with pytest.raises(GuestRefused, match="no"):
            await vm.save_as_template("never")
        await output(vm, f"rm {HOOKS}/no; echo after hook > /data/after")
        for owner, name in ((memory, "copy"), (catalog, "digest"), (saving, "encode")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, refuse)
                with pytest.raises(SetupError, match="no space"):
                    await vm.save_as_template("never")
            assert await output(vm, f"echo {name} >> /data/after; sync; hostname") == "going\n"
        with pytest.raises(TemplateNotFound):
            catalog.load("never")
        assert list(paths.templates_dir().glob(".*")) == []
        extra = await vm.add_scsi(disk, "/data")
        await extra.release()
        await vm.save_as_template("at-last")
        with pytest.raises(VMNotRunning, match="at-last"):
            await vm.run(["true"])
        with pytest.raises(VMNotRunning, match="at-last"):
            await vm.add_scsi(disk, "/data")
        assert left_of("going") == []
        async with UtilityVM.clone("at-last", "going") as clone:
            assert await output(clone, "cat /data/after") == "after hook\ncopy\ndigest\nencode\n"
    finally:
        await vm.stop()
        with Store.open() as store:
            catalog.remove("at-last", store)


def refuse(*_: object, **__: object) -> None:
    raise SetupError("no space")


async def test_what_cannot_be_saved_is_refused_first(
    vm_booted: UtilityVM, disk: Path, tmp_path: Path, warm: Warm
) -> None:
    with pytest.raises(TemplateExists, match="'warm' already"):
        await vm_booted.save_as_template("warm")
    with pytest.raises(InvalidRequest):
        await vm_booted.save_as_template("../warm")
    blank = tmp_path / "blank.raw"
    blank.write_bytes(bytes(64 << 20))
    key = CallerKey(os.urandom(64))
    async with vm_booted.add_scsi(blank, "/secret", encryption=key, ensure_filesystem=True):
        with pytest.raises(NotSupported, match="key"):
            await vm_booted.save_as_template("secret")
    with pytest.raises(NotSupported, match="stay in the guest's memory when its mount is released"):
        await vm_booted.save_as_template("secret")
    assert "secret" not in catalog.names()
    assert await output(vm_booted, "echo alive") == "alive\n"


async def test_nothing_changes_while_a_template_is_saved(
    booted: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await UtilityVM.clone(booted, "still")
    seen: list[UtilityVMError] = []
    loop = asyncio.get_running_loop()

    def meanwhile(*_: object, **__: object) -> None:
        try:
            asyncio.run_coroutine_threadsafe(vm.add_scsi(disk, "/data"), loop).result()
        except UtilityVMError as error:
            seen.append(error)
        raise SetupError("cut short")

    monkeypatch.setattr(memory, "copy", meanwhile)
    try:
        with pytest.raises(SetupError, match="cut short"):
            await vm.save_as_template("still")
        assert [type(error) for error in seen] == [Migrating]
        async with vm.add_scsi(disk, "/data"):
            assert await output(vm, "cat /data/greeting") == "hello\n"
    finally:
        await vm.stop()


async def test_a_templates_disks_are_kept_from_writers(warm: Warm, vm_booted: UtilityVM) -> None:
    for path in (warm.written, warm.shared):
        with pytest.raises(DiskInUse, match="template warm"):
            await vm_booted.add_scsi(path, "/data")
        async with vm_booted.add_scsi(path, "/data", read_only=True) as mount:
            assert mount.read_only
    async with UtilityVM.clone("warm", "keeper"):
        with Store.open() as store, pytest.raises(TemplateInUse, match="VM keeper"):
            catalog.remove("warm", store)
        with pytest.raises(DiskInUse, match="template warm"):  # its clone has a lock on it now
            await vm_booted.add_scsi(warm.written, "/data")
    assert catalog.load("warm").uuid == warm.template.uuid


async def test_a_clone_becomes_a_template(warm: Warm) -> None:
    parent = await UtilityVM.clone("warm", "parent")
    try:
        await output(parent, "echo second > /data/second; echo 2 > /run/count")
        child = await parent.save_as_template("child")
        assert child.manifest.parent is not None
        with Store.open() as store, pytest.raises(TemplateInUse, match="template child"):
            catalog.remove("warm", store)
        async with (
            await UtilityVM.clone("child", "grandchild") as one,
            await UtilityVM.clone("warm", "sibling") as other,
        ):
            assert (
                await output(one, "cat /data/second /data/warm /run/count; echo 3 > /data/second")
                == "second\nwarm\n2\n"
            )
            assert await output(other, "ls /data; cat /run/count") == "base\nlost+found\nwarm\n0\n"
        assert catalog.verify(child) == []
    finally:
        await parent.stop()
    with Store.open() as store:
        catalog.remove("child", store)
    assert not child.folder.exists()


async def test_another_disk_can_take_the_place_of_one_that_is_not_mounted(warm: Warm, tmp_path: Path) -> None:
    job = ext4_image(tmp_path / "job.qcow2", {"base": "job\n"}, image_format=DiskFormat.QCOW2)
    small = ext4_image(tmp_path / "small.raw", {}, size_mib=8)
    for slot, disk, words in (
        (SPARE, small, "bytes"),
        (WRITTEN, job, "mounted at /data"),
        (Slot(3, 9), job, "no disk at 3:9"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            await UtilityVM.clone("warm", "replaced", replace={slot: DiskSpec(host_path=disk)})
        assert left_of("replaced") == []
    async with (
        await UtilityVM.clone("warm", "replaced", replace={SPARE: DiskSpec(host_path=job)}) as vm,
        await vm.add_scsi(job, "/job") as mount,
    ):
        assert mount.slot == SPARE
        assert await output(vm, "cat /job/base; echo done > /job/result") == "job\n"
    assert read_file(job, "/result", image_format=DiskFormat.QCOW2) == "done\n"
    assert read_file(warm.spare, "/base", image_format=DiskFormat.RAW) == "spare\n"


@pytest.mark.parametrize("step", ["write", "start", "loaded", "wake", "awaken", "restore"])
async def test_a_clone_that_fails_leaves_nothing(warm: Warm, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    owner: object = {
        "write": SqliteJournal,
        "start": QemuHost,
        "loaded": QemuHost,
        "wake": booting,
        "awaken": BridgeGuest,
        "restore": ScsiManager,
    }[step]
    monkeypatch.setattr(owner, step, refuse)
    with pytest.raises(SetupError, match="no space"):
        await UtilityVM.clone("warm", "failing")
    assert left_of("failing") == []
    await until_no_process_of("failing")
    monkeypatch.undo()
    async with UtilityVM.clone("warm", "failing") as vm:
        assert await output(vm, "cat /data/warm") == "warm\n"


async def test_a_template_that_is_not_what_was_saved_is_refused(warm: Warm) -> None:
    manifest = warm.template.folder / catalog.MANIFEST
    before = manifest.read_bytes()
    status = warm.written.stat()
    try:
        os.utime(warm.written)
        with pytest.raises(TemplateDamaged, match="written"):
            await UtilityVM.clone("warm", "damaged")
        assert "written to since" in catalog.verify(warm.template)[0]
        os.utime(warm.written, ns=(status.st_atime_ns, status.st_mtime_ns))
        document = json.loads(before)
        manifest.write_text(json.dumps({**document, "qemu_version": "6.6.6", "cpu": "486"}))
        with pytest.raises(TemplateDiffers, match=r"QEMU: '6\.6\.6' then.*processor model: '486' then"):
            await UtilityVM.clone("warm", "damaged")
        document["disks"][0]["size_bytes"] += 512
        manifest.write_text(json.dumps(document))
        with pytest.raises(TemplateDamaged, match="not 16777728 as was saved"):
            await UtilityVM.clone("warm", "damaged")
        manifest.write_text("{")
        with pytest.raises(TemplateDamaged, match="not the manifest"):
            await UtilityVM.clone("warm", "damaged")
        manifest.unlink()
        with pytest.raises(TemplateNotFound):
            await UtilityVM.clone("warm", "damaged")
    finally:
        manifest.write_bytes(before)
        os.utime(warm.written, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert left_of("damaged") == []
    with pytest.raises(TemplateNotFound, match="warn"):
        await UtilityVM.clone("warn", "damaged")


async def test_a_state_that_qemu_does_not_take_is_told_in_its_words(warm: Warm) -> None:
    state, manifest = warm.template.state, warm.template.folder / catalog.MANIFEST
    saved, document = state.read_bytes(), manifest.read_bytes()
    try:
        state.write_bytes(saved[: len(saved) // 2])
        changed = json.loads(document)
        status = state.stat()
        changed["state"]["fingerprint"].update(size_bytes=status.st_size, mtime_ns=status.st_mtime_ns)
        manifest.write_text(json.dumps(changed))
        with pytest.raises(TemplateDamaged, match="does not take the saved state"):
            await UtilityVM.clone("warm", "halved")
    finally:
        state.write_bytes(saved)
        os.utime(state, ns=(0, json.loads(document)["state"]["fingerprint"]["mtime_ns"]))
        manifest.write_bytes(document)
    assert left_of("halved") == []


async def test_names_are_taken_once(warm: Warm) -> None:
    async with UtilityVM.clone("warm", "taken"):
        with pytest.raises(VMExists):
            await UtilityVM.clone("warm", "taken")


async def test_overlays_of_a_killed_clone_are_whole(warm: Warm, tmp_path: Path) -> None:
    vm = await UtilityVM.clone("warm", "cut")
    try:
        await output(vm, "for i in $(seq 200); do echo $i > /more/$i; done; sync /more/200")
        writing = asyncio.ensure_future(vm.run(["sh", "-c", "while :; do date > /more/now; sync /more/now; done"]))
        await output(vm, "until [ -s /more/now ]; do :; done")
        os.kill(vm.process.pid, 9)
        await vm.wait()
        await asyncio.wait([writing])
        assert isinstance(writing.exception(), UtilityVMError)
        overlay = paths.overlays_dir(vm.uuid) / "0-2.qcow2"
        qemu_img = find_program("qemu-img", package="qemu-utils")
        run([qemu_img, "check", "-f", "qcow2", overlay])
        flat = tmp_path / "flat.raw"
        run([qemu_img, "convert", "-f", "qcow2", "-O", "raw", overlay, flat])
        e2fsck = find_program("e2fsck", package="e2fsprogs")
        run([e2fsck, "-E", "journal_only", "-p", flat])
        run([e2fsck, "-f", "-n", flat])
        assert run([find_program("debugfs", package="e2fsprogs"), "-R", "cat /200", flat]) == b"200\n"
    finally:
        await vm.stop()
    assert left_of("cut") == []


async def test_a_kept_clone_is_opened_by_the_next_owner(warm: Warm) -> None:
    vm = await UtilityVM.clone("warm", "kept", keep=True)
    try:
        mount = vm.scsi_reservations()[0]
        await output(vm, "echo kept > /data/kept")
        await vm.close()
        vm = await UtilityVM.open("kept")
        assert vm.findings == ()
        assert [str(view.slot) for view in vm.scsi_slots()] == ["0:1", "0:2", "0:3", "0:4"]
        assert await output(vm, "cat /data/kept") == "kept\n"
        await vm.release(mount.id)
        assert [str(view.slot) for view in vm.scsi_slots()] == ["0:2", "0:3", "0:4"]
    finally:
        await UtilityVM.remove("kept") if not vm.is_running else await vm.stop()
    assert left_of("kept") == []


async def test_a_pool_hands_out_running_clones_and_fills_up_again(warm: Warm) -> None:
    async with ClonePool("warm", size=2) as pool:
        first, second, third = [await pool.acquire() for _ in range(3)]
        try:
            answers = [
                (await output(vm, "cat /data/warm /etc/machine-id; hostname")).splitlines()
                for vm in (first, second, third)
            ]
            assert [answer[0] for answer in answers] == ["warm"] * 3
            assert len({answer[1] for answer in answers}) == 3
            assert [answer[2] for answer in answers] == [vm.name for vm in (first, second, third)]
        finally:
            for vm in (first, second, third):
                await vm.stop()
        waiting = await pool.acquire()
        await waiting.stop()
        with Store.open() as store:
            ours = [vm for vm in store.vms() if vm.name.startswith("warm-")]
        assert len(ours) <= pool.size
    with Store.open() as store:
        assert [vm.name for vm in store.vms() if vm.name.startswith("warm-")] == []
    with pytest.raises(VMNotRunning, match="closed"):
        await pool.acquire()


async def test_a_pool_replaces_what_died_in_it(warm: Warm) -> None:
    async with ClonePool("warm", size=1) as pool:
        doomed = await pool._take()
        pool._ready.append(doomed)
        with pytest.raises(VMNotRunning, match="pool"):
            await doomed.run(["true"])
        os.kill(doomed.process.pid, 9)
        await doomed.wait()
        async with pool.acquire() as vm:
            assert vm.name != doomed.name
            assert await output(vm, "cat /data/warm") == "warm\n"
        assert left_of(doomed.name) == []


async def test_a_pool_tells_why_it_is_empty(warm: Warm) -> None:
    status = warm.more.stat()
    try:
        os.utime(warm.more)
        async with ClonePool("warm", size=1) as pool:
            with pytest.raises(TemplateDamaged, match="more"):
                await pool.acquire()
            os.utime(warm.more, ns=(status.st_atime_ns, status.st_mtime_ns))
            async with pool.acquire() as vm:
                assert vm.is_running
    finally:
        os.utime(warm.more, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(TemplateNotFound):
        async with ClonePool("none", size=1):
            pass
    with pytest.raises(InvalidRequest):
        ClonePool("warm", size=0)


def test_the_commands(warm: Warm, uvm: Uvm, tmp_path: Path) -> None:
    assert uvm("clone", "warm", "cli", "--count", "2").returncode == 0
    try:
        assert uvm("exec", "cli-2", "--", "cat", "/data/warm").stdout == "warm\n"
        listed = json.loads(uvm("template", "ls", "--json").stdout)
        assert [(row["name"], sorted(row["users"])) for row in listed if row["name"] == "warm"] == [
            ("warm", ["VM cli-1", "VM cli-2"])
        ]
        busy = uvm("template", "rm", "warm")
        assert (busy.returncode, "VM cli-1" in busy.stderr) == (4, True)
        assert uvm("template", "save", "cli-1", "warm").returncode == 4
        assert uvm("template", "save", "cli-1", "cli").returncode == 0
        assert uvm("ls", "cli-1").returncode == 3
        shown = json.loads(uvm("template", "show", "cli", "--json").stdout)
        assert (shown["parent"], shown["vm"], len(shown["disks"])) == ("warm", "cli-1", 4)
        assert uvm("template", "verify", "cli").returncode == 0
        Path(shown["folder"], "memory").touch()
        assert uvm("clone", "cli", "no").returncode == 8
        assert uvm("template", "rm", "cli").returncode == 0
        assert uvm("template", "show", "cli").returncode == 3
        assert uvm("clone", "warm", "no", "--replace", "0:1").returncode == 2
        assert uvm("clone", "warm", "no", "--replace", f"0:1={warm.more}").returncode == 2
    finally:
        uvm("stop", "cli-1")
        uvm("stop", "cli-2")
    assert left_of("cli-2") == []
