"""The end of the VM: everything is unmounted, and what is not clean is told."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fake_mounts import FakeMounts
from utilityvm.agent import power


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMounts:
    """Two disks are mounted."""
    kernel = FakeMounts(tmp_path).install(monkeypatch)
    monkeypatch.setattr(power, "_PASSING_S", 0.05)
    monkeypatch.setattr(power, "end_programs", lambda: kernel.asked.append("end programs"))
    monkeypatch.setattr(power, "now", lambda: kernel.asked.append("off"))
    monkeypatch.setattr("os.sync", lambda: kernel.asked.append("sync"))
    for letter, number in (("b", 16), ("c", 32)):
        kernel.device(f"/dev/sd{letter}", (8, number))
        kernel.add(f"/{letter}", "ext4", f"/dev/sd{letter}")
    return kernel


def soon() -> float:
    return time.monotonic() + 20


def left(kernel: FakeMounts) -> list[str]:
    return [one.path for one in kernel.mounts]


def test_everything_but_the_systems_own_is_unmounted(kernel: FakeMounts) -> None:
    kernel.add("/b/inner", "tmpfs", "x")
    kernel.add("/bound", "ext4", "/dev/sdb")
    kernel.add("/over", "overlay", "over", options="lowerdir=/b/l")
    assert power.prepare(soon()) == []
    assert left(kernel) == ["/", "/proc", "/run"]
    assert (kernel.asked[0], kernel.asked[-1]) == ("end programs", "sync")
    assert not {"umount /", "umount /proc", "umount /run"} & set(kernel.asked)


def test_the_last_mounted_goes_first(kernel: FakeMounts) -> None:
    power.prepare(soon())
    unmounted = [asked for asked in kernel.asked if asked.startswith("umount")]
    assert unmounted == ["umount /c", "umount /b"]


def test_one_that_lets_another_go_is_waited_for(kernel: FakeMounts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop device, say, or a namespace that is just ending."""
    monkeypatch.setattr(power, "_PASSING_S", 20)
    kernel.busy["/b"] = 3
    assert power.prepare(soon()) == []
    assert "/b" not in left(kernel)


def test_swap_is_given_back_first(kernel: FakeMounts) -> None:
    (kernel.proc / "swaps").write_text(
        "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/b/my\\040swap        file\t\t8\t\t0\t\t-2\n"
    )
    power.prepare(soon())
    assert kernel.asked[1] == "swapoff /b/my swap"


def test_a_file_system_is_made_read_only_before_its_last_mount_goes(
    kernel: FakeMounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What keeps it alive without a mount, such as an overlay by relative names, then keeps a clean one."""
    monkeypatch.setattr(power, "_PASSING_S", 20)
    kernel.add("/over", "overlay", "over", options="lowerdir=l")
    kernel.pinned["/dev/sdb"] = "/over"
    kernel.busy["/over"] = 2
    assert power.prepare(soon()) == []
    assert "/dev/sdb" in kernel.read_only
    assert kernel.asked.index("remount /b") < kernel.asked.index("umount /b")


def test_the_other_mounts_of_a_file_system_do_not_make_it_read_only(kernel: FakeMounts) -> None:
    kernel.add("/bound", "ext4", "/dev/sdb")
    power.prepare(soon())
    assert "remount /bound" not in kernel.asked


def test_what_cannot_be_unmounted_is_made_read_only_and_clean(kernel: FakeMounts) -> None:
    kernel.busy["/b"] = -1
    assert power.prepare(soon()) == []
    assert "/b" in left(kernel)
    assert "/dev/sdb" in kernel.read_only


def test_what_is_still_written_to_is_told_with_its_user(kernel: FakeMounts, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.busy["/b"] = -1
    kernel.written.add("/b")
    monkeypatch.setattr(power.holders, "of_mount", lambda path: [f"swap in {path}/swap"])  # type: ignore[attr-defined]
    assert power.prepare(soon()) == ["the file system that was mounted at /b is not clean: swap in /b/swap"]
    assert "/c" not in left(kernel)


def test_what_lives_on_without_a_mount_is_told(kernel: FakeMounts) -> None:
    kernel.pinned["/dev/sdc"] = ""
    (told,) = power.prepare(soon())
    assert told.startswith("the file system that was mounted at /c is not clean: it is held by something that has no")


def test_it_ends_in_time_though_things_move_for_ever(kernel: FakeMounts, monkeypatch: pytest.MonkeyPatch) -> None:
    def umount2(target: bytes, flags: int) -> int:
        return 0  # and it is there again

    monkeypatch.setattr(kernel, "umount2", umount2)
    power.prepare(time.monotonic() + 0.2)


def test_the_power_goes_off_whatever_happens(kernel: FakeMounts, monkeypatch: pytest.MonkeyPatch) -> None:
    power.off()
    assert kernel.asked[-1] == "off"

    def fail(deadline: float) -> list[str]:
        raise OSError("no")

    monkeypatch.setattr(power, "unmount_disks", fail)
    with pytest.raises(OSError, match="no"):
        power.off()
    assert kernel.asked[-1] == "off"


def test_a_device_that_is_let_go_lets_its_mount_go(kernel: FakeMounts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a loop device on a file of it."""
    kernel.busy["/b"] = -1
    monkeypatch.setattr(power, "_PASSING_S", 20)
    monkeypatch.setattr(power, "_let_go_of_devices", lambda: kernel.busy.pop("/b", None))
    assert power.prepare(soon()) == []
    assert "/b" not in left(kernel)


def test_a_round_says_whether_anything_was_unmounted(kernel: FakeMounts) -> None:
    """As long as anything is, the others are waited for: they may be held by what goes next."""
    kernel.busy["/b"], kernel.busy["/c"] = -1, 1
    assert [power._unmount_once() for _ in range(3)] == [False, True, False]
    assert left(kernel) == ["/", "/proc", "/run", "/b"]
