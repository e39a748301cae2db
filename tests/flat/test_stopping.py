"""Signals between steps: recorded, one stop per signal."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from scalekd_cache import distributed
from scalekd_cache.distributed import SignalHandler, interrupted_by


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_is_noted_and_says_how_to_go_on(number, status, capfd):
    before = signal.getsignal(number)
    with SignalHandler() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), number)
        assert signals.received == number
        again = " (press Ctrl-C again after 3 s to stop at once)" if number == signal.SIGINT else ""
        assert f"{number.name}: saving a checkpoint after this step{again}\n" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)  # the first one counts
        assert signals.received == number
    assert signal.getsignal(number) is before
    end = interrupted_by(signals.received, 7, 90)
    assert end.exit_code == status
    assert "step 7 of 90" in str(end)
    assert "rerun" in str(end)


def test_a_thread_gets_no_signals():
    """Python allows handlers only in the main thread; `distill()` also works in another one."""
    with ThreadPoolExecutor() as threads:
        assert threads.submit(_received_in_this_thread).result() == 0


def _received_in_this_thread():
    with SignalHandler() as signals:
        return signals.received


def test_a_second_press_interrupts_and_a_passed_on_one_does_not(monkeypatch):
    with SignalHandler() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        monkeypatch.setattr(distributed, "DUPLICATE_SIGINT_S", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
