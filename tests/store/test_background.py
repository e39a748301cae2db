"""Calls in a background thread: in order, with a bounded queue, without lost errors."""

import threading

import pytest
from commands import LIMIT_S

from scalekd_cache.store.background import BackgroundWriter


def test_calls_run_in_order_in_another_thread_and_leaving_waits():
    seen = []
    with BackgroundWriter("test", depth=3) as writer:
        for number in range(20):
            writer.submit(lambda n: seen.append((n, threading.current_thread().name)), number)
    assert [number for number, _ in seen] == list(range(20))
    assert {name.partition("_")[0] for _, name in seen} == {"test"}


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_no_more_than_depth_calls_are_under_way(depth):
    gate, put = threading.Event(), []

    def fill(writer):
        for number in range(depth + 1):
            writer.submit(gate.wait, 60)
            put.append(number)

    with BackgroundWriter("test", depth) as writer:
        caller = threading.Thread(target=fill, args=[writer])
        caller.start()
        caller.join(0.5)
        assert put == list(range(depth))
        gate.set()
        caller.join(60)
        assert put == list(range(depth + 1))


def fail():
    raise RuntimeError("in the thread")


def put_calls(*calls, error=None):
    with BackgroundWriter("test", depth=1) as writer:
        for call in calls:
            writer.submit(call)
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

    def put(writer):
        writer.submit(fail_late)
        writer.submit(ran.append, 1)
        gate.set()

    def run():
        with BackgroundWriter("test", depth=2) as writer:
            put(writer)

    with pytest.raises(RuntimeError, match="in the thread"):
        run()
    assert ran == []
