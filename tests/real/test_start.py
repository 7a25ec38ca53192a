"""A start that fails leaves nothing: no process, record, folder or lock."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from owners import until_no_process_of
from utilityvm import DeadlineExceeded, InvalidRequest, SetupError, StartFailed, UtilityVM, VMConfig, VMNotFound
from utilityvm.guestimage.build import GuestImage
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.hosts.qemu import QemuHost, confinement, console
from utilityvm.hosts.qemu.qmp import Qmp
from utilityvm.machine import paths as places
from utilityvm.store import Store
from utilityvm.store.ownership import Ownership

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def nothing_is_left(own_folders: Path) -> object:
    yield
    assert not places.vm_dir("failing").exists()
    with Store.open() as store:
        assert store.find("failing") is None


@pytest.mark.parametrize(
    "settings",
    [{"memory_mib": 1}, {"cpus": 0}, {"controllers": 5}, {"controllers": 0}, {"name": "../x"}, {"name": ""}],
    ids=str,
)
async def test_what_cannot_be_is_refused_before_anything_is_made(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        await UtilityVM.start(VMConfig(**{"name": "failing", **settings}))  # type: ignore[arg-type]


async def test_no_qemu(guest_image: GuestImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UTILITYVM_QEMU", "/nonexistent/qemu")
    with pytest.raises(SetupError, match="UTILITYVM_QEMU"):
        await UtilityVM.start(VMConfig(name="failing"), image=guest_image)


async def test_no_guest_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UTILITYVM_CACHE_DIR", str(tmp_path))
    with pytest.raises(SetupError, match="no guest image") as caught:
        await UtilityVM.start(VMConfig(name="failing"))
    assert caught.value.remedy == "build it: uvm image build"


async def test_a_guest_that_cannot_boot_says_so_with_its_console(guest_image: GuestImage, tmp_path: Path) -> None:
    empty = tmp_path / "initramfs"
    empty.touch()
    with pytest.raises(StartFailed, match=r"failing ended \d.* Kernel panic") as caught:
        await UtilityVM.start(VMConfig(name="failing"), image=dataclasses.replace(guest_image, initramfs=empty))
    assert caught.value.console


async def test_an_agent_that_does_not_answer_is_given_up_in_time(guest_image: GuestImage) -> None:
    with pytest.raises(StartFailed, match=r"did not come up within 0\.05 s"):
        await UtilityVM.start(VMConfig(name="failing"), image=guest_image, timeout_s=0.05)


async def test_a_file_of_the_image_that_is_missing(guest_image: GuestImage, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="none"):
        await UtilityVM.start(VMConfig(name="failing"), image=dataclasses.replace(guest_image, root=tmp_path / "none"))


async def test_a_folder_that_a_killed_starter_left_goes_and_one_that_is_owned_stays() -> None:
    folder = places.vm_dir("failing")
    ownership = await Ownership.acquire(folder, vm="failing")
    with pytest.raises(VMNotFound):
        await UtilityVM.remove("failing")
    assert folder.exists()
    ownership.release()
    with pytest.raises(VMNotFound):
        await UtilityVM.remove("failing")
    assert not folder.exists()
    for name in ("..", "a/b", ""):
        with pytest.raises(VMNotFound):
            await UtilityVM.remove(name)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Store, "add"),
        (console, "start_writer"),
        (confinement, "spawn"),
        (Qmp, "connect"),
        (QemuHost, "status"),
        (Store, "set_process"),
        (BridgeGuest, "connect"),
        (Store, "set_state"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_whatever_fails_in_a_start_nothing_is_left_and_the_error_is_told(
    owner: object, name: str, guest_image: GuestImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DeadlineExceeded("the test broke it")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises((DeadlineExceeded, StartFailed), match="the test broke it"):
        await UtilityVM.start(VMConfig(name="failing"), image=guest_image)
    await until_no_process_of("failing")


async def test_the_guest_runs_only_when_its_process_is_written_down(
    guest_image: GuestImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then QEMU is known by its command line, which a QEMU that its guest took over could change."""
    written: list[object] = []

    async def watched(host: QemuHost, *, timeout_s: float = 5.0) -> None:
        assert await host.status() == "prelaunch"
        with Store.open() as store:
            written.append((store.get("failing").process or {}).get("pid"))
        raise SetupError("far enough")

    monkeypatch.setattr(QemuHost, "resume", watched)
    with pytest.raises(SetupError, match="far enough"):
        await UtilityVM.start(VMConfig(name="failing"), image=guest_image)
    (pid,) = written
    assert isinstance(pid, int)
    await until_no_process_of("failing")
