"""Signals between steps: noted, one stop a press."""

import os
import signal

import pytest

from scalekd_cache import distributed as stopping
from scalekd_cache.distributed import Stop, stopped


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_is_noted_and_says_how_to_go_on(number, status):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert stop.wanted == 0
        os.kill(os.getpid(), number)
        assert stop.wanted == number
        os.kill(os.getpid(), signal.SIGTERM)  # the first one counts
        assert stop.wanted == number
    assert signal.getsignal(number) is before
    end = stopped(stop.wanted, 7, 90)
    assert end.status == status
    assert "step 7 of 90" in str(end)
    assert "again" in str(end)


def test_a_second_press_interrupts_and_a_passed_on_one_does_not(monkeypatch):
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wanted == signal.SIGINT
        monkeypatch.setattr(stopping, "SAME_PRESS_S", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
