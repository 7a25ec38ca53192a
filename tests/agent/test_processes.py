from __future__ import annotations

import os
import signal
import subprocess

from utilityvm.agent.processes import Process, all_processes, kill_session, send


def test_this_process_is_among_all() -> None:
    assert Process(os.getpid(), os.getsid(0)) in list(all_processes())


def test_a_name_with_brackets_and_spaces_is_read() -> None:
    script = "printf 'a) S 1 (' > /proc/self/comm; echo; read x"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as odd:
        assert odd.stdout
        odd.stdout.readline()
        assert Process(odd.pid, os.getsid(0)) in list(all_processes())
        odd.communicate(b"\n")


def test_a_process_that_has_ended_is_not_among_all() -> None:
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert ended.pid not in [process.pid for process in all_processes()]
    assert ended.wait() == 0


def test_a_session_is_killed_and_no_other() -> None:
    script = "(trap '' TERM; exec sleep 1000) & echo; exec sleep 1001"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True) as leader:
        assert leader.stdout
        leader.stdout.readline()
        kill_session(leader.pid)
        assert leader.wait() == -signal.SIGKILL
        assert leader.stdout.read() == b""  # its child has closed it too
    assert os.getpid() in [process.pid for process in all_processes()]


def test_a_signal_for_nobody_is_no_error() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    send(ended.pid, signal.SIGTERM)
