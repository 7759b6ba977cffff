"""Whole runs of the two scripts with tiny models: inputs, command lines, and what a run leaves."""

import contextlib
import importlib.util
import io
import json
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sar_kd.commands import main

ROOT = Path(__file__).parents[2]
TIMING = {
    "tokens_per_second", "peak_memory_bytes", "wall_seconds", "seconds", "train_seconds", "sampling_seconds", "time",
    "environment",  # the command and the date
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, make_student, make_teacher, sp_tokenizer, byte_tokenizer, corpus_texts):
    """Saved models with different tokenizers, and a text file."""
    folder = tmp_path_factory.mktemp("inputs")
    student = make_student(len(sp_tokenizer), num_hidden_layers=1, attention_dropout=0.1)
    for name, model, tokenizer in (
        ("student", student, sp_tokenizer),
        ("teacher", make_teacher(len(byte_tokenizer), num_hidden_layers=1), byte_tokenizer),
        ("equal_teacher", make_teacher(len(sp_tokenizer), num_hidden_layers=1, hidden_size=16), sp_tokenizer),
        ("dense_teacher", make_student(len(byte_tokenizer), num_hidden_layers=1, hidden_size=16), byte_tokenizer),
        # float16 cannot hold what this student's last product gives, float32 can.
        ("loud", _loud(make_student(len(sp_tokenizer), num_hidden_layers=1)), sp_tokenizer),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("\n".join(corpus_texts), encoding="utf-8")
    return folder


def _loud(student):
    student.model.layers[0].mlp.down_proj.weight.data.mul_(1e6)
    return student


def argv_of(inputs, out, *more, student="student", steps=3, text="text.txt"):
    values = {
        "teacher_model": inputs / "teacher", "student_model": inputs / student, "train_file": inputs / text,
        "block_size": 32, "train_steps": steps, "eval_steps": 2, "save_steps": 2, "log_steps": 1,
        "per_device_batch_size": 2, "grad_accum_steps": 2, "warmup_steps": 2, "student_lr": 1e-3,
        "model_dtype": "float16", "device": "cpu", "routing": "native", "output_dir": out,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))] + [str(m) for m in more]


def load_script(name="train_sar_kd_stable"):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(argv, script=None):
    """Exit code, lines on stdout, lines on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.run((script or load_script()).main, argv)
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


def read_json(path):
    return json.loads(Path(path).read_text())


def read_metrics(folder, event=None):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if event in (None, record["event"])]


def latest_checkpoint(folder) -> Path:
    return folder / "checkpoint" / (folder / "checkpoint" / "latest").read_text()


def read_weights(path):
    return safetensors.torch.load_file(path)


def equal_weights(a, b) -> bool:
    """Deep equality, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_weights(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal_weights, a, b))
    return a == b


def untimed(record):
    """The record without times, memory and environment."""
    if isinstance(record, dict):
        return {key: untimed(value) for key, value in record.items() if key not in TIMING}
    return [untimed(value) for value in record] if isinstance(record, list) else record


def interrupting(train_step, after):
    """train_step, with a SIGINT in call number `after`."""
    calls = []

    def interrupting(*args):
        calls.append(1)
        if len(calls) == after:
            signal.raise_signal(signal.SIGINT)
        return train_step(*args)

    return interrupting


def assert_equal_runs(a, b):
    """Two run folders are equal, times aside: checkpoint, student, metrics and summary."""
    states = [torch.load(latest_checkpoint(run) / "state.pt", weights_only=True) for run in (a, b)]
    assert states[0]["optimizer"]["state"]
    assert equal_weights(*states)
    assert equal_weights(*(read_weights(latest_checkpoint(run) / "student.safetensors") for run in (a, b)))
    assert equal_weights(*(read_weights(run / "student" / "model.safetensors") for run in (a, b)))
    progress = [read_json(latest_checkpoint(run) / "progress.json") for run in (a, b)]
    assert untimed(progress[0]) == untimed(progress[1])
    assert untimed(read_metrics(a)) == untimed(read_metrics(b))
    assert untimed(read_json(a / "summary.json")) == untimed(read_json(b / "summary.json"))


def assert_refused(argv, *parts):
    """The script exits with 2 and one line, which names an option and holds these parts."""
    code, _, err = run_script([str(word) for word in argv])
    assert code == 2
    (line,) = err
    assert line.startswith("error: --")
    assert all(part in line for part in parts)
