"""Calls in a thread of their own: in order, few at a time, no error lost."""

import threading

import pytest
from commands import LIMIT_S

from scalekd_cache.store.background import Behind


def test_calls_run_in_order_in_another_thread_and_leaving_waits():
    seen = []
    with Behind("test", depth=3) as behind:
        for number in range(20):
            behind.put(lambda n: seen.append((n, threading.current_thread().name)), number)
    assert [number for number, _ in seen] == list(range(20))
    assert {name.partition("_")[0] for _, name in seen} == {"test"}


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_no_more_than_depth_calls_are_under_way(depth):
    gate, put = threading.Event(), []

    def fill(behind):
        for number in range(depth + 1):
            behind.put(gate.wait, 60)
            put.append(number)

    with Behind("test", depth) as behind:
        caller = threading.Thread(target=fill, args=[behind])
        caller.start()
        caller.join(0.5)
        assert put == list(range(depth))
        gate.set()
        caller.join(60)
        assert put == list(range(depth + 1))


def fail():
    raise RuntimeError("in the thread")


def put_calls(*calls, error=None):
    with Behind("test", depth=1) as behind:
        for call in calls:
            behind.put(call)
        if error:
            raise error


@pytest.mark.parametrize("after", [0, 1])
def test_an_error_reaches_the_caller_at_a_later_call_or_at_the_end(after):
    with pytest.raises(RuntimeError, match="in the thread"):
        put_calls(fail, *[lambda: None] * after)


def test_the_callers_own_error_is_the_one_that_is_raised():
    with pytest.raises(KeyError, match="own"):
        put_calls(fail, error=KeyError("own"))


def test_nothing_runs_after_a_call_that_failed():
    ran, gate = [], threading.Event()

    def fail_late():
        assert gate.wait(LIMIT_S)
        fail()

    def put(behind):
        behind.put(fail_late)
        behind.put(ran.append, 1)
        gate.set()

    def run():
        with Behind("test", depth=2) as behind:
            put(behind)

    with pytest.raises(RuntimeError, match="in the thread"):
        run()
    assert ran == []
