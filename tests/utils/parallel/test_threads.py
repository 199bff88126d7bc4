"""Threads that finish images: how many wait, in which order they run, and where their errors appear."""

import threading

import pytest

from utils.parallel.threads import Threads


def test_one_thread_runs_calls_in_order():
    done = []
    with Threads(1) as threads:
        for number in range(20):
            threads.call(done.append, number)
    assert done == [*range(20)]


def test_few_calls_wait():
    """The caller goes on while two are queued behind those that run, and then waits for the first."""
    go, started, queued = threading.Event(), threading.Semaphore(0), []

    def work():
        started.release()
        assert go.wait(30)

    def queue():
        with Threads(3) as threads:
            for number in range(9):
                threads.call(work)
                queued.append(number)

    caller = threading.Thread(target=queue)
    caller.start()
    for _ in range(3):
        assert started.acquire(timeout=30)
    while len(queued) < 5:
        pass
    caller.join(0.2)
    assert queued == [*range(5)]
    go.set()
    caller.join(30)
    assert queued == [*range(9)]


def fail(go=None):
    assert go is None or go.wait(30)
    raise OSError("disk full")


def test_an_error_is_raised_by_a_later_call_or_at_the_end():
    go, ended, later = (threading.Event() for _ in range(3))
    with pytest.raises(OSError, match="disk full"), Threads(1) as threads:
        threads.call(fail, go)
        threads.call(ended.set)
        go.set()
        assert ended.wait(30)
        threads.call(later.set)
    assert not later.is_set()
    with pytest.raises(OSError, match="disk full"), Threads(2) as threads:
        threads.call(fail)


def test_an_error_of_the_caller_drops_what_has_not_begun():
    go, done = threading.Event(), []
    with pytest.raises(KeyboardInterrupt), Threads(1) as threads:
        threads.call(go.wait, 30)
        threads.call(done.append, 1)
        threading.Timer(0.2, go.set).start()
        raise KeyboardInterrupt
    assert done == []
