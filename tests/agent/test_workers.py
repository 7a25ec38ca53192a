from __future__ import annotations

import threading

import pytest

from utilityvm.agent import workers
from utilityvm.agent.workers import Workers


def test_jobs_that_wait_for_each_other_all_run() -> None:
    pool = Workers(at_most=10)
    meeting = threading.Barrier(11)

    def meet() -> None:
        meeting.wait(20)

    for _ in range(10):
        assert pool.do(meet)
    meeting.wait(20)


def test_one_job_too_many_is_not_taken_until_one_ends() -> None:
    pool = Workers(at_most=2)
    gates = [threading.Event(), threading.Event()]
    ended = threading.Semaphore(0)

    def job(gate: threading.Event) -> None:
        gate.wait()
        ended.release()

    for gate in gates:
        assert pool.do(lambda gate=gate: job(gate))  # type: ignore[misc]
    assert not pool.do(lambda: None)
    gates[0].set()
    assert ended.acquire(timeout=20)
    done = threading.Event()
    while not pool.do(done.set):
        pass  # its thread is about to be free
    assert done.wait(20)
    gates[1].set()


def test_threads_with_nothing_to_do_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_IDLE_S", 0.01)
    monkeypatch.setattr(workers, "_KEEP", 1)
    pool = Workers(at_most=20)
    meeting = threading.Barrier(11)
    threads: list[threading.Thread] = []

    def job() -> None:
        threads.append(threading.current_thread())
        meeting.wait(20)

    for _ in range(10):
        pool.do(job)
    meeting.wait(20)
    while sum(thread.is_alive() for thread in threads) > 1:
        next(thread for thread in threads if thread.is_alive()).join(0.01)
    done = threading.Event()
    assert pool.do(done.set)
    assert done.wait(20)


def test_a_system_without_threads_takes_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = Workers(at_most=2)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert not pool.do(lambda: None)
    done = threading.Event()
    assert pool.do(done.set)
    assert done.wait(20)
