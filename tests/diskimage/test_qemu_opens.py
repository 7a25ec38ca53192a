"""What a real QEMU opens when it is given an image: the file itself, and no other."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from unused_disk import open_unused
from utilityvm.diskimage import headers
from utilityvm.scsi.ports import DiskFormat

if TYPE_CHECKING:
    from tests.diskimage.conftest import Bytes, Maker, Reader


class Qemu:
    """A QEMU without a machine, spoken to over its standard input and output."""

    def __init__(self, program: str, *words: str, pass_fds: tuple[int, ...] = ()) -> None:
        self._process = subprocess.Popen(
            [program, "-machine", "none", "-display", "none", "-nodefaults", "-S", "-qmp", "stdio", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=pass_fds,
        )
        self._receive()
        self.ask("qmp_capabilities")

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "QEMU ended"
        answer: dict[str, Any] = json.loads(line)
        return answer if "event" not in answer else self._receive()

    def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        words = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._process.stdin.write(json.dumps({"execute": command, "arguments": words}) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def open(self, path: Path, driver: str, **options: object) -> dict[str, Any]:
        file = {"driver": "file", "node-name": "own-file", "filename": os.fspath(path), "read-only": True}
        return self.ask("blockdev-add", driver=driver, node_name="own", read_only=True, file=file, **options)

    def nodes(self) -> list[str]:
        return sorted(node["node-name"] for node in self.ask("query-named-block-nodes")["return"])

    def open_files(self, folder: Path) -> set[str]:
        """The files of `folder` that the process has open."""
        found: set[str] = set()
        for link in Path(f"/proc/{self._process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.add(os.fspath(link.readlink()))
        return {name for name in found if name.startswith(f"{folder}/")}

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[..., Qemu]]:
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("QEMU is missing; install qemu-system-x86")
        pytest.skip("QEMU is missing")
    with contextlib.ExitStack() as undo:

        def start_one(*words: str, **more: Any) -> Qemu:
            qemu = Qemu(program, *words, **more)
            undo.callback(qemu.close)
            return qemu

        yield start_one


def told(header: headers.ImageHeader) -> dict[str, Any]:
    return headers.driver_options(header)


@pytest.mark.parametrize("seed", ["qcow2", "qcow2-v2", "vpc-dynamic", "vpc-fixed", "vhdx", "vmdk", "vmdk-stream"])
def test_an_allowed_image_is_the_only_file_that_qemu_opens(
    maker: Maker, read: Reader, seeds: dict[str, Bytes], start: Callable[..., Qemu], seed: str
) -> None:
    path = seeds[seed].save(maker.path())
    format = DiskFormat(seed.split("-")[0])
    header = read(path, format)
    headers.check_safe(header, read_only=True)
    qemu = start()

    assert qemu.open(path, **told(header)) == {"return": {}}

    assert qemu.nodes() == ["own", "own-file"]
    assert qemu.open_files(maker.folder) == {os.fspath(path)}
    node = qemu.ask("query-named-block-nodes")["return"][0]
    assert node["image"]["virtual-size"] == header.virtual_size_bytes


def test_a_backing_file_stays_closed_with_the_driver_options(
    maker: Maker, read: Reader, start: Callable[..., Qemu]
) -> None:
    base = maker.create("qcow2", "1M")
    path = maker.create("qcow2", "1M", backing=base)
    qemu = start()
    qemu.open(path, "qcow2")
    assert qemu.open_files(maker.folder) == {os.fspath(path), os.fspath(base)}  # what the options are for
    qemu.ask("blockdev-del", node_name="own")

    qemu.open(path, **told(read(path)))

    assert qemu.open_files(maker.folder) == {os.fspath(path)}


def test_a_vmdk_with_a_capacity_of_0_shows_as_a_node_without_our_name(
    maker: Maker, seeds: dict[str, Bytes], start: Callable[..., Qemu]
) -> None:
    """How a host can tell that an image was swapped between our look and QEMU's."""
    secret = maker.path("secret")
    secret.write_bytes(b"secret".ljust(8192))
    text = f'createType="monolithicFlat"\nCID=1\nparentCID=ffffffff\nRW 16 FLAT "{secret}" 0\n'.encode()
    image = seeds["vmdk"].copy().put(12, "<Q", 0).write(512, text.ljust(10240, b"\0"))
    qemu = start()
    qemu.open(image.save(maker.path("vmdk")), "vmdk", backing=None)
    assert os.fspath(secret) in qemu.open_files(maker.folder)
    assert [name for name in qemu.nodes() if name.startswith("#")]


def test_qemu_takes_no_option_for_the_size_of_a_vhd(maker: Maker, start: Callable[..., Qemu]) -> None:
    answer = start().open(maker.create("vpc", "1M"), "vpc", force_size_calc="current_size")
    assert "unexpected" in answer["error"]["desc"]


@pytest.mark.parametrize(("format", "is_blocked"), [("qcow2", False), ("vpc", True), ("vhdx", True), ("vmdk", True)])
def test_some_formats_block_a_migration_so_templates_are_not_saved_by_one(
    maker: Maker, start: Callable[..., Qemu], format: str, is_blocked: bool
) -> None:
    qemu = start()
    qemu.open(maker.create(format, "1M"), format)
    said = qemu.ask("migrate", uri="fd:none")["error"]["desc"]
    assert ("does not support live migration" in said) is is_blocked


def test_the_exclusive_claim_of_a_device_lives_on_in_qemu(start: Callable[..., Qemu], tmp_path: Path) -> None:
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        pytest.skip("loop devices need root and /dev/loop-control")
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    device = subprocess.check_output(["losetup", "--find", "--show", path], text=True).strip()
    try:
        fd = open_unused(device, read_only=False)
        qemu = start("-add-fd", f"fd={fd},set=1", pass_fds=(fd,))
        os.close(fd)
        try:
            added = qemu.ask("blockdev-add", driver="host_device", node_name="own", filename="/dev/fdset/1")
            assert added == {"return": {}}
            with pytest.raises(OSError, match="busy"):
                os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
        finally:
            qemu.close()
        os.close(open_unused(device, read_only=False))
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
