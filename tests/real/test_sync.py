"""The synchronous API on a real VM: disks, programs and files, from several threads."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from utilityvm.sync import AlreadyReleased, UtilityVM, VMConfig, VMNotRunning
from utilityvm.testing.images import ext4_image

pytestmark = pytest.mark.real


def test_a_vm_its_disks_and_programs_without_async(tmp_path: Path) -> None:
    first, second = (ext4_image(tmp_path / name, {"greeting": name}) for name in ("first.raw", "second.raw"))
    with UtilityVM.start(VMConfig(name="synchronous", memory_mib=128)) as vm:
        with vm.add_scsi(first, "/first") as mount:
            assert vm.run(["cat", "/first/greeting"], text=True).stdout == "first.raw"
            assert [one.id for one in vm.scsi_reservations()] == [mount.id]
            assert vm.scsi_reservations() != []
        with pytest.raises(AlreadyReleased):
            mount.release()

        events = vm.scsi_events()
        heard: list[str] = []
        listener = threading.Thread(target=lambda: heard.extend(event.what for event in events), daemon=True)
        listener.start()
        said: list[bytes] = []

        def work(path: Path) -> None:
            with vm.add_scsi(path, f"/{path.stem}"):
                said.append(vm.run(["cat", f"/{path.stem}/greeting"]).stdout)

        threads = [threading.Thread(target=work, args=(path,), daemon=True) for path in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(said) == [b"first.raw", b"second.raw"]

        pieces: list[bytes] = []
        assert not vm.run_streaming(["cat"], stdin=iter([b"a", b"b"]), stdout=pieces.append, stderr=pieces.append)
        assert b"".join(pieces) == b"ab"
        program = vm.start_program(["sh", "-c", "echo one; echo two"])
        assert list(program.stdout) == [b"one\n", b"two\n"]
        assert program.wait() == 0
    listener.join(60)
    assert not listener.is_alive()
    assert "attached" in heard
    with pytest.raises(VMNotRunning):
        vm.run(["true"])
