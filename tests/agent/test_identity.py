from __future__ import annotations

import os
import random
import uuid
from pathlib import Path
from typing import Any

import pytest

from guest_end import FakeKernel, FakeSystem
from utilityvm.agent.faults import Fault
from utilityvm.agent.identity import BOOT_ID, Given, Identity

GIVEN = Given(seed=b"s" * 32, hostname="clone-1", machine_id="0123456789abcdef" * 2, clock_ns=1_800_000_000 * 10**9)
OTHER = Given(seed=b"t" * 64, hostname="c2", machine_id="f" * 32, clock_ns=1_900_000_000 * 10**9)


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    return FakeSystem(tmp_path)


@pytest.fixture
def kernel(system: FakeSystem) -> FakeKernel:
    return system.kernel


@pytest.fixture
def identity(system: FakeSystem) -> Identity:
    return Identity(system.kernel, root=str(system.root))


def files(kernel: FakeKernel) -> dict[str, str]:
    return {path: kernel.read(path) for path in ("/etc/hostname", "/etc/hosts", "/etc/machine-id", BOOT_ID)}


def test_to_prepare_changes_nothing_that_a_program_reads(identity: Identity, kernel: FakeKernel) -> None:
    before = files(kernel)
    identity.prepare()
    identity.prepare()
    assert files(kernel) == before
    assert kernel.hostname == "template"


@pytest.mark.parametrize("is_prepared", [True, False])
def test_a_clone_has_a_name_and_ids_of_its_own(identity: Identity, kernel: FakeKernel, is_prepared: bool) -> None:
    if is_prepared:
        identity.prepare()
    boot_id = identity.become(GIVEN)
    assert kernel.hostname == "clone-1"
    assert files(kernel) == {
        "/etc/hostname": "clone-1\n",
        "/etc/hosts": "127.0.0.1 localhost clone-1\n::1 localhost\n",
        "/etc/machine-id": f"{GIVEN.machine_id}\n",
        BOOT_ID: f"{boot_id}\n",
    }
    assert uuid.UUID(boot_id).version == 4


def test_a_clone_of_a_clone_is_another(identity: Identity, kernel: FakeKernel) -> None:
    first = identity.become(GIVEN)
    identity.prepare()
    second = identity.become(OTHER)
    assert first != second
    assert files(kernel) == {
        "/etc/hostname": "c2\n",
        "/etc/hosts": "127.0.0.1 localhost c2\n::1 localhost\n",
        "/etc/machine-id": f"{OTHER.machine_id}\n",
        BOOT_ID: f"{second}\n",
    }


def test_only_whole_names_are_replaced_in_hosts(identity: Identity, kernel: FakeKernel, system: FakeSystem) -> None:
    (system.root / "etc/hosts").write_text("1.2.3.4 template template.net a-template\n5.6.7.8\ttemplate")
    identity.become(GIVEN)
    assert kernel.read("/etc/hosts") == "1.2.3.4 clone-1 template.net a-template\n5.6.7.8\tclone-1"


def test_a_template_called_localhost_leaves_hosts_alone(
    identity: Identity, kernel: FakeKernel, system: FakeSystem
) -> None:
    (system.root / "etc/hostname").write_text("localhost\n")
    hosts = kernel.read("/etc/hosts")
    identity.become(GIVEN)
    assert kernel.read("/etc/hosts") == hosts


def test_files_that_are_missing_are_made(identity: Identity, kernel: FakeKernel, system: FakeSystem) -> None:
    (system.root / "etc/hostname").unlink()
    (system.root / "etc/machine-id").unlink()
    identity.become(GIVEN)
    assert kernel.read("/etc/hostname") == "clone-1\n"
    assert kernel.read("/etc/machine-id") == f"{GIVEN.machine_id}\n"


def test_other_copies_of_the_machine_id_follow(identity: Identity, kernel: FakeKernel, system: FakeSystem) -> None:
    dbus = system.root / "var/lib/dbus/machine-id"
    dbus.parent.mkdir(parents=True)
    dbus.write_text("0" * 32)
    identity.become(GIVEN)
    assert kernel.read("/var/lib/dbus/machine-id") == f"{GIVEN.machine_id}\n"


def test_what_cannot_be_written_is_covered_by_a_file_of_ours(
    identity: Identity, kernel: FakeKernel, system: FakeSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a root that is mounted read-only."""
    real = os.open

    def open_read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if str(path).startswith(f"{system.root}/etc/") and flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(30, os.strerror(30), path)
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", open_read_only)
    identity.become(GIVEN)
    identity.prepare()
    identity.become(OTHER)
    assert kernel.read("/etc/hosts") == "127.0.0.1 localhost c2\n::1 localhost\n"
    assert kernel.read("/etc/machine-id") == f"{OTHER.machine_id}\n"
    assert (system.root / "etc/machine-id").read_text() == ""


def test_what_can_be_neither_written_nor_covered_is_named(identity: Identity, kernel: FakeKernel) -> None:
    kernel.refuses.add("bind")
    with pytest.raises(Fault, match=f"cannot write {BOOT_ID}: Operation not permitted"):
        identity.prepare()
    kernel.refuses.clear()
    identity.prepare()


def test_the_kernel_and_pythons_own_numbers_are_seeded_and_the_clock_is_set(
    identity: Identity, kernel: FakeKernel
) -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    identity.draw_anew(GIVEN)
    assert (kernel.seeds, kernel.clock_ns) == ([GIVEN.seed], GIVEN.clock_ns)
    assert random.random() != expected


@pytest.mark.parametrize(
    ("name", "said"),
    [("seed", "cannot seed the random numbers"), ("set_clock", "cannot set the clock"), ("set_hostname", "hostname")],
)
def test_a_kernel_that_refuses_is_told(identity: Identity, kernel: FakeKernel, name: str, said: str) -> None:
    kernel.refuses.add(name)

    def make_unique() -> None:
        identity.draw_anew(GIVEN)
        identity.become(GIVEN)

    with pytest.raises(Fault, match=said):
        make_unique()


BODY: dict[str, Any] = {"Seed": "ab" * 32, "Hostname": "a", "MachineId": "0f" * 16, "ClockNs": 1}


def test_what_is_given_comes_as_json() -> None:
    assert Given.of(BODY) == Given(bytes.fromhex("ab" * 32), "a", "0f" * 16, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"Seed": None}, {"Seed": "ab" * 31}, {"Seed": "ab" * 513}, {"Seed": "xy" * 32}, {"Hostname": ""},
        {"Hostname": 3}, {"Hostname": "a\nb"}, {"Hostname": "a b"}, {"MachineId": "0f"}, {"MachineId": 7},
        {"ClockNs": "1"}, {"ClockNs": None},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Fault, match="a clone needs") as caught:
        Given.of({**BODY, **wrong})
    assert caught.value.kind == "invalid"


def test_a_part_that_is_missing_is_refused() -> None:
    for name in BODY:
        with pytest.raises(Fault, match="a clone needs"):
            Given.of({key: value for key, value in BODY.items() if key != name})
