"""The parts of init that can be tried beside another system. `tests/real/test_agent.py` has it as process 1."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utilityvm.agent import init, processes


@pytest.mark.parametrize(
    ("cmdline", "controllers"),
    [
        ("quiet utilityvm.scsi=a,b root=/dev/x\n", ["a", "b"]),
        ("utilityvm.scsi=a utilityvm.scsi=b", ["a", "b"]),
        ("xutilityvm.scsi=a utilityvm.scsi", []),
        ("", []),
    ],
)
def test_the_controllers_are_those_of_the_command_line(tmp_path: Path, cmdline: str, controllers: list[str]) -> None:
    (tmp_path / "cmdline").write_text(cmdline)
    assert init._controllers(str(tmp_path / "cmdline")) == controllers


def test_orphans_are_reaped_until_the_agent_ends(capfd: pytest.CaptureFixture[str]) -> None:
    """In a child, for it reaps whatever there is."""
    script = """
import os
from utilityvm.agent import init
def child(code):
    pid = os.fork()
    if not pid:
        os._exit(code)
    return pid
orphan = child(1)
os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT)
init._reap_until_end_of(child(7))
try:
    os.wait()
except ChildProcessError:
    print("all reaped", flush=True)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    captured = capfd.readouterr()
    assert captured.out == "all reaped\n"
    assert captured.err == "utilityvm: the agent ended with 7 and is started again\n"


def test_an_agent_that_fails_says_so_and_cannot_be_ended_by_lack_of_memory(capfd: pytest.CaptureFixture[str]) -> None:
    script = """
import io, os, signal
from utilityvm.agent import init
class File(io.StringIO):
    def __exit__(self, *error):
        print(self.getvalue(), flush=True)
init.open = lambda path, mode: {"/proc/self/oom_score_adj": File()}[path]
def fail():
    print(os.getsid(0) == os.getpid(), flush=True)
    print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True)
    raise OSError("no port")
init._serve = fail
signal.signal(signal.SIGTERM, lambda *_: None)
pid = init._start_agent()
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    captured = capfd.readouterr()
    assert captured.out.split() == ["-1000", "True", "True", "1"]
    assert captured.err == "utilityvm: the agent failed: OSError: no port\n"


def test_every_mount_of_the_system_is_made_with_its_folder_unless_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[object, ...]] = []

    class Libc:
        refuses = 0

        def mount(self, *args: object) -> int:
            asked.append(args)
            ctypes.set_errno(22)
            return self.refuses

    monkeypatch.setattr(init, "_libc", Libc())
    target = tmp_path / "a/b"
    init._mount("tmpfs", str(target), "tmpfs", 6, "mode=0755")
    assert target.is_dir()
    assert asked == [(b"tmpfs", str(target).encode(), b"tmpfs", 6, b"mode=0755")]
    init._mount("none", "/", None, 0x104000, "")
    assert asked[-1] == (b"none", b"/", None, 0x104000, b"")
    assert capsys.readouterr().err == ""
    Libc.refuses = -1
    init._mount("tmpfs", str(target), "tmpfs", 6, "")
    assert f"cannot mount {target}: Invalid argument" in capsys.readouterr().err
    (tmp_path / "file").touch()
    init._mount("tmpfs", str(tmp_path / "file/c"), "tmpfs", 6, "")
    assert "cannot make" in capsys.readouterr().err


def test_the_agent_may_open_more_files_and_its_programs_as_many_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"now": (1024, 4096)}
    monkeypatch.setattr(processes, "_program_files", None)
    monkeypatch.setattr(resource, "getrlimit", lambda _what: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _what, wanted: limits.update(now=wanted))
    processes.raise_file_limit()
    assert limits["now"] == (16384, 16384)
    assert processes._program_files == (1024, 4096)
    endless = resource.RLIM_INFINITY
    for before, after in (((100_000, 200_000), (100_000, 200_000)), ((5, endless), (16384, endless))):
        limits["now"] = before
        processes.raise_file_limit()
        assert limits["now"] == after
        assert processes._program_files == before


def test_an_agent_that_may_not_open_more_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(processes, "_program_files", None)
    monkeypatch.setattr(resource, "setrlimit", refuse)
    processes.raise_file_limit()
    assert processes._program_files is None
    processes.prepare_program()


def test_loopback_is_raised_by_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bytes]] = []

    def ioctl(_fd: object, number: int, request: bytes) -> bytes:
        asked.append((number, request))
        return b"lo".ljust(16, b"\0") + (0x48).to_bytes(2, "little") + bytes(14)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    init._raise_loopback()
    name = b"lo".ljust(16, b"\0")
    assert asked == [(0x8913, name + bytes(16)), (0x8914, name + (0x49).to_bytes(2, "little") + bytes(14))]


def test_what_the_kernel_says_of_a_mount_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init._mount("none", str(tmp_path), "nosuchfs", 0, "")
    told = capsys.readouterr().err
    assert "No such device" in told or "Operation not permitted" in told


def test_an_agent_that_ends_is_started_again_after_what_it_had_started_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And so often at the most that a guest in trouble can still be looked at."""
    did: list[object] = []

    class EndOfTest(Exception):
        pass

    def sleep(seconds: float) -> None:
        did.append("sleep")
        assert 0 < seconds <= init._RESTART_S
        if did.count("sleep") == 2:
            raise EndOfTest

    def start() -> int:
        did.append("start")
        return 77

    monkeypatch.setattr("os.getpid", lambda: 1)
    monkeypatch.setattr(init, "_prepare", lambda: did.append("prepare"))
    monkeypatch.setattr("signal.signal", lambda number, _: did.append(signal.Signals(number).name))
    monkeypatch.setattr(init, "_start_agent", start)
    monkeypatch.setattr(init, "_reap_until_end_of", did.append)
    monkeypatch.setattr(init.power, "end_programs", lambda: did.append("end programs"))  # type: ignore[attr-defined]
    monkeypatch.setattr("time.sleep", sleep)
    with pytest.raises(EndOfTest):
        init.main()
    once = ["start", 77, "end programs", "sleep"]
    assert did == ["prepare", "SIGTERM", "SIGINT", "SIGPWR", *once, *once]


def test_the_system_is_prepared_beside_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[object] = []
    monkeypatch.setattr("os.environ", {"LD_PRELOAD": "x"})
    monkeypatch.setattr("os.umask", lambda mask: did.append(mask))
    monkeypatch.setattr("os.chdir", lambda folder: did.append(folder))
    monkeypatch.setattr("os.path.ismount", lambda path: path in ("/proc", "/run"))
    monkeypatch.setattr("os.path.lexists", lambda path: path == "/dev/stdin")
    monkeypatch.setattr("os.symlink", lambda link, path: did.append((path, link)))
    monkeypatch.setattr("socket.sethostname", lambda name: did.append("name"))
    monkeypatch.setattr(init, "_mount", lambda source, target, *_: did.append(f"mount {target}"))
    monkeypatch.setattr(init, "_raise_loopback", lambda: did.append("loopback"))
    monkeypatch.setattr(init, "_end_thrashing_early", lambda: did.append("memory"))
    monkeypatch.setattr(init.power, "disable_reboot_key", lambda: did.append("key"))  # type: ignore[attr-defined]
    init._prepare()
    assert list(os.environ) == ["PATH"]
    mounted = [f"mount {path}" for path in ("/sys", "/dev", "/dev/pts", "/dev/shm", "/tmp", "/sys/fs/cgroup", "/")]
    links = [("/dev/fd", "/proc/self/fd"), ("/dev/stdout", "fd/1"), ("/dev/stderr", "fd/2")]
    assert did == [0o022, "/", *mounted, *links, "name", "loopback", "memory", "key"]
