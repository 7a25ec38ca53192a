"""How the accelerator is chosen, with stand-ins for QEMU that fail as QEMU was seen to fail."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from utilityvm.errors import SetupError
from utilityvm.hosts.qemu import accelerator
from utilityvm.hosts.qemu.emulator import Emulator

T = 20.0
RAN = "exit 33"
MSR = """\
echo 'qemu: warning: host does not support pni' >&2
echo 'qemu: error: failed to set MSR 0x10a to 0x69' >&2
echo 'qemu: kvm.c:3183: kvm_buf_set_msrs: Assertion failed.' >&2
kill -ABRT $$"""
HANGS = "exec sleep 1000"

Install = Callable[..., Emulator]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Generator[Install]:
    """A program that does one thing under kvm and another under tcg, and writes down that it was started."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        base.chmod(0o755)  # it is started as another user
        starts = base / "starts"
        starts.touch()
        starts.chmod(0o666)
        monkeypatch.setenv("UTILITYVM_CACHE_DIR", str(base / "cache"))
        monkeypatch.delenv("UTILITYVM_ACCEL", raising=False)

        def make(*, kvm: str = MSR, tcg: str = RAN) -> Emulator:
            path = base / "qemu"
            path.write_text(
                f'#!/bin/sh\necho started >> {starts}\ncase "$*" in *"-accel kvm"*)\n{kvm};;\n*)\n{tcg};;\nesac\n'
            )
            path.chmod(0o755)
            return Emulator(path, "7.2.22", "pc-q35-7.2")

        yield make


def starts(emulator: Emulator) -> int:
    return len((emulator.path.parent / "starts").read_text().splitlines())


async def test_a_trial_that_runs_is_no_reason_against_it(install: Install) -> None:
    assert await accelerator.attempt(install(kvm=RAN), "kvm", timeout_s=T) is None


async def test_the_reason_is_qemus_own_and_no_warning(install: Install) -> None:
    why = await accelerator.attempt(install(), "kvm", timeout_s=T)
    assert why == "error: failed to set MSR 0x10a to 0x69 (killed by signal 6)"


async def test_a_guest_that_never_runs_is_not_waited_for(install: Install) -> None:
    why = await accelerator.attempt(install(kvm=HANGS), "kvm", timeout_s=0.2)
    assert why == "nothing ran within 0.2 s"


async def test_a_qemu_that_ends_well_has_not_run_the_program(install: Install) -> None:
    assert await accelerator.attempt(install(kvm="exit 0"), "kvm", timeout_s=T)


async def test_the_verdict_is_remembered_with_its_reason(install: Install) -> None:
    emulator = install()
    first = await accelerator.choose(emulator)
    assert first.name == "tcg"
    assert "kvm: " in first.reason
    before = starts(emulator)
    assert await accelerator.choose(emulator) == first
    assert starts(emulator) == before


async def test_another_boot_is_another_verdict(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = install()
    await accelerator.choose(emulator)
    before = starts(emulator)
    monkeypatch.setattr("utilityvm.hosts.qemu.emulator.boot_id", lambda: "the next one")
    await accelerator.choose(emulator)
    assert starts(emulator) > before


async def test_who_asks_for_one_gets_it_without_a_trial(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = install()
    monkeypatch.setenv("UTILITYVM_ACCEL", "kvm")
    assert (await accelerator.choose(emulator)).name == "kvm"
    assert (await accelerator.choose(emulator, wanted="tcg")).name == "tcg"
    assert starts(emulator) == 0


@pytest.mark.parametrize("name", ["KVM", "xen", " "])
async def test_a_name_that_is_none_is_refused(install: Install, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("UTILITYVM_ACCEL", name)
    with pytest.raises(SetupError, match="UTILITYVM_ACCEL asks for accelerator"):
        await accelerator.choose(install())


async def test_nothing_works(install: Install) -> None:
    with pytest.raises(SetupError, match="no accelerator works: kvm: ") as caught:
        await accelerator.choose(install(tcg="echo qemu: broken >&2; exit 1"))
    assert "tcg: " in str(caught.value)
