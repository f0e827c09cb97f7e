import os
import signal
import subprocess
import threading

import pytest

from effdet_fast.training.interrupt import Interrupt, ignoring_children


def _send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_remembered_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert interrupt.signal is None
        _send(number)
        assert interrupt.signal == number
    assert signal.getsignal(number) is before


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            _send(signal.SIGHUP)
            assert interrupt.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_children_that_end_raise_nothing_inside_the_block():
    def complain(*_):
        raise RuntimeError("DataLoader worker is killed")

    before = signal.signal(signal.SIGCHLD, complain)
    try:
        with ignoring_children():
            subprocess.run(["true"], check=True)
        with pytest.raises(RuntimeError):
            _send(signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_second_ctrl_c_gives_up_but_not_under_a_launcher():
    with Interrupt() as interrupt:
        _send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            _send(signal.SIGINT)
    with Interrupt(launched=True) as interrupt:
        _send(signal.SIGINT)
        _send(signal.SIGINT)
        assert interrupt.signal == signal.SIGINT


def test_work_that_is_repeated_on_resume_stops_at_once():
    with Interrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt), interrupt.raising():
            _send(signal.SIGTERM)
        reached = False
        with pytest.raises(KeyboardInterrupt), interrupt.raising():
            reached = True
        assert not reached


def test_a_forked_child_ends_on_sigterm_and_outlives_sigint():
    with Interrupt():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM


def test_outside_the_main_thread_it_does_nothing():
    seen = []

    def run():
        with Interrupt() as interrupt:
            seen.append(interrupt.signal)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None]
