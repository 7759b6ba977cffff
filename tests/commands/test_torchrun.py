"""Whole runs in two processes on a CPU: files, output, resuming, stopping, and the death of one process."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers

import train_sar_kd_stable
from sar_kd.commands import main, train
from sar_kd.config.sections import DataConfig
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.sources import load_documents
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from sar_kd.training import trainer
from tests.helpers import ranks
from tests.helpers.runs import latest_checkpoint, read_json, read_metrics, untimed

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, make_student, make_teacher, sp_tokenizer, byte_tokenizer, corpus_texts):
    """Saved models with different tokenizers, and a text file."""
    folder = tmp_path_factory.mktemp("inputs")
    tied = make_student(len(sp_tokenizer), num_hidden_layers=1, attention_dropout=0.1, tie_word_embeddings=True)
    plain = make_student(len(sp_tokenizer), num_hidden_layers=1)
    loud = make_student(len(sp_tokenizer), num_hidden_layers=1)
    loud.model.layers[0].mlp.down_proj.weight.data.mul_(1e6)  # more than float16 holds
    teacher = make_teacher(len(byte_tokenizer), num_hidden_layers=1)
    for name, model, tokenizer in (
        ("student", tied, sp_tokenizer), ("plain", plain, sp_tokenizer), ("loud", loud, sp_tokenizer),
        ("teacher", teacher, byte_tokenizer),
    ):  # fmt: skip
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("\n".join(corpus_texts), encoding="utf-8")
    return folder


def _argv(inputs, out, *more, batch=2, steps=4, student="student"):
    values = {
        "teacher_model": inputs / "teacher", "student_model": inputs / student, "train_file": inputs / "text.txt",
        "block_size": 32, "train_steps": steps, "eval_steps": 2, "save_steps": 2, "log_steps": 1, "device": "cpu",
        "per_device_batch_size": batch, "grad_accum_steps": 2, "warmup_steps": 2, "student_lr": 1e-3,
        "model_dtype": "float16", "output_dir": out,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))] + [str(m) for m in more]


def _alone(argv):
    """A run in this process."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        code = main.run(train_sar_kd_stable.main, argv)
    return SimpleNamespace(code=code, err=err.getvalue().splitlines())


def _run(folder, argv, change=None):
    return ranks.run(folder, ranks.script, argv, change)


def _codes(ended):
    return [end.code for end in ended]


def _lines(ended):
    """The lines of all processes on stderr."""
    return [line for end in ended for line in end.err]


class _Changed:
    """A change of the script in one rank before it runs; can be pickled."""

    def __init__(self, act, at, rank):
        self.act, self.at, self.rank = act, at, rank

    def __call__(self, rank):
        step, calls = trainer.train_step, []

        def train_step(*args):
            calls.append(1)
            if len(calls) == self.at and rank == self.rank:
                self.act()
            return step(*args)

        trainer.train_step = train_step


def _interrupt():
    signal.raise_signal(signal.SIGINT)


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def finished(request, inputs, tmp_path_factory):
    """Four steps in float16 by two processes."""
    folder = tmp_path_factory.mktemp(request.param)
    ended = _run(folder / "output", _argv(inputs, folder / "run", "--parallel", request.param))
    return SimpleNamespace(folder=folder / "run", ended=ended, parallel=request.param)


def test_two_processes_finish_and_the_first_prints_and_writes_for_both(finished):
    assert _codes(finished.ended) == [0, 0]
    assert _lines(finished.ended) == []
    assert finished.ended[0].out.startswith("Distilling ")
    assert "2 processes" in finished.ended[0].out
    assert finished.ended[1].out == ""
    assert {path.name for path in finished.folder.iterdir()} == {
        "config.json", "metrics.jsonl", "summary.json", "held_out.json", "student", "checkpoint", "report.html",
        "log.txt",
    }  # fmt: skip


def test_the_metrics_are_those_of_all_ranks(finished, inputs, tmp_path):
    assert _alone(_argv(inputs, tmp_path / "run", batch=4, steps=1)).code == 0
    alone, both = (read_json(folder / "summary.json") for folder in (tmp_path / "run", finished.folder))
    names = ("val_ppl_start", "val_bits_per_byte_start", "teacher_val_ppl", "teacher_val_bits_per_byte")
    assert [both[name] for name in names] == pytest.approx([alone[name] for name in names], rel=1e-3)
    step, *_ = read_metrics(tmp_path / "run", "step")
    first, *_ = read_metrics(finished.folder, "step")
    assert first["num_target_tokens"] == step["num_target_tokens"]
    assert first["loss"] == pytest.approx(step["loss"], rel=0.05)  # other dropout
    assert both["tokens"] == sum(record["num_target_tokens"] for record in read_metrics(finished.folder, "step"))
    assert both["val_ppl_final"] < both["val_ppl_start"]


def test_the_student_is_saved_whole_and_is_the_one_that_was_measured(finished):
    student = transformers.AutoModelForCausalLM.from_pretrained(finished.folder / "student")
    assert student.lm_head.weight is student.model.embed_tokens.weight
    saved = safetensors.torch.load_file(latest_checkpoint(finished.folder) / "student.safetensors")
    own = student.state_dict()
    assert read_json(finished.folder / "summary.json")["best_step"] == 4
    assert saved.keys() < own.keys()  # a tied weight once
    assert all(torch.equal(own[name], value) for name, value in saved.items())


def test_a_signal_to_one_rank_ends_both_with_130_and_resumed_they_equal_a_run_never_interrupted(
    finished, inputs, tmp_path
):
    argv = _argv(inputs, tmp_path / "run", "--parallel", finished.parallel)
    ended = _run(tmp_path / "output", argv, _Changed(_interrupt, at=3, rank=1))
    assert _codes(ended) == [130, 130]
    assert _lines(ended) == []
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "interrupted"
    assert read_json(latest_checkpoint(tmp_path / "run") / "progress.json")["progress"]["step"] == 3
    ended = _run(tmp_path / "resumed", ["--resume", "--output_dir", str(tmp_path / "run")])
    assert _codes(ended) == [0, 0]
    _assert_equal_runs(finished.folder, tmp_path / "run")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_on_policy_run_of_two_ranks_goes_on_bit_for_bit_with_the_replay_buffer_of_both(inputs, tmp_path, parallel):
    more = ("--parallel", parallel, "--on_policy_fraction", 1, "--replay_size", 6, "--max_new_tokens", 5)
    more += ("--keep_last",)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    ended = _run(tmp_path / "output", _argv(inputs, whole, *more))
    assert (_codes(ended), _lines(ended)) == ([0, 0], [])
    argv = _argv(inputs, halves, *more)
    assert _codes(_run(tmp_path / "stopped", argv, _Changed(_interrupt, at=2, rank=1))) == [130, 130]
    assert _codes(_run(tmp_path / "resumed", ["--resume", "--output_dir", str(halves)])) == [0, 0]
    _assert_equal_runs(whole, halves)
    steps = read_metrics(whole, "step")
    assert [record.get("responses") for record in steps] == [8, 4, 4, 4]  # the others are replayed
    assert read_json(whole / "summary.json")["on_policy"]["responses"] == 20
    last = transformers.AutoModelForCausalLM.from_pretrained(whole / "last_student").state_dict()
    saved = safetensors.torch.load_file(latest_checkpoint(whole) / "student.safetensors")
    assert all(torch.equal(last[name], value) for name, value in saved.items())


def _assert_equal_runs(a, b):
    states = [torch.load(latest_checkpoint(run) / "state.pt", weights_only=True) for run in (a, b)]
    assert len(states[0]["other_ranks"]) == 1
    rng = [states[0]["precision"]["rng"]["torch"], states[0]["other_ranks"][0]["rng"]["torch"]]
    assert not torch.equal(*rng)
    assert _written(states[0]) == _written(states[1])
    weights = [_written(safetensors.torch.load_file(latest_checkpoint(run) / "student.safetensors")) for run in (a, b)]
    assert weights[0] == weights[1]
    assert untimed(read_metrics(a)) == untimed(read_metrics(b))
    assert untimed(read_json(a / "summary.json")) == untimed(read_json(b / "summary.json"))


def _written(state):
    """Every value of a nest of tensors, digit by digit."""
    return json.dumps(state, default=lambda tensor: tensor.tolist())


def test_another_number_of_processes_cannot_resume_a_run(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    ended = _alone(["--resume", "--output_dir", str(folder), "--train_steps", "6"])
    assert ended.code == 2
    (line,) = ended.err
    assert "is of 2 processes, and 1 are running; start it with torchrun, 2 processes in all" in line


# Two processes that cannot go on


def test_a_rank_that_is_killed_is_named_by_the_other_in_seconds_and_the_run_resumes(inputs, tmp_path):
    argv = _argv(inputs, tmp_path / "run", "--eval_steps", 100, steps=6)
    started = ranks.start(tmp_path / "output", ranks.script, argv, _Changed(_die, at=4, rank=1))
    started.processes[1].join(60)
    killed = time.monotonic()
    started.processes[0].join(60)
    seconds = time.monotonic() - killed
    ended = ranks.finish(started)
    assert _codes(ended) == [2, -signal.SIGKILL]
    (line,) = ended[0].err
    assert line.startswith("error: rank 1 of 2 ended without an error message")
    assert "--resume" in line
    assert seconds < 20
    assert _codes(_run(tmp_path / "resumed", ["--resume", "--output_dir", str(tmp_path / "run")])) == [0, 0]
    steps = read_metrics(tmp_path / "run", "step")
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]


def test_a_student_that_float16_cannot_hold_ends_both_with_2_and_one_line(inputs, tmp_path):
    ended = _run(tmp_path / "output", _argv(inputs, tmp_path / "run", steps=50, student="loud"))
    assert _codes(ended) == [2, 2]
    (line,) = _lines(ended)
    assert "of the text of steps 1 to 10" in line
    assert "down_proj" in line


class _Unreadable:
    """A student that is NaN where it reads one token, wherever it runs."""

    def __init__(self, token):
        self.token = token

    def __call__(self, rank):
        def read(module, inputs, output):
            return torch.where((inputs[0] == self.token)[..., None], torch.nan, output)

        class Trainer(train.Trainer):
            def _train(self, *args):
                self.models.student.get_input_embeddings().register_forward_hook(read)
                return super()._train(*args)

        train.Trainer = Trainer


class _WithoutGradient:
    """A student whose loss is finite and whose gradient is not, on rank 1 from the second step on."""

    def __call__(self, rank):
        original, calls = trainer.train_step, []

        def overflow(module, inputs, output):
            if output.requires_grad:
                output.register_hook(lambda grad: grad * torch.inf)

        def train_step(micro_batches, context):
            calls.append(1)
            if len(calls) == 2 and rank == 1:
                context.objective.student.model.norm.register_forward_hook(overflow)
            return original(micro_batches, context)

        trainer.train_step = train_step


def test_gradients_that_stay_infinite_on_one_rank_stop_both_with_the_same_weights(inputs, tmp_path):
    more = ("--model_dtype", "float32", "--student_model", inputs / "plain", "--eval_steps", 100)
    ended = _run(tmp_path / "output", _argv(inputs, tmp_path / "run", *more, steps=50), _WithoutGradient())
    assert _codes(ended) == [3, 3]
    summary = read_json(tmp_path / "run" / "summary.json")
    assert (summary["applied"], summary["skipped"]["gradient"]) == (1, 10)
    assert all("10 consecutive NaN batches" in line for line in _lines(ended))
    crash = read_json(tmp_path / "run" / "crash" / "crash.json")
    assert crash["cause"] == "gradient"


@pytest.mark.parametrize(
    ("parallel", "rewinds"), [("ddp", False), ("fsdp", False), ("ddp", True), ("fsdp", True)], ids=lambda v: str(v)
)
def test_a_document_that_only_the_second_rank_reads_is_named_and_skipped_by_both(
    inputs, tmp_path, parallel, rewinds, corpus_texts
):
    texts = [f"{number}: {text}" for number, text in enumerate(corpus_texts[:30])]
    (tmp_path / "examples.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "held_out.txt").write_text("\n".join(corpus_texts[30:36]))
    files = {"train_file": (str(tmp_path / "examples.jsonl"),), "validation_file": (str(tmp_path / "held_out.txt"),)}
    names = [transformers.AutoTokenizer.from_pretrained(inputs / which) for which in ("student", "teacher")]
    sizes = dict(zip(("student_vocab_size", "teacher_vocab_size"), map(len, names), strict=True))
    corpus = build_dataset(load_documents(DataConfig(**files))[0], TokenizerPair(*names, **sizes, aligns=True), 32, 256)
    tokens = [set(corpus.batch([block]).student.input_ids.flatten().tolist()) for block in range(len(corpus))]
    held_out = set(names[0].encode(" ".join(corpus_texts[30:36])))
    own = {block: mine.difference(held_out, *tokens[:block], *tokens[block + 1 :]) for block, mine in enumerate(tokens)}
    bad = max(own, key=lambda block: len(own[block]))
    token = min(own[bad])
    seed, step = next(
        (seed, step)
        for seed in range(99)
        for step in range(4)
        if corpus.micro_batches(step, 1, 1, seed, rank=1, ranks=2)[0].blocks == (bad,)
    )
    more = ("--train_file", *files["train_file"], "--validation_file", *files["validation_file"])
    more += ("--parallel", parallel, "--grad_accum_steps", 1, "--eval_steps", 100, "--seed", seed)
    more += ("--on_divergence", "rewind", "--max_nan_batches", 1) if rewinds else ()
    argv = _argv(inputs, tmp_path / "run", *more, steps=5, batch=1)
    ended = _run(tmp_path / "output", argv, _Unreadable(token))
    assert _codes(ended) == [0, 0]
    skipped = [record["step"] for record in read_metrics(tmp_path / "run", "step") if record["cause"] == "forward"]
    assert skipped == ([] if rewinds else [step + 1])
    if rewinds:
        (record,) = read_metrics(tmp_path / "run", "rewind")
        assert record["rewound_from"] == step + 1 == read_json(tmp_path / "run" / "summary.json")["rewound_from"]
        assert bad in record["skipped_blocks"]
    crash = read_json(tmp_path / "run" / "crash" / "crash.json")
    assert crash["documents"] == corpus.documents_of(bad)
    assert len(crash["documents"]) < 4


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (("--temprature", 2), ("--temprature", "did you mean --temperature?")),
        (("--student_model", "./nowhere"), ("--student_model ./nowhere", "no such directory")),
    ],
)
def test_an_error_of_the_user_is_printed_once_and_both_exit_with_2(inputs, tmp_path, more, parts):
    ended = _run(tmp_path / "output", _argv(inputs, tmp_path / "run", *more))
    assert _codes(ended) == [2, 2]
    (line,) = _lines(ended)
    assert all(part in line for part in parts)
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused_once_by_both(finished, inputs):
    ended = _run(finished.folder.parent / "again", _argv(inputs, finished.folder))
    assert _codes(ended) == [2, 2]
    (line,) = _lines(ended)
    assert "holds a run" in line


def test_routers_learn_alike_in_two_processes_and_in_one(inputs, tmp_path):
    more = ("--routing", "sar", "--sar_routing", "all", "--alpha_kd", 0.5, "--router_lr", 1e-3)
    more += ("--model_dtype", "float32", "--student_model", inputs / "plain")
    both, alone = tmp_path / "both", tmp_path / "alone"
    assert _codes(_run(tmp_path / "output", _argv(inputs, both, *more, steps=2))) == [0, 0]
    assert _alone(_argv(inputs, alone, *more, batch=4, steps=2)).code == 0
    for name in ("router_kl", "router_balance", "router_grad_norm", "router_entropy", "kd_loss"):
        own, other = ([record[name] for record in read_metrics(run, "step")] for run in (both, alone))
        assert own == pytest.approx(other, rel=1e-4)
    updates = [safetensors.torch.load_file(run / "router_update.safetensors") for run in (both, alone)]
    assert all(torch.allclose(updates[0][name], updates[1][name], atol=1e-5) for name in updates[1])
    ended = _run(tmp_path / "refused", _argv(inputs, tmp_path / "no", *more, "--parallel", "fsdp"))
    assert _codes(ended) == [2, 2]
    (line,) = _lines(ended)
    assert "--routing sar" in line
    assert "--parallel ddp" in line


@pytest.mark.long
def test_torchrun_starts_it_and_a_wrong_option_is_printed_once(inputs, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    argv = [str(ROOT / "train_sar_kd_stable.py"), *_argv(inputs, tmp_path / "run", "--temprature", "2")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launch, *argv], capture_output=True, text=True, timeout=120, env=environment)
    assert [line for line in done.stderr.splitlines() if "did you mean" in line] == [
        "error: --temprature: no such option; did you mean --temperature?"
    ]
    assert done.stderr.count("exitcode  : 2") == 2
