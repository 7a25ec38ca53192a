"""The trial, on the real thing: TCG runs everywhere, and what does not run says why."""

from __future__ import annotations

from utilityvm.hosts.qemu import accelerator, emulator


async def test_tcg_runs_the_trial_program() -> None:
    assert await accelerator.attempt(await emulator.find(), "tcg", timeout_s=20) is None


async def test_an_accelerator_that_this_qemu_lacks_says_so() -> None:
    why = await accelerator.attempt(await emulator.find(), "hvf", timeout_s=20)
    assert why is not None
    assert "hvf" in why


async def test_the_machine_is_the_newest_q35_by_its_own_name() -> None:
    assert (await emulator.find()).machine.startswith("pc-q35-")


async def test_what_is_chosen_runs() -> None:
    program = await emulator.find()
    chosen = await accelerator.choose(program)
    assert await accelerator.attempt(program, chosen.name, timeout_s=20) is None
