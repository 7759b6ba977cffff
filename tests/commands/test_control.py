"""`--control`: the same student, start and batches by cross-entropy alone; and what the run then shows."""

import json
import shutil

import pytest
import torch
import transformers

import sar_kd
from sar_kd import UsageError
from sar_kd.config.command_line import parse
from sar_kd.config.presets import STABLE
from sar_kd.reporting.held_out import read_held_out
from sar_kd.reporting.history import read_history
from sar_kd.reporting.model_card import build_model_card
from sar_kd.reporting.run_log import RunLog
from sar_kd.runtime.distributed import ProcessGroup
from sar_kd.training import trainer
from tests.helpers.runs import (
    argv_of,
    assert_equal_runs,
    assert_refused,
    equal_weights,
    inputs,
    interrupting,
    read_json,
    read_metrics,
    read_weights,
    run_script,
    untimed,
)

__all__ = ["inputs"]  # a fixture
WEIGHTS = "student/model.safetensors"


@pytest.fixture(scope="module")
def texts(inputs, corpus_texts):
    """Training and held-out text of many documents."""
    for name, count in (("train", 60), ("held_out", 24)):
        documents = [f"{name} {i}: {corpus_texts[i % len(corpus_texts)]}" for i in range(count)]
        (inputs / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return inputs


def _argv(texts, folder, *more, steps=3):
    argv = argv_of(texts, folder, "--validation_file", texts / "held_out.jsonl", *more, steps=steps, text="train.jsonl")
    return argv[: argv.index("--routing")] + argv[argv.index("--routing") + 2 :]  # native by default


def _control(folder):
    return folder.with_name(f"{folder.name}-control")


def _recording(calls):
    """train_step, with the student's weights and the blocks and targets of each call noted."""
    train_step = trainer.train_step

    def recording(micro_batches, context):
        weights = {name: value.detach().clone() for name, value in context.objective.student.state_dict().items()}
        texts = [batch.student.targets.tolist() for batch in micro_batches]
        calls.append((context.objective.alpha_kd, context.objective.alpha_ce, weights, texts))
        return train_step(micro_batches, context)

    return recording


@pytest.fixture(scope="module")
def done(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    code, out, err = run_script(_argv(texts, folder, "--control"))
    assert (code, err) == (0, [])
    return folder, out


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--lora_rank", 2, "--lora_dropout", 0.1),
        ("--routing", "ka", "--ka_passes", 2),
        ("--routing", "sar"),
        ("--alpha_ce", 0, "--alpha_kd", 2, "--alignment", "hidden"),
        ("--mode", "ultra-conservative", "--per_device_batch_size", 1),
    ],
    ids=lambda more: " ".join(map(str, more[:2])) or "plain",
)
@pytest.mark.slow
def test_start_and_batches_are_those_of_the_run_and_only_the_loss_is_another(texts, tmp_path, monkeypatch, more):
    calls = []
    monkeypatch.setattr(trainer, "train_step", _recording(calls))
    code, _, err = run_script(_argv(texts, tmp_path / "run", "--control", *more))
    assert (code, err) == (0, [])
    own, control = calls[:3], calls[3:]
    assert len(control) == 3
    assert equal_weights(own[0][2], control[0][2])
    assert [call[3] for call in own] == [call[3] for call in control]
    assert all(call[0] > 0 for call in own)
    assert all(call[:2] == (0.0, 1.0) for call in control)
    assert not equal_weights(own[2][2], control[2][2])


@pytest.mark.slow
def test_on_policy_text_is_the_datasets_own_in_the_control(texts, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(trainer, "train_step", _recording(calls))
    more = ("--on_policy_fraction", 1, "--max_new_tokens", 4, "--alignment", "alm", "--alpha_kd", 1)
    assert run_script(_argv(texts, tmp_path / "run", "--control", *more))[0] == 0
    on_policy = calls[3:]
    calls.clear()
    assert run_script(_argv(texts, tmp_path / "plain"))[0] == 0
    assert [call[3] for call in calls] == [call[3] for call in on_policy]


@pytest.mark.slow
def test_the_control_is_the_run_that_alpha_kd_0_makes(done, texts, tmp_path):
    folder, _ = done
    assert run_script(_argv(texts, tmp_path / "alone", "--alpha_kd", 0, "--alpha_ce", 1))[0] == 0
    assert equal_weights(*(read_weights(run / WEIGHTS) for run in (_control(folder), tmp_path / "alone")))
    for name in ("best", "start"):
        a, b = (read_held_out(run).nats[name] for run in (_control(folder), tmp_path / "alone"))
        assert a.tolist() == b.tolist()


@pytest.mark.slow
def test_a_run_that_does_not_ask_for_it_is_as_it_was(done, texts, tmp_path):
    folder, _ = done
    code, out, err = run_script(_argv(texts, tmp_path / "plain"))
    assert (code, err) == (0, [])
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    assert not any("control" in line.lower() for line in out)
    assert equal_weights(*(read_weights(run / WEIGHTS) for run in (folder, tmp_path / "plain")))
    summaries = [untimed(read_json(run / "summary.json")) for run in (folder, tmp_path / "plain")]
    assert read_held_out(tmp_path / "plain").words is None
    added = {"control", "comparison"}
    assert {name: value for name, value in summaries[0].items() if name not in added} == summaries[1]


def test_table_summary_page_and_card_show_start_control_distilled_and_teacher(done):
    folder, out = done
    summary, control = (read_json(run / "summary.json") for run in (folder, _control(folder)))
    entry = summary["control"]
    assert (entry["status"], entry["steps"], entry["folder"]) == ("finished", 3, str(_control(folder)))
    assert entry["val_bits_per_byte_best"] == control["val_bits_per_byte_best"]
    assert entry["val_bits_per_byte_start"] == summary["val_bits_per_byte_start"]
    assert sum(line.startswith("  student, start") for line in out) == 1  # the table, once
    assert any(line.endswith("; its control is trained now, then come the results") for line in out)
    start = max(i for i, line in enumerate(out) if line.startswith("Finished after"))
    rows = {line[:30].strip(): line.split() for line in out[start + 2 :] if line.startswith("  ")}
    assert rows["student, start"][-1] == f"{summary['val_bits_per_byte_start']:.4f}"
    assert rows[f"control, best (step {entry['best_step']})"][-1] == f"{entry['val_bits_per_byte_best']:.4f}"
    assert rows["teacher"][-1] == f"{summary['teacher_val_bits_per_byte']:.4f}"
    (line,) = [line for line in out if line.startswith("  control: ")]
    assert f"in {_control(folder)}; 3 steps in " in line
    verdict = summary["comparison"]["sentences"][0]
    assert "24 documents" in verdict
    assert out[out.index("", start) + 1] == verdict  # the first sentence behind the table
    assert verdict in (folder / "log.txt").read_text(encoding="utf-8")
    run = read_history(folder)
    for page in ((folder / "student" / "README.md").read_text(), build_model_card(run)):
        assert verdict in page
        assert f"| control: cross-entropy alone (step {entry['best_step']}) |" in page
    if (folder / "report.html").exists():
        page = (folder / "report.html").read_text()
        assert page.index(verdict.replace("+", "+")) < page.index("Finished: 3 steps.")
        for name in ("<td>start", "control: cross-entropy alone", "distilled (step", "<td>teacher"):
            assert name in page
    assert "distilled from" not in (_control(folder) / "student" / "README.md").read_text()


def test_what_a_run_keeps_of_each_document_makes_its_totals(done):
    folder, _ = done
    found, summary = read_held_out(folder), read_json(folder / "summary.json")
    assert set(found.nats) == {"start", "best", "final", "teacher"}
    size = found.num_bytes.sum() * torch.tensor(2.0).log().item()
    names = {"start": "val_bits_per_byte_start", "best": "val_bits_per_byte_best", "final": "val_bits_per_byte_final",
             "teacher": "teacher_val_bits_per_byte"}  # fmt: skip
    for model, name in names.items():
        assert found.nats[model].sum() / size == pytest.approx(summary[name], rel=1e-7)
    assert len(found.names) == 24
    words = found.words
    assert set(words.nats) == {"start", "best", "teacher"}
    assert words.num_bytes == found.num_bytes.sum() + 24  # a stop token counts one
    assert words.counts[words.words.index("(end of text)")] == 24
    for model, values in words.nats.items():
        assert 0.3 * found.nats[model].sum() < values.sum() < found.nats[model].sum()  # the rest is of rare words
    assert read_held_out(_control(folder)).words.counts.tolist() == words.counts.tolist()


# Stopping and resuming


def test_a_start_that_is_refused_is_refused_on_every_rank(texts, tmp_path, monkeypatch):
    """What rank 0 raises alone would leave the others waiting for it."""
    inside, seen = [], []
    on_rank_zero, log_start = ProcessGroup.on_rank_zero, RunLog.log_start

    def entered(group, act):
        inside.append(1)
        try:
            return on_rank_zero(group, act)
        finally:
            inside.pop()

    monkeypatch.setattr(ProcessGroup, "on_rank_zero", entered)
    monkeypatch.setattr(RunLog, "log_start", lambda *args: (seen.append(bool(inside)), log_start(*args))[1])
    assert run_script(_argv(texts, tmp_path / "run", steps=1))[0] == 0
    assert seen == [True]


@pytest.mark.parametrize("after", [2, 5], ids=["in_the_run", "in_the_control"])
@pytest.mark.slow
def test_a_resumed_run_goes_on_to_its_control_and_ends_as_without_the_interruption(done, texts, tmp_path, after):
    folder, _ = done
    argv = _argv(texts, tmp_path / "run", "--control")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", interrupting(trainer.train_step, after))
        code, out, err = run_script(argv)
    assert (code, len(err)) == (130, 0)
    assert any(line.startswith(f"Next: continue with the same command and --resume --output_dir {tmp_path / 'run'}")
               for line in out)  # fmt: skip
    assert _control(tmp_path / "run").exists() == (after == 5)
    if after == 5:
        assert any("interrupted after 2 steps in" in line for line in out)
        assert read_json(tmp_path / "run" / "summary.json")["control"]["status"] == "interrupted"
    code, _, err = run_script([*argv, "--resume"])
    assert (code, err) == (0, [])
    summaries = []
    for run in (folder, tmp_path / "run"):
        summary = untimed(read_json(run / "summary.json"))
        assert summary["control"].pop("folder") == str(_control(run))
        summaries.append(summary)
    assert summaries[0] == summaries[1]
    assert_equal_runs(_control(folder), _control(tmp_path / "run"))
    assert equal_weights(*(read_weights(run / WEIGHTS) for run in (folder, tmp_path / "run")))


@pytest.mark.slow
def test_a_finished_run_gets_a_control_by_resuming_it(done, texts, tmp_path):
    folder, _ = done
    assert run_script(_argv(texts, tmp_path / "run"))[0] == 0
    before = read_metrics(tmp_path / "run")
    assert run_script(["--resume", "--control", "--output_dir", str(tmp_path / "run")])[0] == 0
    assert untimed(read_metrics(tmp_path / "run")) == untimed(before)
    a, b = (read_json(run / "summary.json")["comparison"] for run in (folder, tmp_path / "run"))
    assert a == b


@pytest.mark.slow
def test_losses_of_a_text_that_was_changed_are_not_mixed_with_those_of_the_new_one(texts, tmp_path):
    argv = _argv(texts, tmp_path / "run")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text((texts / "held_out.jsonl").read_text())
    argv[argv.index("--validation_file") + 1] = str(held_out)
    assert run_script(argv)[0] == 0
    held_out.write_text("".join(held_out.read_text().splitlines(keepends=True)[:21]))
    resumed = ["--resume", "--allow_changed_inputs", "--output_dir", str(tmp_path / "run"), "--train_steps", "5"]
    assert run_script(resumed)[0] == 0
    found = read_held_out(tmp_path / "run")
    assert len(found.names) == 21
    assert "start" not in found.nats
    code, _, (line,) = run_script([*resumed, "--control"])
    assert code == 2
    assert line.endswith("so there can be no control; put back what was there")


def test_a_control_that_is_there_is_neither_taken_nor_overwritten_unasked(done, texts, tmp_path):
    _control(tmp_path / "run").mkdir()
    (_control(tmp_path / "run") / "config.json").write_text('{"mode": "balanced"}')
    argv = _argv(texts, tmp_path / "run", "--control")
    assert_refused(argv, "the control goes to", "which holds a run; --overwrite deletes both")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_student_that_is_its_own_teacher_has_a_control(texts, tmp_path):
    own = ["--teacher_model", "self", "--lora_rank", "2", "--control"]
    code, _, err = run_script(_argv(texts, tmp_path / "run", *own))
    assert (code, err) == (0, [])
    assert read_json(tmp_path / "run" / "summary.json")["control"]["status"] == "finished"


@pytest.mark.slow
def test_the_control_of_an_overwritten_run_does_not_stay_for_the_new_one(done, texts, tmp_path, monkeypatch):
    folder, _ = done
    for source, target in ((folder, tmp_path / "run"), (_control(folder), _control(tmp_path / "run"))):
        shutil.copytree(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", interrupting(trainer.train_step, 1))
        assert run_script(_argv(texts, tmp_path / "run", "--control", "--overwrite", steps=2))[0] == 130
    assert not (_control(tmp_path / "run") / "checkpoint").exists()
    assert run_script(["--resume", "--output_dir", str(tmp_path / "run")])[0] == 0
    assert read_json(tmp_path / "run" / "summary.json")["control"]["steps"] == 2


@pytest.mark.slow
def test_an_emergency_stop_of_the_control_leaves_the_run_its_result(texts, tmp_path, monkeypatch):
    train_step, calls = trainer.train_step, []

    def failing(micro_batches, context):
        calls.append(1)
        if len(calls) > 3:
            for parameter in context.objective.student.parameters():
                parameter.data.fill_(torch.nan)
        return train_step(micro_batches, context)

    monkeypatch.setattr(trainer, "train_step", failing)
    code, out, err = run_script(_argv(texts, tmp_path / "run", "--control", "--max_nan_batches", 2))
    assert (code, err) == (0, [])
    summary = read_json(tmp_path / "run" / "summary.json")
    assert (summary["status"], summary["control"]["status"]) == ("finished", "emergency_stop")
    assert "comparison" not in summary
    assert any(line.startswith("  control: emergency stop after 2 consecutive NaN batches") for line in out)


# Options, and Python


def test_a_run_by_cross_entropy_alone_takes_no_control():
    with pytest.raises(UsageError, match=r"--control: --alpha_kd is 0"):
        parse(STABLE, ["--control", "--alpha_kd", "0"])
    assert not parse(STABLE, []).has_control
    assert parse(STABLE, ["--control"]).has_control
    task = ["--task", "units"]
    assert parse(STABLE, task).has_control
    assert not parse(STABLE, [*task, "--alpha_kd", "0"]).has_control
    assert not parse(STABLE, [*task, "--skip_baseline"]).has_control
    notices = parse(STABLE, [*task, "--skip_baseline", "--control"]).notices
    assert "--skip_baseline: has no effect beside --control" in notices


@pytest.mark.slow
def test_a_student_in_memory_begins_its_control_as_it_was(texts, tmp_path):
    def given():
        tokenizer = transformers.AutoTokenizer.from_pretrained(texts / "student")
        return transformers.AutoModelForCausalLM.from_pretrained(texts / "student"), tokenizer

    how = {
        "texts": texts / "train.jsonl", "validation_texts": texts / "held_out.jsonl", "block_size": 32, "quiet": True,
        "train_steps": 2, "per_device_batch_size": 2, "student_lr": 1e-2, "warmup_steps": 0, "model_dtype": "float32",
        "output_dir": tmp_path / "run",
    }  # fmt: skip
    events = []
    result = sar_kd.distill(
        texts / "teacher", given(), control=True, callback=lambda record: events.append(record["event"]), **how
    )
    control = result.summary["control"]
    assert control["val_bits_per_byte_start"] == result.summary["val_bits_per_byte_start"]
    assert events.count("start") == events.count("end") == 1
    assert result.summary["comparison"]["documents"] == 24
    shutil.rmtree(_control(tmp_path / "run"))  # it is to be made again
    other = given()
    other[0].lm_head.weight.data.mul_(3.0)
    with pytest.raises(UsageError, match="so there can be no control"):
        sar_kd.distill(student=other, resume=True, output_dir=tmp_path / "run")
