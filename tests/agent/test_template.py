from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest

from guest_end import FakeSystem
from utilityvm.agent.faults import Fault
from utilityvm.agent.identity import BOOT_ID, Given
from utilityvm.agent.template import Template

GIVEN = Given(seed=b"s" * 32, hostname="clone-1", machine_id="0123456789abcdef" * 2, clock_ns=10**18)
BOTH = ["/data", "/data/inner"]


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    return FakeSystem(tmp_path)


@pytest.fixture
def template(system: FakeSystem) -> Template:
    return system.template


def soon() -> float:
    return time.monotonic() + 20


def quiesce(template: Template, *, hold_s: float = 20, programs: tuple[str, ...] = ()) -> list[str]:
    told: list[str] = template.quiesce(soon(), hold_s=hold_s, programs=lambda: programs)["Flushed"]
    return told


def is_open(template: Template) -> bool:
    """May something be changed?"""
    try:
        with template.changing():
            return True
    except Fault:
        return False


def said(system: FakeSystem) -> list[str]:
    """What the hooks of `telling` were told."""
    path = system.root / "said"
    return path.read_text().splitlines() if path.exists() else []


def telling(system: FakeSystem, name: str, *, fails_at: str = "none") -> None:
    """A hook that writes down what it is told, and fails at one word."""
    system.hook(name, f'echo "{name} $1" >> $ROOT/said; [ "$1" != {fails_at} ]')


# Freezing.


def test_a_frozen_vm_changes_nothing_until_it_is_thawed(system: FakeSystem, template: Template) -> None:
    quiesce(template)
    assert sorted(system.filesystems.frozen) == BOTH
    assert not is_open(template)
    template.thaw(soon())
    assert not system.filesystems.frozen
    assert is_open(template)


def test_to_freeze_or_to_thaw_twice_is_once(system: FakeSystem, template: Template) -> None:
    telling(system, "10-a")
    quiesce(template)
    quiesce(template)
    assert sorted(system.filesystems.frozen) == BOTH
    template.thaw(soon())
    template.thaw(soon())
    assert not system.filesystems.frozen
    assert said(system) == ["10-a save", "10-a thaw"]


def test_what_could_only_be_written_out_is_told(system: FakeSystem, template: Template) -> None:
    system.filesystems.cannot_freeze["/data/inner"] = errno.EOPNOTSUPP
    assert quiesce(template) == ["/data/inner"]


def test_a_change_under_way_is_waited_for(system: FakeSystem, template: Template) -> None:
    threads = [threading.Thread(target=quiesce, args=(template,))]
    with template.changing():
        threads[0].start()
        while is_open(template):
            pass  # until it has begun
        assert not system.filesystems.frozen
    threads[0].join()
    assert sorted(system.filesystems.frozen) == BOTH


def test_a_change_that_does_not_end_is_a_timeout_and_nothing_is_frozen(system: FakeSystem, template: Template) -> None:
    with template.changing():
        with pytest.raises(Fault, match="does not end") as caught:
            template.quiesce(time.monotonic() + 0.05, hold_s=20, programs=tuple)
        assert caught.value.kind == "timeout"
        assert is_open(template)
    assert not system.filesystems.frozen


def test_programs_of_the_host_are_not_cut_off(system: FakeSystem, template: Template) -> None:
    telling(system, "10-a")
    with pytest.raises(Fault) as caught:
        quiesce(template, programs=("process 1: sleep 5",))
    assert (caught.value.kind, caught.value.holders) == ("busy", ["process 1: sleep 5"])
    assert is_open(template)
    assert not said(system)


def test_a_hook_that_fails_is_named_and_those_told_before_hear_that_it_goes_on(
    system: FakeSystem, template: Template
) -> None:
    telling(system, "10-a")
    telling(system, "20-b", fails_at="save")
    telling(system, "30-c")
    with pytest.raises(Fault, match="20-b save ended with 1"):
        quiesce(template)
    assert said(system) == ["10-a save", "20-b save", "20-b thaw", "10-a thaw"]
    assert not system.filesystems.frozen
    assert is_open(template)


@pytest.mark.parametrize("broken", ["filesystem", "identity"])
def test_a_kernel_that_refuses_leaves_all_as_it_was(system: FakeSystem, template: Template, broken: str) -> None:
    telling(system, "10-a")
    if broken == "filesystem":
        system.filesystems.cannot_freeze["/data"] = errno.EIO
    else:
        system.kernel.refuses.add("bind")
    with pytest.raises(Fault):
        quiesce(template)
    assert said(system) == ["10-a save", "10-a thaw"]
    assert not system.filesystems.frozen
    assert is_open(template)


def test_a_hook_that_fails_at_the_thaw_is_told_when_all_goes_on(system: FakeSystem, template: Template) -> None:
    telling(system, "10-a")
    telling(system, "20-b", fails_at="thaw")
    quiesce(template)
    with pytest.raises(Fault, match="20-b thaw ended with 1"):
        template.thaw(soon())
    assert said(system)[2:] == ["20-b thaw", "10-a thaw"]
    assert not system.filesystems.frozen
    assert is_open(template)


def test_of_a_host_that_says_nothing_more_the_vm_is_freed(system: FakeSystem, template: Template) -> None:
    telling(system, "10-a")
    quiesce(template, hold_s=0.05)
    until = soon()
    while said(system)[-1:] != ["10-a thaw"]:
        assert time.monotonic() < until
    assert not system.filesystems.frozen
    assert is_open(template)


def test_a_host_that_asks_again_holds_it_anew(system: FakeSystem, template: Template) -> None:
    quiesce(template, hold_s=20)
    quiesce(template, hold_s=0.05)
    until = soon()
    while not is_open(template):
        assert time.monotonic() < until


# Clones.


def test_a_clone_is_thawed_and_made_itself(system: FakeSystem, template: Template) -> None:
    telling(system, "10-a")
    quiesce(template)
    answer = template.make_unique(GIVEN, soon())
    assert not system.filesystems.frozen
    assert is_open(template)
    assert system.kernel.hostname == "clone-1"
    assert system.kernel.read("/etc/machine-id") == f"{GIVEN.machine_id}\n"
    assert system.kernel.read(BOOT_ID) == f"{answer['BootId']}\n"
    assert said(system) == ["10-a save", "10-a clone"]


def test_nothing_of_the_templates_goes_on_before_the_clone_draws_anew(system: FakeSystem, template: Template) -> None:
    quiesce(template)
    system.kernel.refuses.add("set_clock")
    with pytest.raises(Fault, match="set the clock"):
        template.make_unique(GIVEN, soon())
    assert system.kernel.seeds == [GIVEN.seed]
    assert sorted(system.filesystems.frozen) == BOTH


@pytest.mark.parametrize("in_memory", [True, False])
def test_who_waits_for_a_clone_hears_of_it_before_the_thaw_if_its_files_need_no_disk(
    system: FakeSystem, template: Template, in_memory: bool
) -> None:
    system.kernel.in_memory = in_memory
    quiesce(template)
    frozen_when_told: list[list[str]] = []
    answer = template.make_unique(
        GIVEN, soon(), tell=lambda told: frozen_when_told.append([*told, *sorted(system.filesystems.frozen)])
    )
    assert frozen_when_told == ([["BootId", *BOTH]] if in_memory else [])
    assert system.kernel.read(BOOT_ID) == f"{answer['BootId']}\n"
    assert not system.filesystems.frozen
    assert is_open(template)


def test_a_clone_that_stays_frozen_says_so_until_it_is_thawed(system: FakeSystem, template: Template) -> None:
    quiesce(template)
    system.filesystems.cannot_thaw["/data/inner"] = errno.EIO
    with pytest.raises(Fault, match="/data/inner cannot be thawed"):
        template.make_unique(GIVEN, soon())
    with pytest.raises(Fault, match="not fit to be used: /data/inner cannot be thawed"), template.changing():
        pass
    system.filesystems.cannot_thaw.clear()
    template.thaw(soon())
    assert is_open(template)


def test_a_clone_that_could_not_be_made_itself_may_be_asked_again(system: FakeSystem, template: Template) -> None:
    quiesce(template)
    system.kernel.refuses.add("set_hostname")
    with pytest.raises(Fault, match="set the hostname"):
        template.make_unique(GIVEN, soon())
    system.kernel.refuses.clear()
    template.make_unique(GIVEN, soon())
    assert system.kernel.read("/etc/hostname") == "clone-1\n"
    assert is_open(template)


def test_a_vm_that_was_never_frozen_can_be_made_unique_too(system: FakeSystem, template: Template) -> None:
    first = template.make_unique(GIVEN, soon())
    assert template.make_unique(GIVEN, soon()) != first
    assert system.kernel.hostname == "clone-1"


def test_the_hooks_of_a_clone_know_its_name(system: FakeSystem, template: Template) -> None:
    assert not template.has_clone_hooks()
    system.hook("10-keys", 'echo "$1 $UTILITYVM_NAME $UTILITYVM_MACHINE_ID $(cat $ROOT/etc/hostname)" > $ROOT/said')
    assert template.has_clone_hooks()
    template.make_unique(GIVEN, soon())
    assert said(system) == [f"clone clone-1 {GIVEN.machine_id} clone-1"]


def test_a_clone_whose_hook_fails_is_refused(system: FakeSystem, template: Template) -> None:
    telling(system, "10-keys", fails_at="clone")
    quiesce(template)
    with pytest.raises(Fault, match="10-keys clone ended with 1"):
        template.make_unique(GIVEN, soon())


def test_the_template_of_a_clone_is_a_template(system: FakeSystem, template: Template) -> None:
    telling(system, "10-a")
    quiesce(template)
    template.make_unique(GIVEN, soon())
    quiesce(template)
    assert sorted(system.filesystems.frozen) == BOTH
    template.thaw(soon())
    assert said(system) == ["10-a save", "10-a clone", "10-a save", "10-a thaw"]


def test_an_agent_that_dies_while_frozen_is_started_again_into_a_vm_that_goes_on(
    system: FakeSystem, template: Template
) -> None:
    quiesce(template)
    assert is_open(system.new_template())
    assert not system.filesystems.frozen
