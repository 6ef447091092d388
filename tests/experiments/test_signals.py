"""The first signal is a request, the second acts as before, and nothing is left installed."""

import signal
import threading

import pytest

from jaxopt_suite.experiments.signals import signal_name, stop_on_signals


@pytest.fixture(autouse=True)
def usual_handlers():
    """Python's own SIGINT handler, whatever the shell that started the tests has set."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_request_and_the_handlers_come_back(signum):
    before = signal.getsignal(signum)
    with stop_on_signals() as request:
        assert not request
        signal.raise_signal(signum)
        assert request
        assert (request.signum, signal_name(request.signum)) == (signum, signum.name)
        assert signal.getsignal(signum) is before
    assert signal.getsignal(signum) is before


def test_a_second_interrupt_is_not_held_up():
    with stop_on_signals() as request:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert request.signum == signal.SIGINT


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_on_signals() as request:
        signal.raise_signal(signal.SIGINT)
        assert not request


def test_handlers_come_back_after_an_exception():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), stop_on_signals():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_installs_nothing():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def elsewhere():
        with stop_on_signals() as request:
            seen.append((bool(request), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
