"""Whole runs of both scripts with tiny models: the run folder, resuming, interruption, emergency stop, exit codes."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import transformers

from sar_kd.commands import audit, main, train
from sar_kd.config.sections import DataConfig
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.sources import load_documents
from sar_kd.evaluation.perplexity import evaluate
from sar_kd.runtime.environment import is_installed
from sar_kd.runtime.precision import Precision
from sar_kd.runtime.signals import StopRequest
from sar_kd.training import trainer
from sar_kd.training.guards import CAUSES
from sar_kd.version import RUN_FORMAT
from tests.helpers.runs import (
    ROOT,
    argv_of,
    assert_equal_runs,
    assert_refused,
    equal_weights,
    inputs,
    interrupting,
    latest_checkpoint,
    load_script,
    read_json,
    read_metrics,
    read_weights,
    run_script,
)

__all__ = ["inputs"]  # a fixture
CPU = torch.device("cpu")
SCRIPTS = ("train_sar_kd_fp16_safe", "train_sar_kd_stable")
STEP_KEYS = {
    "event", "step", "loss", "ce_loss", "kd_loss", "grad_norm", "loss_scale", "num_target_tokens",
    "teacher_rows_dropped", "teacher_rows_infinite", "teacher_rows_unshared", "teacher_positions", "applied", "cause",
    "norm_limit", "learning_rate", "epoch", "time", "seconds",
}  # fmt: skip
EVALUATION_KEYS = {"event", "step", "val_ppl", "val_loss", "val_bits_per_byte", "time", "seconds"}
SUMMARY_KEYS = {
    "status", "steps", "applied", "skipped", "success_rate", "val_ppl_start", "val_ppl_final", "val_ppl_best",
    "best_step", "val_loss_final", "val_bits_per_byte_start", "val_bits_per_byte_final", "teacher_val_ppl",
    "teacher_val_bits_per_byte", "nan_batches_max_consecutive", "loss_scale_final", "tokens", "tokens_per_second",
    "peak_memory_bytes", "train_seconds", "wall_seconds", "embedded", "environment",
}  # fmt: skip


def _student(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


# A run that finishes


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, inputs, tmp_path_factory):
    """Three steps in float16: folder, summary, stdout, and the models in memory."""
    folder, script = tmp_path_factory.mktemp("runs") / request.param, load_script(request.param)
    run, load_models, out = SimpleNamespace(folder=folder), train.load_models, io.StringIO()

    def load_and_keep(*args):
        run.models = load_models(*args)
        return run.models

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(train, "load_models", load_and_keep)
        run.summary = script.main(argv_of(inputs, folder))
    run.out = out.getvalue()
    return run


def test_a_run_finishes_and_leaves_its_folder(finished):
    assert finished.summary["status"] == "finished"
    assert {path.name for path in finished.folder.iterdir()} == {
        "config.json", "log.txt", "metrics.jsonl", "summary.json", "held_out.json", "student", "checkpoint"
    } | ({"report.html"} if is_installed("matplotlib") else set())  # fmt: skip


def test_three_steps_lower_the_perplexity(finished):
    summary = finished.summary
    assert (summary["steps"], summary["applied"]) == (3, 3)
    assert summary["val_ppl_final"] < summary["val_ppl_start"]


def test_the_run_computed_in_float16(finished):
    assert next(finished.models.teacher.parameters()).dtype is torch.float16
    assert next(finished.models.student.parameters()).dtype is torch.float32
    assert finished.summary["loss_scale_final"] > 1.0


def test_every_line_of_the_metrics_has_its_keys(finished):
    steps, evaluations = read_metrics(finished.folder, "step"), read_metrics(finished.folder, "evaluation")
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert [record["step"] for record in evaluations] == [2, 3]
    assert all(record.keys() == STEP_KEYS for record in steps)
    assert all(record.keys() == EVALUATION_KEYS for record in evaluations)


def test_the_summary_has_the_designs_keys(finished):
    summary = read_json(finished.folder / "summary.json")
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["skipped"].keys() == set(CAUSES)
    assert summary == {"format": RUN_FORMAT, **finished.summary}
    assert summary["environment"] == read_json(finished.folder / "config.json")["environment"]
    assert {"torch", "devices", "commit", "command", "date"} <= summary["environment"].keys()


def test_the_summary_agrees_with_the_metrics(finished):
    steps, evaluations = read_metrics(finished.folder, "step"), read_metrics(finished.folder, "evaluation")
    summary = finished.summary
    assert summary["val_ppl_final"] == evaluations[-1]["val_ppl"]
    assert summary["val_ppl_best"] == min(summary["val_ppl_start"], *(e["val_ppl"] for e in evaluations))
    assert summary["tokens"] == sum(record["num_target_tokens"] for record in steps)
    assert all(r["loss"] == pytest.approx(_weighted(r, finished), rel=1e-9) for r in steps)


def _weighted(record, run):
    loss = read_json(run.folder / "config.json")["loss"]
    return loss["alpha_ce"] * record["ce_loss"] + loss["alpha_kd"] * record["kd_loss"]


def test_the_saved_student_is_the_trained_one(finished):
    saved, trained = _student(finished.folder / "student"), finished.models.student.eval()
    ids = torch.arange(5, 25)[None]
    assert finished.summary["best_step"] == 3
    with torch.no_grad():
        assert torch.equal(saved(input_ids=ids).logits, trained(input_ids=ids).logits)


def test_the_saved_tokenizer_is_the_students(finished, inputs, sp_tokenizer):
    saved, given = ([read_json(folder / "student" / f"{name}.json") for name in ("tokenizer", "tokenizer_config")]
                    for folder in (finished.folder, inputs))  # fmt: skip
    for entry in ("is_local", "local_files_only"):  # of transformers, about where it was loaded from
        del saved[1][entry]
    assert saved == given
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished.folder / "student")
    text = "The loss scale, na\u00efve \U0001f600\n\n  code()"
    assert tokenizer.encode(text, add_special_tokens=False) == sp_tokenizer.encode(text, add_special_tokens=False)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_the_reported_perplexity_is_that_of_the_saved_student(finished, inputs):
    _, held_out = load_documents(DataConfig(train_file=(str(inputs / "text.txt"),)))
    corpus = build_dataset(held_out, finished.models.tokenizers, *finished.models.block_limits(32))
    precision = Precision(CPU, torch.float32, 1.0)
    saved = _student(finished.folder / "student")
    found = evaluate(saved, corpus.token_batches("student", 1), corpus.text.num_bytes, precision)
    assert found.perplexity == pytest.approx(finished.summary["val_ppl_best"], rel=1e-6)
    assert found.bits_per_byte == pytest.approx(finished.summary["val_bits_per_byte_best"], rel=1e-6)


def test_lines_are_plain_where_stdout_is_no_terminal(finished):
    assert "\r" not in finished.out
    assert "\x1b" not in finished.out


def test_steps_and_evaluations_are_printed_in_this_form(finished):
    lines = finished.out.splitlines()
    number = r"\d+\.\d{4}"
    step = re.compile(
        rf"Step (\d+): avg_loss={number} \(kd={number}, ce={number}\) lr=\d\.\de-\d\d grad_norm=\d+\.\d\d "
        r"success_rate=\d+% [\d,]+ tokens/s \d+% in \d+:\d\d, \d+:\d\d left"
    )
    evaluation = re.compile(r"Step (\d+): Validation PPL = \d+\.\d\d, bits per byte \d+\.\d{4}(?: \(best so far\))?")
    assert [match[1] for line in lines if (match := step.fullmatch(line))] == ["1", "2", "3"]
    assert [match[1] for line in lines if (match := evaluation.fullmatch(line))] == ["2", "3"]


@pytest.mark.slow
def test_a_finished_run_can_be_continued_for_longer(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    code, out, _ = run_script(["--resume", "--output_dir", str(folder), "--train_steps", "4"])
    assert code == 0
    assert any("--train_steps 4" in line for line in out)
    assert read_json(folder / "summary.json")["steps"] == 4
    assert [record["step"] for record in read_metrics(folder, "step")] == [1, 2, 3, 4]


# Every kind of distillation


@pytest.mark.parametrize("teacher", ["teacher", pytest.param("equal_teacher", marks=pytest.mark.slow)])
@pytest.mark.parametrize("alignment", ["projection", "strict", "alm", "uld", "hidden"])  # auto: every other run
def test_a_run_of_each_alignment_finishes_and_learns(inputs, tmp_path, teacher, alignment):
    more = ("--teacher_model", inputs / teacher, "--alignment", alignment, "--alpha_kd", 0.5, "--alpha_ce", 0.5)
    code, _, err = run_script(argv_of(inputs, tmp_path / "run", *more, "--eval_steps", 100, "--student_lr", 3e-3))
    assert (code, err) == (0, [])
    summary, steps = read_json(tmp_path / "run" / "summary.json"), read_metrics(tmp_path / "run", "step")
    assert summary["applied"] == 3
    assert summary["val_ppl_final"] < 0.99 * summary["val_ppl_start"]
    assert all(0 < record["kd_loss"] < math.inf for record in steps)
    assert {record["teacher_rows_dropped"] for record in steps} == {0}


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["reverse", "jsd"])
def test_a_run_of_each_direction_finishes_and_learns(inputs, tmp_path, direction):
    more = ("--kd_direction", direction, "--alpha_kd", 0.5, "--alpha_ce", 0.5, "--teacher_top_k", 50)
    code, _, err = run_script(argv_of(inputs, tmp_path / "run", *more, "--student_lr", 3e-3, steps=3))
    assert (code, err) == (0, [])
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["val_ppl_final"] < 0.99 * summary["val_ppl_start"]


# Resuming


@pytest.mark.parametrize(
    ("rate", "after", "is_before"), [(1e-3, 3, False), (1.0, 5, True)], ids=["best_at_the_end", "best_before"]
)
@pytest.mark.slow
def test_a_resumed_run_equals_one_never_interrupted(inputs, tmp_path, monkeypatch, rate, after, is_before):
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    more = ("--student_lr", rate, "--skip_grad_norm", 1e6, "--loss_clamp_style", "off")
    assert run_script(argv_of(inputs, straight, *more, steps=6))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", interrupting(trainer.train_step, after))
        assert run_script(argv_of(inputs, halved, *more, steps=6))[0] == 130
    assert read_json(halved / "summary.json")["status"] == "interrupted"
    with open(halved / "metrics.jsonl", "a") as file:  # what a kill after the checkpoint would have left
        file.write('{"event": "step", "step": 6}\n{"event": "st')
    torch.manual_seed(99)
    assert run_script(["--resume", "--output_dir", str(halved)])[0] == 0
    assert_equal_runs(straight, halved)
    assert (read_json(halved / "summary.json")["best_step"] < after) == is_before


@pytest.mark.slow
def test_a_resumed_run_has_the_projection_of_hidden_states_bit_for_bit(inputs, tmp_path, monkeypatch):
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    more = ("--alignment", "hidden", "--alpha_kd", 0.5, "--alpha_ce", 0.5, "--eval_steps", 100)
    assert run_script(argv_of(inputs, straight, *more, steps=4))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", interrupting(trainer.train_step, 2))
        assert run_script(argv_of(inputs, halved, *more, steps=4))[0] == 130
    (before,) = _objective_state(halved)
    torch.manual_seed(99)
    assert run_script(["--resume", "--output_dir", str(halved)])[0] == 0
    (after,) = _objective_state(halved)
    assert before.shape == after.shape == (32, 32)
    assert not torch.equal(before, after)
    assert_equal_runs(straight, halved)


def _objective_state(folder):
    """Every tensor that the objective has learned."""
    return list(torch.load(latest_checkpoint(folder) / "state.pt", weights_only=True)["objective"].values())


def test_a_run_without_a_checkpoint_cannot_be_resumed(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint")
    assert_refused(["--resume", "--output_dir", folder, "--train_steps", 4], "--resume", "no checkpoint")


def test_a_checkpoint_that_cannot_be_read_is_named(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    (latest_checkpoint(folder) / "student.safetensors").write_bytes(b"torn")
    assert_refused(["--resume", "--output_dir", folder, "--train_steps", 4], "--resume", str(latest_checkpoint(folder)))


@pytest.mark.slow
def test_overwrite_starts_again(finished, inputs, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    assert run_script(argv_of(inputs, folder, "--overwrite", steps=1))[0] == 0
    assert [record["step"] for record in read_metrics(folder, "step")] == [1]


# Signals, in a process of their own


@pytest.mark.parametrize(
    ("script", "number"),
    [
        pytest.param(SCRIPTS[0], signal.SIGINT, id="SIGINT"),
        pytest.param(SCRIPTS[1], signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_exits_130(inputs, tmp_path, script, number):
    process = _start(script, argv_of(inputs, tmp_path / "run", "--eval_steps", 100000, steps=100000))
    for line in process.stdout:
        if line.startswith("Step 2:"):
            break
    process.send_signal(number)
    code, out, err = _finish(process)
    assert code == 130
    assert err.startswith({signal.SIGINT: "Ctrl-C: ", signal.SIGTERM: "SIGTERM: "}[number])
    assert (err.count("\n"), "\r" in out) == (1, False)
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["status"] == "interrupted"
    assert summary["steps"] >= 2
    assert read_json(latest_checkpoint(tmp_path / "run") / "progress.json")["progress"]["step"] == summary["steps"]
    assert len(read_metrics(tmp_path / "run", "step")) == summary["steps"]
    _student(tmp_path / "run" / "student")


def _start(script, argv):
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{script}.py"), *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def _finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.slow
def test_a_script_that_is_done_exits_0_and_prints_nothing_on_stderr(inputs, tmp_path):
    code, out, err = _finish(_start("train_sar_kd_fp16_safe", argv_of(inputs, tmp_path / "run", steps=1)))
    assert (code, err) == (0, "")
    assert out.startswith("Distilling ")


@pytest.mark.slow
def test_a_script_that_is_misused_exits_2_with_one_line(inputs, tmp_path):
    argv = argv_of(inputs, tmp_path / "run", "--student_model", "./nowhere")
    code, _, err = _finish(_start("train_sar_kd_stable", argv))
    assert (code, err) == (2, "error: --student_model ./nowhere: no such directory\n")


def test_an_impatient_second_signal_exits_130_too(capsys):
    def interrupted(argv):
        with StopRequest():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    assert main.run(interrupted) == 130
    assert capsys.readouterr().err.count("\n") == 1  # without a loop to end, a request says nothing
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.2, 1.0, 2.5, 4.0])
def test_ctrl_c_before_the_first_step_is_one_line_and_leaves_nothing(inputs, tmp_path, seconds):
    process = _start("train_sar_kd_stable", argv_of(inputs, tmp_path / "runs" / "run", steps=100000))
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    code, _, err = _finish(process)
    assert (code, err.count("\n")) == (130, 1) or (seconds < 1 and code in (1, -signal.SIGINT))  # Python itself starts
    if err.startswith("interrupted at once"):
        assert not list((tmp_path / "runs").glob("*/.lock*"))
    else:
        assert seconds < 1 or err.startswith("Ctrl-C: ")


# Emergency stop


def _going_bad(train_step, bad_steps, is_bad=lambda ids, micro_batches: True):
    """train_step, but in `bad_steps` a product of the student overflows in half precision (and only there)."""
    calls, context = [], {}

    def remember(module, inputs):
        context["ids"] = inputs[0]

    def overflow(module, inputs, output):
        if output.dtype is torch.float16 and is_bad(context["ids"], context["micro_batches"]):
            return output * math.inf
        return output

    def going_bad(micro_batches, step_context):
        calls.append(1)
        context["micro_batches"] = micro_batches
        if len(calls) in bad_steps:
            student = step_context.objective.student
            context["handles"] = context.get("handles") or [
                student.get_input_embeddings().register_forward_pre_hook(remember),
                student.model.layers[0].self_attn.o_proj.register_forward_hook(overflow),
            ]
        else:
            for handle in context.pop("handles", ()):
                handle.remove()
        return train_step(micro_batches, step_context)

    return going_bad


@pytest.fixture(scope="module")
def stopped(inputs, tmp_path_factory):
    """A run with a student that float16 cannot hold, without the check that refuses it before its first step."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_check_first_steps", lambda self: None)
        code, out, err = run_script(argv_of(inputs, folder, student="loud", steps=100))
    return SimpleNamespace(folder=folder, code=code, out=out, err=err, crash=read_json(folder / "crash" / "crash.json"))


def test_a_student_that_float16_cannot_hold_is_refused_with_its_module(inputs, tmp_path):
    code, _, (line,) = run_script(argv_of(inputs, tmp_path / "run", student="loud", steps=100))
    assert code == 2
    assert line.startswith(f"error: --student_model {inputs / 'loud'}: its logits are not finite at")
    assert all(part in line for part in ("down_proj", "float16 ends at 65504", "--model_dtype float32"))
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_ten_bad_batches_in_a_row_stop_the_run_with_3(stopped):
    assert stopped.code == 3
    summary = read_json(stopped.folder / "summary.json")
    assert (summary["status"], summary["steps"], summary["skipped"]["forward"]) == ("emergency_stop", 10, 10)
    assert summary["nan_batches_max_consecutive"] == 10


def test_the_stop_is_printed_in_one_line_with_cause_and_remedy(stopped):
    (line,) = stopped.err
    parts = ("10 consecutive", "cause: forward", "down_proj", "float16", "--model_dtype float32", "crash.md")
    assert all(part in line for part in parts)


def test_the_crash_report_names_cause_document_module_and_remedy(stopped):
    crash = stopped.crash
    assert (crash["cause"], crash["verdict"], crash["step"]) == ("forward", "fp16 range", 10)
    assert crash["documents"] == ["text.txt"]
    assert crash["first_bad_module"]["name"] == "model.layers.0.mlp.down_proj"
    # Its weights are beyond float16's range; the product of a gated layer is brought back to float32 behind it.
    assert crash["first_bad_module"]["output_dtype"] == "float32"
    assert (crash["finite_in_run_dtype"], crash["finite_in_float32"]) == (False, True)
    assert "--model_dtype float32" in crash["remedy"]


def test_no_step_is_validated_twice(stopped):
    assert [record["step"] for record in read_metrics(stopped.folder, "evaluation")] == [2, 4, 6, 8, 10]


def test_the_crash_keeps_the_batch(stopped):
    batch = read_weights(stopped.folder / "crash" / "batch.safetensors")
    assert batch["input_ids"].shape == batch["labels"].shape
    assert batch["input_ids"].dtype is torch.int64


def test_every_file_of_a_stopped_run_is_strict_json(stopped):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    texts = [(stopped.folder / "crash" / "crash.json").read_text(), (stopped.folder / "summary.json").read_text()]
    for text in [*texts, *(stopped.folder / "metrics.jsonl").read_text().splitlines()]:
        json.loads(text, parse_constant=refuse)


@pytest.mark.slow
def test_nine_bad_batches_do_not_stop_and_a_good_one_forgives_them(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "train_step", _going_bad(trainer.train_step, {*range(2, 11), 12}))
    code, out, _ = run_script(argv_of(inputs, tmp_path / "run", steps=12))
    summary = read_json(tmp_path / "run" / "summary.json")
    assert code == 0
    assert (summary["applied"], summary["skipped"]["forward"]) == (2, 10)
    assert summary["nan_batches_max_consecutive"] == 9
    page = (tmp_path / "run" / "crash" / "crash.md").read_text()
    assert page.startswith("# Step 2: the forward is not finite")
    assert "the run went on" in page
    assert "Step 2: skipped (forward)" in out


def test_an_emergency_stop_leaves_the_last_good_weights(inputs, tmp_path, monkeypatch):
    good, bad = tmp_path / "good", tmp_path / "bad"
    more = ("--lr_schedule", "constant")
    assert run_script(argv_of(inputs, good, *more, steps=2))[0] == 0
    monkeypatch.setattr(trainer, "train_step", _going_bad(trainer.train_step, range(3, 100)))
    assert run_script(argv_of(inputs, bad, *more, steps=50))[0] == 3
    weights = read_weights(latest_checkpoint(good) / "student.safetensors")
    assert equal_weights(read_weights(latest_checkpoint(bad) / "student.safetensors"), weights)
    assert equal_weights(
        read_weights(bad / "student" / "model.safetensors"), read_weights(good / "student" / "model.safetensors")
    )
    assert read_json(bad / "summary.json")["best_step"] == 2


@pytest.mark.slow
def test_the_report_is_about_the_micro_batch_that_was_bad(inputs, tmp_path, monkeypatch):
    seen = []

    def first_only(ids, micro_batches):
        seen.append(micro_batches[0].student.input_ids)
        return torch.equal(ids, micro_batches[0].student.input_ids)

    monkeypatch.setattr(trainer, "train_step", _going_bad(trainer.train_step, range(1, 100), first_only))
    assert run_script(argv_of(inputs, tmp_path / "run", steps=50))[0] == 3
    crash = read_json(tmp_path / "run" / "crash" / "crash.json")
    assert (crash["cause"], crash["verdict"]) == ("forward", "fp16 range")
    assert torch.equal(read_weights(tmp_path / "run" / "crash" / "batch.safetensors")["input_ids"], seen[-1])


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("--student_model", "./nowhere", "no such directory"),
        ("--teacher_model", "/nowhere/at/all", "no such directory"),
        ("--train_file", "missing.txt", "No such file"),
        ("--train_file", "text.pdf", "No such file"),
        ("--block_size", "512", "takes 256 tokens at most"),
        ("--temprature", "2", "no such option; did you mean --temperature?"),
        ("--temperature", "0", "above 0"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_exit_code_2(inputs, tmp_path, option, value, remedy):
    assert_refused(argv_of(inputs, tmp_path / "run", option, value), option, remedy)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_no_model_is_refused(inputs, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(
        argv_of(inputs, tmp_path / "run", "--student_model", tmp_path / "empty"), "--student_model", "cannot be loaded"
    )


def test_a_folder_in_use_is_refused_and_kept(finished, inputs):
    before = (finished.folder / "metrics.jsonl").read_text()
    assert_refused(argv_of(inputs, finished.folder), "--output_dir", "--resume", "--overwrite")
    assert (finished.folder / "metrics.jsonl").read_text() == before


def test_a_folder_of_something_else_is_refused_and_kept(inputs, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    assert_refused(argv_of(inputs, tmp_path, "--overwrite"), "--output_dir", "not empty")
    assert (tmp_path / "thesis.tex").exists()


def test_a_file_as_run_folder_is_refused(inputs, tmp_path):
    (tmp_path / "run").write_text("x")
    assert_refused(argv_of(inputs, tmp_path / "run"), "--output_dir")


def test_a_refused_start_leaves_the_run_it_was_to_overwrite(finished, inputs, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    assert_refused(argv_of(inputs, folder, "--overwrite", "--teacher_model", "./nowhere"), "--teacher_model")
    assert (folder / "student" / "model.safetensors").exists()


def test_a_hard_clamp_on_a_fresh_student_is_refused_with_the_numbers(inputs, tmp_path):
    argv = argv_of(inputs, tmp_path / "run", "--loss_clamp_style", "hard", "--loss_clamp", 5)
    assert_refused(argv, "--loss_clamp_style hard", "ln V = 6.25", "--loss_clamp 5", "--force")


@pytest.mark.slow
def test_force_trains_under_a_hard_clamp_and_shows_it(inputs, tmp_path):
    more = ("--loss_clamp_style", "hard", "--loss_clamp", 5, "--force")
    code, out, _ = run_script(argv_of(inputs, tmp_path / "run", *more, steps=1))
    assert code == 0
    assert any(line.startswith("Forced: --loss_clamp_style hard") for line in out)


@pytest.mark.slow
def test_a_skipped_document_is_named(inputs, tmp_path, corpus_texts):
    examples = [json.dumps({"text": "\n".join(corpus_texts)}), r'{"text": "half a pair \ud800 here"}']
    (tmp_path / "examples.jsonl").write_text("\n".join(examples))
    (tmp_path / "held_out.txt").write_text("\n".join(corpus_texts[:9]))
    more = ("--train_file", tmp_path / "examples.jsonl", "--validation_file", tmp_path / "held_out.txt")
    code, out, _ = run_script(argv_of(inputs, tmp_path / "run", *more, steps=1))
    assert code == 0
    assert any("examples.jsonl:2" in line for line in out)


# Lines about failures, and what is saved


def test_running_out_of_gpu_memory_is_one_line_with_the_remedy(capsys):
    def too_large(argv):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    assert main.run(too_large) == main.USAGE
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--per_device_batch_size" in error


def test_the_saved_student_generates_and_ends_where_its_tokenizer_ends(finished, sp_tokenizer):
    config = transformers.GenerationConfig.from_pretrained(finished.folder / "student")
    assert (config.eos_token_id, config.pad_token_id) == (2, sp_tokenizer.eos_token_id)
    pipe = transformers.pipeline("text-generation", model=str(finished.folder / "student"))
    (generated,) = pipe("The loss scale", max_new_tokens=5)
    assert generated["generated_text"].startswith("The loss scale")


def test_the_card_beside_the_student_has_the_summarys_metrics(finished):
    card, summary = (finished.folder / "student" / "README.md").read_text(), finished.summary
    best = f"| student, this one (step 3) | {summary['val_ppl_best']:.2f} | {summary['val_bits_per_byte_best']:.4f} |"
    assert best in card
    assert f"| teacher | {summary['teacher_val_ppl']:.2f} |" in card


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "x"), KeyboardInterrupt()])
def test_only_a_command_that_can_be_resumed_names_resume(capsys, monkeypatch, error):
    def fail(argv):
        raise error

    monkeypatch.setattr(audit, "main", fail)
    codes = main.run(fail), main.main(["audit"])
    lines = capsys.readouterr().err.splitlines()
    assert codes == (main.USAGE, main.USAGE) if isinstance(error, OSError) else (main.INTERRUPTED, main.INTERRUPTED)
    is_interrupt = isinstance(error, KeyboardInterrupt)  # an error names it with the folder, of which there is none
    assert ["--resume" in line for line in lines] == [is_interrupt, False]
