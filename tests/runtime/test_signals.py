"""Ctrl-C and SIGTERM: announced at once and carried out between two steps, or the end of the process at once."""

import os
import signal
import subprocess
import sys

import pytest

from sar_kd.runtime.signals import StopRequest, cleaned_up


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_the_first_signal_is_a_request_and_is_answered_at_once(capfd, number, name):
    before = signal.getsignal(number)
    with StopRequest(what_follows="the step is finished") as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert capfd.readouterr().err == f"{name}: the step is finished\n"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_rank_that_does_not_print_says_nothing(capfd):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
    assert capfd.readouterr() == ("", "")


def test_a_clean_up_is_made_once_at_the_end_of_its_context():
    made = []
    with cleaned_up(lambda: made.append(1)):
        assert made == []
    with pytest.raises(RuntimeError), cleaned_up(lambda: made.append(2)):
        raise RuntimeError
    assert made == [1, 2]


IN_A_FINALIZER = """
import gc, signal, sys
from sar_kd.runtime.signals import StopRequest, cleaned_up, end_at_once_on_ctrl_c

class Callee:
    def __del__(self):  # a KeyboardInterrupt in here is printed and forgotten
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        print("went on")

end_at_once_on_ctrl_c("interrupted at once", is_silent="silent" in sys.argv)
with cleaned_up(lambda: print("cleaned up", flush=True)):
    if "loop" in sys.argv:
        with StopRequest(what_follows="the step is finished"):
            Callee()
    else:
        Callee()
print("went on")
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "interrupted at once\n"),
        (["silent"], ""),
        (["loop"], "Ctrl-C: the step is finished\ninterrupted at once\n"),
    ],
    ids=str,
)
def test_a_process_of_its_own_ends_wherever_it_is_and_cleans_up(words, expected):
    done = subprocess.run([sys.executable, "-c", IN_A_FINALIZER, *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned up\n", expected)
    assert os.linesep == "\n"
