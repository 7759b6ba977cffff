"""A teacher or a student that is not finite: refused before the first step, and counted where it is in parts."""

import json
import math

import pytest
import torch

from sar_kd.errors import TrainingDiverged, UsageError
from sar_kd.reporting.history import findings_of, read_history
from sar_kd.reporting.log_diagnosis import diagnose, read_log
from sar_kd.training import trainer as trainer_module
from tests.stress.test_recovery import make_trainer, texts

__all__ = ["make_trainer", "texts"]  # fixtures


def _metrics(folder, event):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == event]


def _loud(module):
    """The module's product leaves float16's range, and only in half."""
    return module.register_forward_hook(lambda m, i, o: o * math.inf if o.dtype is torch.float16 else o)


def _break_share(model, share):
    """About this share of the blocks is not finite, by a hash of their first tokens."""

    def hook(module, inputs, output):
        is_bad = inputs[0][:, :8].sum(1) * 7919 % 100 < 100 * share
        return output.masked_fill(is_bad[:, None, None], math.nan)

    return model.get_input_embeddings().register_forward_hook(hook)


def _breaking(monkeypatch, model, bad_steps):
    """In these steps every output of the model's first block is NaN."""
    step, calls = trainer_module.train_step, []
    spoil = {"on": False}
    model.model.layers[0].mlp.register_forward_hook(lambda m, i, o: o * math.nan if spoil["on"] else o)

    def breaking(*args):
        calls.append(1)
        spoil["on"] = len(calls) in bad_steps
        report = step(*args)
        spoil["on"] = spoil["on"] and len(calls) == max(bad_steps)  # the replay of the last one finds it
        return report

    monkeypatch.setattr(trainer_module, "train_step", breaking)


def test_a_teacher_that_is_not_finite_ends_the_run_before_the_first_step(make_trainer, tmp_path):
    trainer = make_trainer()
    _loud(trainer.models.teacher.model.layers[0].mlp.down_proj)
    weights = [p.detach().clone() for p in trainer.models.student.parameters()]
    with pytest.raises(UsageError) as error:
        trainer.run()
    line = str(error.value)
    assert line.startswith(
        "--teacher_model embedded: its logits are not finite at 100.0% of the held-out text in float16."
    )
    assert "model.layers.0.mlp.down_proj (Linear)" in line
    assert "--model_dtype float32" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.models.student.parameters(), strict=True))


def test_a_teacher_that_is_not_finite_in_most_of_the_text_ends_it_too(make_trainer):
    trainer = make_trainer()
    _break_share(trainer.models.teacher, 0.75)
    with pytest.raises(UsageError, match=r"not finite at [5-9]\d\.\d% of the held-out text"):
        trainer.run()


def test_a_teacher_that_is_not_finite_in_parts_goes_on_and_every_page_has_the_share(make_trainer, tmp_path, capsys):
    trainer = make_trainer("--log_steps", 4)
    _break_share(trainer.models.teacher, 0.3)
    summary, folder = trainer.run(), tmp_path / "run"
    out, steps = capsys.readouterr().out, _metrics(folder, "step")
    assert summary["status"] == "finished"
    assert summary["applied"] + summary["skipped"]["teacher"] == 12
    assert summary["applied"] >= 8
    assert "Warning: --teacher_model embedded: its logits are not finite at" in out
    dropped, compared = (sum(step[key] for step in steps) for key in ("teacher_rows_dropped", "teacher_positions"))
    assert 0.1 < dropped / compared < 0.6
    assert (summary["teacher_rows_dropped"], summary["teacher_positions"]) == (dropped, compared)
    assert summary["teacher_val_nonfinite"] == _metrics(folder, "start")[0]["teacher_val_nonfinite"] > 0.0
    lines = [line for line in out.splitlines() if line.startswith("Step ") and "avg_loss" in line]
    for i, line in enumerate(lines):
        of = steps[4 * i : 4 * i + 4]
        share = sum(step["teacher_rows_dropped"] for step in of) / sum(step["teacher_positions"] for step in of)
        assert f" teacher_dropped={share:.1%}" in line
    assert len(lines) == 3
    assert f"teacher left out at {dropped / compared:.1%} of its positions: its logits are not finite" in out
    assert any(f"left out at {dropped / compared:.1%} of its" in line for line in findings_of(read_history(folder)))
    assert diagnose(read_log(folder)).name == "teacher left out"


def test_nothing_is_shown_of_a_teacher_that_is_finite(make_trainer, tmp_path, capsys):
    summary = make_trainer("--log_steps", 4).run()
    assert (summary["teacher_rows_dropped"], summary["skipped"]["teacher"]) == (0, 0)
    assert summary["teacher_positions"] == summary["tokens"]  # equal tokenizers
    assert "teacher_dropped" not in capsys.readouterr().out
    assert "not finite" not in " ".join(findings_of(read_history(tmp_path / "run")))


def test_a_step_without_a_teacher_is_refused_and_explained(make_trainer, tmp_path, monkeypatch, capsys):
    trainer = make_trainer()
    _breaking(monkeypatch, trainer.models.teacher, [5])
    summary = trainer.run()
    assert (summary["status"], summary["skipped"]["teacher"], summary["applied"]) == ("finished", 1, 11)
    assert "Step 5: skipped (teacher)" in capsys.readouterr().out
    page = (tmp_path / "run" / "crash" / "crash.md").read_text()
    assert page.startswith("# Step 5: the teacher's forward is not finite")
    assert "model.layers.0.mlp" in page


def test_ten_steps_without_a_teacher_in_a_row_stop_the_run_with_its_module(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(steps=40)
    _breaking(monkeypatch, trainer.models.teacher, range(5, 15))
    with pytest.raises(TrainingDiverged, match=r"10 consecutive NaN batches \(cause: teacher") as error:
        trainer.run()
    assert "model.layers.0.mlp" in str(error.value)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["skipped"]["teacher"], summary["applied"]) == ("emergency_stop", 10, 4)
    crash = json.loads((tmp_path / "run" / "crash" / "crash.json").read_text())
    assert (crash["cause"], crash["growth"]) == ("teacher", "")
    assert crash["documents"]
    assert diagnose(read_log(tmp_path / "run")).name == "no teacher"


def test_a_teacher_that_is_measured_and_not_learned_from_does_not_end_the_run(make_trainer, capsys):
    trainer = make_trainer("--alpha_kd", 0, "--alpha_ce", 1)
    _break_share(trainer.models.teacher, 1.0)
    summary = trainer.run()
    assert (summary["status"], summary["teacher_positions"]) == ("finished", 0)
    assert "Warning: --teacher_model embedded: its logits are not finite at 100.0%" in capsys.readouterr().out


def test_a_student_that_is_not_finite_ends_the_run_before_the_first_step(make_trainer, tmp_path):
    trainer = make_trainer()
    _break_share(trainer.models.student, 0.2)
    with pytest.raises(UsageError) as error:
        trainer.run()
    assert str(error.value).startswith("--student_model embedded: its logits are not finite at")
    assert "not finite in float32 either" in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_student_that_float16_alone_cannot_hold_ends_the_run_before_the_first_step(make_trainer, tmp_path):
    trainer = make_trainer()
    _loud(trainer.models.student.model.layers[0].mlp.down_proj)  # a validation computes in float32
    with pytest.raises(UsageError) as error:
        trainer.run()
    line = str(error.value)
    assert line.startswith("--student_model embedded: its logits are not finite at 100.0% of the text of steps 1 to 10")
    assert "in float16. The first module that is not finite is model.layers.0.mlp.down_proj (Linear)" in line
    assert "--model_dtype float32" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_student_of_which_one_early_step_is_finite_in_float16_is_trained(make_trainer):
    trainer, calls = make_trainer(), []
    layer = trainer.models.student.model.layers[0].mlp.down_proj

    def loud_at_first(module, inputs, output):
        calls.extend([1] if output.dtype is torch.float16 else [])
        return output * math.inf if output.dtype is torch.float16 and len(calls) <= 3 else output

    layer.register_forward_hook(loud_at_first)
    random = torch.get_rng_state()
    trainer._check_first_steps()
    assert len(calls) == 4
    assert torch.equal(torch.get_rng_state(), random)
    assert trainer.run()["applied"] == 12


def test_a_student_whose_perplexity_is_beyond_a_float_and_its_loss_finite_is_trained(make_trainer):
    trainer = make_trainer("--skip_rule", "adaptive")
    trainer.models.student.lm_head.weight.data.mul_(2.5e4)
    summary = trainer.run()
    assert summary["val_ppl_start"] == math.inf
    assert math.isfinite(summary["val_bits_per_byte_start"])
    assert summary["skipped"]["forward"] == 0
    assert summary["applied"] > 0


def test_a_student_that_masks_one_token_of_the_text_is_told_apart_and_trained(make_trainer, capsys):
    trainer = make_trainer()
    (batch,) = list(trainer.validation.token_batches("student", 100))
    token = batch.targets.bincount().argsort()[-1].item()

    def mask(module, inputs, output):
        output = output.clone()
        output[..., token] = -math.inf
        return output

    trainer.models.student.lm_head.register_forward_hook(mask)
    count = (batch.targets == token).sum().item()
    start = trainer._evaluate()
    assert (start.num_masked, start.num_nonfinite) == (count, 0)
    trainer.state.start = start.metrics()
    (line,) = trainer._check_student()
    assert f"it masks {count / len(batch.targets):.1%} of the held-out text's tokens" in line
