"""Batches are made a step ahead, and are those that would be made in time."""

import threading
from concurrent.futures import thread

import pytest

from sar_kd.training import batch_loader
from sar_kd.training.batch_loader import Prefetch


@pytest.fixture
def made():
    return []


@pytest.fixture
def prefetch(made):
    def make(key):
        made.append(key)
        if key == "bad":
            raise ValueError("it is bad")
        return f"batch {key}"

    found = Prefetch(make)
    yield found
    found.close()


def test_each_key_gives_its_own_value(prefetch, made):
    assert [prefetch.get(n, n + 1 if n < 5 else None) for n in range(6)] == [f"batch {n}" for n in range(6)]
    assert made == list(range(6))


def test_a_key_that_was_not_expected_is_made_on_request(prefetch):
    assert prefetch.get(0, 1) == "batch 0"
    assert prefetch.get(7, 8) == "batch 7"
    assert prefetch.get(1, None) == "batch 1"
    assert prefetch.get(1, None) == "batch 1"


def test_an_error_is_raised_where_its_value_is_requested(prefetch):
    assert prefetch.get(0, "bad") == "batch 0"
    with pytest.raises(ValueError, match="it is bad"):
        prefetch.get("bad", 2)
    assert prefetch.get(2, None) == "batch 2"


def test_the_next_is_made_while_nobody_waits_for_it():
    begun = threading.Event()
    prefetch = Prefetch(lambda key: begun.set() if key == 1 else None)
    prefetch.get(0, 1)
    assert begun.wait(timeout=30)
    prefetch.close()


def test_all_are_made_in_one_other_thread():
    prefetch = Prefetch(lambda key: threading.current_thread().name)
    names = {prefetch.get(n, n + 1) for n in range(5)}
    prefetch.close()
    assert len(names) == 1
    assert threading.current_thread().name not in names
    assert not [thread for thread in threading.enumerate() if thread.name in names]


def test_without_memory_for_a_thread_the_one_who_asks_makes_them(monkeypatch):
    def no_thread(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    prefetch = Prefetch(lambda key: (key, threading.current_thread() is threading.main_thread()))
    assert [prefetch.get(n, n + 1) for n in range(4)] == [(n, True) for n in range(4)]
    prefetch.close()


@pytest.mark.parametrize("dies_at", [1, 3])
def test_a_thread_that_has_died_is_not_waited_for(monkeypatch, dies_at):
    """As where memory ends in the thread's own code: the future stays without a result."""
    monkeypatch.setattr(batch_loader, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    run = thread._WorkItem.run

    def dies(self, *args):
        if self.args == (dies_at,) and threading.current_thread() is not threading.main_thread():
            del self  # as the pool's thread does
            raise SystemExit
        run(self, *args)

    monkeypatch.setattr(thread._WorkItem, "run", dies)
    prefetch = Prefetch(lambda key: f"batch {key}")
    assert [prefetch.get(n, n + 1) for n in range(6)] == [f"batch {n}" for n in range(6)]
    prefetch.close()


class _InTime:
    """What a run would do without a thread."""

    def __init__(self, make):
        self.get = lambda key, following: make(key)

    def close(self):
        pass


@pytest.mark.slow
def test_a_run_that_makes_batches_ahead_is_the_run_that_does_not(tmp_path, monkeypatch, byte_tokenizer, make_student):
    from sar_kd.commands.main import run
    from train_sar_kd_stable import main

    for name, layers in (("teacher", 3), ("student", 2)):
        make_student(len(byte_tokenizer), num_hidden_layers=layers).save_pretrained(tmp_path / name)
        byte_tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("One rule has one home, and one home has one rule.\n" * 60)
    flags = ["--teacher_model", tmp_path / "teacher", "--student_model", tmp_path / "student", "--train_file"]
    flags += [tmp_path / "text.txt", "--block_size", 16, "--train_steps", 9, "--eval_steps", 4, "--routing", "native"]
    students = []
    for way in (Prefetch, _InTime):
        monkeypatch.setattr(batch_loader, "Prefetch", way)
        assert run(main, [*map(str, flags), "--output_dir", str(tmp_path / way.__name__)]) == 0
        students.append((tmp_path / way.__name__ / "student" / "model.safetensors").read_bytes())
    assert students[0] == students[1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
