"""Signals that arrive at any moment."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from embedd_dagster.stack.stop_signals import StopSignals

# the main thread is inside the event's own lock when the signal arrives, as it often is while it polls the event
IN_THE_LOCK = """
import os, signal, threading, time
from embedd_dagster.stack.stack import Stack
from pathlib import Path
import tempfile

stack = Stack(Path(tempfile.mkdtemp()))

def start():
    with stack._stop_asked._cond:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000): pass  # Python hears the signal here

stack.start = start
stack._endpoints = object()
stack.up(on_ready=lambda endpoints: None)
print("ended")
"""


def test_a_signal_while_the_main_thread_holds_the_events_lock_ends_up():
    done = subprocess.run([sys.executable, "-c", IN_THE_LOCK], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "ended\n", done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_and_tells_and_the_second_hurries(number):
    asked, hurry, told = threading.Event(), threading.Event(), []
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with StopSignals(asked, hurry, on_first=lambda: told.append(1)):
            os.kill(os.getpid(), number)
            assert asked.wait(30)
            assert not hurry.is_set()
            os.kill(os.getpid(), number)
            assert hurry.wait(30)
        assert told == [1]
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_signal_that_nohup_ignores_stays_ignored():
    asked, hurry = threading.Event(), threading.Event()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(asked, hurry):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.wait(30)
        assert not hurry.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)
