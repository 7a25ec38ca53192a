"""What a program behind QEMU's walls reaches: a probe in QEMU's place, under the real launcher, tries each thing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from utilityvm.errors import InvalidRequest, SetupError
from utilityvm.hosts.qemu import confinement, seccomp
from utilityvm.hosts.qemu.confinement import Jail, Layer, Mode
from utilityvm.hosts.qemu.emulator import Emulator
from utilityvm.hosts.qemu.privileges import Identity, launcher
from utilityvm.machine.programs import find_program

PYTHON = Path("/usr/bin/python3")  # Debian's: it is below /usr, as QEMU is
SETPRIV = find_program("setpriv", package="util-linux")
NOBODY, VMS = 65534, 70999

# Each line tries one thing; what raises OSError is refused.
TRIES = {
    "read a file of the system": "open('/etc/passwd').read()",
    "read a file of the user": "open(mine).read()",
    "write a file of the user": "open(mine, 'a')",
    "make a file in /tmp": "os.open('/tmp/made', os.O_CREAT | os.O_WRONLY) if os.path.isdir('/tmp') else refused()",
    "make a file in /dev/shm": "os.open('/dev/shm/made', os.O_CREAT | os.O_WRONLY)",
    "make a file in its root": "os.open('/made', os.O_CREAT | os.O_WRONLY)",
    "open its own descriptor again": "os.open(f'/proc/self/fd/{readonly}', os.O_RDWR)",
    "change the mode of a file": "os.fchmod(readonly, 0o666)",
    "look at other processes": "os.listdir('/proc')",
    "signal another process": "os.kill(owner, 0)",
    "signal itself by number": "os.kill(os.getpid(), 0)",
    "connect over TCP": "socket.create_connection(('127.0.0.1', port), timeout=2)",
    "send over UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "use IPv6": "socket.socket(socket.AF_INET6, socket.SOCK_STREAM)",
    "use vsock": "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "use netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "use raw packets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "reach an abstract socket": "socket.socket(socket.AF_UNIX).connect(chr(0) + abstract)",
    "trace": "call('ptrace', 0, 0, 0, 0)",
    "read other memory": "call('process_vm_readv', owner, 0, 0, 0, 0, 0)",
    "take a descriptor": "call('pidfd_open', owner, 0)",
    "io_uring": "call('io_uring_setup', 8, 0)",
    "userfaultfd": "call('userfaultfd', 0)",
    "bpf": "call('bpf', 0, 0, 0)",
    "perf": "call('perf_event_open', 0, 0, -1, -1, 0)",
    "keys": "call('keyctl', 0, -3, 0)",
    "a new user namespace": "call('unshare', 0x10000000)",
    "a new mount": "call('mount', 0, 0, 0, 0, 0)",
    "file handles": "call('open_by_handle_at', -1, 0, 0)",
    "shared memory": "call('shmget', 0, 4096, 0o1600)",
    "more files than a VM needs": "os.dup2(0, 9000)",
    "reach another VM's monitor": "socket.socket(socket.AF_UNIX).connect(monitor)",
    "take a descriptor of another": "call('pidfd_getfd', 0, 0, 0)",
    "write other memory": "call('process_vm_writev', owner, 0, 0, 0, 0, 0)",
    "a child in a new namespace": "call('clone', 0x10000000 | 17, 0, 0, 0, 0)",
    "clone3, whose flags no filter sees": "call('clone3', 0, 0)",
    "enter a namespace": "call('setns', -1, 0)",
    "another root folder": "call('chroot', 0)",
    "a device of its own": "os.mknod('/dev/made', 0o20600, os.makedev(1, 1))",
    "a kernel module": "call('finit_module', -1, 0, 0)",
    "ports of the machine": "call('iopl', 3)",
    "the clock": "call('settimeofday', 0, 0)",
    "a core file": "refused() if resource.getrlimit(resource.RLIMIT_CORE) == (0, 0) else None",
    "a right it had not": "os.setuid(0)",
}
# What a process of the same user does without walls: so these tries can succeed.
CAN_BE_DONE = (
    "read a file of the system", "read a file of the user", "write a file of the user", "open its own descriptor again",
    "look at other processes", "signal itself by number", "connect over TCP", "send over UDP", "use netlink",
    "reach an abstract socket", "reach another VM's monitor", "a new user namespace", "more files than a VM needs",
    "shared memory",
)  # fmt: skip
PROBE = """
import ctypes, json, os, resource, socket, sys
mine, readonly, owner, port, abstract, monitor, tries = json.loads(sys.argv[1])
library = ctypes.CDLL(None, use_errno=True)
numbers = {"ptrace": 101, "process_vm_readv": 310, "pidfd_open": 434, "io_uring_setup": 425, "userfaultfd": 323,
    "bpf": 321, "perf_event_open": 298, "keyctl": 250, "unshare": 272, "mount": 165, "open_by_handle_at": 304,
    "shmget": 29, "pidfd_getfd": 438, "process_vm_writev": 311, "clone": 56, "clone3": 435, "setns": 308, "chroot": 161,
    "finit_module": 313, "iopl": 172, "settimeofday": 164}

def refused():
    raise OSError("refused")

def call(name, *arguments):
    if library.syscall(numbers[name], *arguments) < 0:
        error = ctypes.get_errno()
        # Only a refusal counts: a wrong argument would be one in a kernel that let it through.
        if error in (1, 38):
            raise OSError(error, os.strerror(error))

told = {}
for name, code in tries.items():
    try:
        eval(code)
        told[name] = "done"
    except OSError as error:
        told[name] = f"refused: {error}"
told["user"] = os.getuid()
told["files"] = sorted(os.listdir("/"))
print(json.dumps(told))
"""


def jail_of(who: Identity) -> Jail:
    program = Emulator(PYTHON, "", "", is_named=True)
    return Jail(base=confinement.prepare(program, SETPRIV), who=who, setpriv=SETPRIV)


def probe(jail: Jail | None, folder: Path, *, as_user: int | None, tries: Mapping[str, str]) -> dict[str, object]:
    """What the probe could do, as started by us or by a plain user; without a jail nothing holds it."""
    mine, monitor = folder / "mine", folder / "monitor"
    mine.write_text("private")
    mine.chmod(0o666)
    abstract = f"utilityvm-test-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as listening,
        confinement._file_of(seccomp.program()) as filter_fd,
        mine.open() as readonly,
        Path(os.devnull).open("w") as null,
    ):
        for one, address in ((listener, "\0" + abstract), (listening, str(monitor))):
            one.bind(address)
            one.listen()
        monitor.chmod(0o666)
        port = server.getsockname()[1]
        facts = [str(mine), readonly.fileno(), os.getpid(), port, abstract, str(monitor), tries]
        words = [] if as_user is None else [str(SETPRIV), f"--reuid={as_user}", f"--regid={as_user}", "--clear-groups"]
        if jail is not None:
            words += jail.words(filter_fd=filter_fd, info_fd=null.fileno())
            words += launcher(SETPRIV, jail.who, dies_with_us=False, is_told=True)
        words += [str(PYTHON), "-I", "-S", "-c", PROBE, json.dumps(facts)]
        passed = (filter_fd, null.fileno(), readonly.fileno())
        done = subprocess.run(words, input=b"go\n", capture_output=True, pass_fds=passed, timeout=60, check=False)
    monitor.unlink()
    assert done.returncode == 0, done.stderr.decode()
    told: dict[str, object] = json.loads(done.stdout)
    return told


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """A folder that every user reaches."""
    with tempfile.TemporaryDirectory(prefix="uvm-probe-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module", params=["root", "plain user"])
def told(request: pytest.FixtureRequest, open_folder: Path) -> dict[str, object]:
    if os.uname().machine != "x86_64":
        pytest.skip("the probe has this processor's numbers of system calls")
    if request.param == "root":
        if os.geteuid() != 0:
            pytest.skip("needs root")
        return probe(jail_of(Identity(VMS)), open_folder, as_user=None, tries=TRIES)
    if os.geteuid() == 0:
        return probe(jail_of(Identity(NOBODY, drops=False)), open_folder, as_user=NOBODY, tries=TRIES)
    return probe(jail_of(Identity(os.geteuid(), drops=False)), open_folder, as_user=None, tries=TRIES)


def test_without_walls_the_probe_does_what_it_tries(open_folder: Path) -> None:
    """Else a refusal would prove nothing."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be a user without rights")
    tries = {name: TRIES[name] for name in CAN_BE_DONE}
    told = probe(None, open_folder, as_user=NOBODY, tries=tries)
    assert {name for name in CAN_BE_DONE if told[name] != "done"} <= {"a new user namespace"}  # some kernels allow none


@pytest.mark.parametrize("name", TRIES)
def test_what_it_does_not_need_is_refused(told: dict[str, object], name: str) -> None:
    assert str(told[name]).startswith("refused"), f"{name}: {told[name]}"


def test_it_has_only_its_own_files(told: dict[str, object]) -> None:
    files = told["files"]
    assert isinstance(files, list)
    assert set(files) <= {"bin", "boot", "dev", "lib", "lib32", "lib64", "sbin", "usr"}


def test_it_runs_as_its_own_user(told: dict[str, object]) -> None:
    assert told["user"] in ((VMS, NOBODY) if os.geteuid() == 0 else (os.geteuid(),))


def test_every_denied_call_is_known_to_the_filter() -> None:
    """A name that is misspelt would be passed over in silence."""
    import ctypes

    library = ctypes.CDLL("libseccomp.so.2")
    unknown = [
        name
        for names in seccomp.DENIED.values()
        for name in names
        if library.seccomp_syscall_resolve_name(name.encode()) == -1
    ]
    newer = {"fchmodat2", "statmount", "listmount", "setxattrat", "removexattrat"}  # than Debian 12's libseccomp
    assert set(unknown) <= newer


async def test_a_machine_without_bubblewrap_says_so_and_require_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str, *, package: str) -> Path:
        if name != "bwrap":
            return find_program(name, package=package)
        raise SetupError(f"{name} is not installed", remedy=f"apt-get install {package}")

    monkeypatch.setattr(confinement, "find_program", none)
    monkeypatch.setattr(confinement, "recall", lambda key: None)
    walls = await confinement.survey(Emulator(PYTHON, "", ""))
    assert not walls.is_jail
    assert "apt-get install bubblewrap" in walls.off[Layer.FILES]
    with pytest.raises(SetupError, match="bwrap is not installed"):
        await confinement.survey(Emulator(PYTHON, "", ""), Mode.REQUIRE)


async def test_turned_off_it_says_so() -> None:
    walls = await confinement.survey(Emulator(PYTHON, "", ""), Mode.OFF)
    assert not walls.is_jail
    assert set(walls.off.values()) == {"it was turned off"}


@pytest.mark.parametrize("text", ["", "auto", "require", "off"])
def test_the_mode_can_be_set_by_the_environment(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UTILITYVM_CONFINEMENT", text)
    assert confinement.mode(None) == (text or "auto")
    assert confinement.mode("require") is Mode.REQUIRE


def test_a_mode_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UTILITYVM_CONFINEMENT", "some")
    with pytest.raises(InvalidRequest, match="UTILITYVM_CONFINEMENT asks for confinement 'some'"):
        confinement.mode(None)


async def test_nothing_begins_if_its_starter_ends_before_it_tells() -> None:
    """The block is left without `Launched.qemu`: as if the owner had been killed there."""
    who = Identity(VMS) if os.geteuid() == 0 else Identity(os.geteuid(), drops=False)
    jail = jail_of(who)
    log, written = os.pipe()
    try:
        with jail.start([str(PYTHON), "-c", "print('began', flush=True)"], log=written, inherited=()):
            pass
    finally:
        os.close(written)
    with os.fdopen(log) as file:
        assert "began" not in file.read()  # to the end: all processes of the jail have ended


def test_a_process_that_was_not_waited_for_has_ended() -> None:
    assert confinement._state_of(os.getpid()) == "R"
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert confinement._state_of(child.pid) is None
    child.wait()
    assert confinement._state_of(child.pid) is None
