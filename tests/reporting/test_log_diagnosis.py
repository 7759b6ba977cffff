"""`explain`: each pattern of losses and gradient norms is recognised in each kind of log, with its known cause."""

import json
import math
import time

import pytest

from sar_kd.commands.main import main
from sar_kd.errors import UsageError
from sar_kd.reporting.diagnoses import DIAGNOSES
from sar_kd.reporting.log_diagnosis import diagnose, diagnosis_lines, read_log

NAN, INF = math.nan, math.inf
GOOD = [(2.9, 1.8), (2.5, 1.5), (2.27, 1.55), (2.1, 1.3), (1.9, 1.2), (1.8, 1.1)]
PATTERNS = {
    "forward overflow": [(0.0, NAN)] * 6,
    "weights became nan": [(2.9, 1.8), *[(0.0, NAN)] * 5],
    "exploding": [(2.9, 1.8), (2.5, 2.5), (4.0, 30.0), (9.0, 400.0), *[(0.0, NAN)] * 3],
    "backward overflow": [(loss, NAN) for loss, _ in GOOD],
    "calibration": [(2.9, INF), (2.9, NAN), *GOOD[1:], *GOOD[3:]],
    "no labels": [(0.0, 0.0)] * 6,
    "some labels missing": [*GOOD[:2], (0.0, NAN), *GOOD[2:4], (0.0, 0.0), *GOOD[4:]],
    "loss lost": [(2.9, 1.8), *[(0.0, 1.732)] * 5],
    "no gradient": [(loss, 0.0) for loss, _ in GOOD],
    "no movement": [(2.9, 1.1)] * 6,
    "healthy": GOOD,
}


def _printed(pairs) -> str:
    return "\n".join(
        f"{i}%|##   | {{'loss': {loss}, 'grad_norm': {norm}, 'learning_rate': 0.0002, 'epoch': {i / 10}}}"
        for i, (loss, norm) in enumerate(pairs)
    )


def _quoted(pairs) -> str:
    """As transformers 5 prints them."""
    return "\n".join(f"{{'loss': '{loss}', 'grad_norm': '{norm}', 'learning_rate': '2e-04'}}" for loss, norm in pairs)


def _state(pairs) -> str:
    history = [{"loss": loss, "grad_norm": norm, "step": i} for i, (loss, norm) in enumerate(pairs)]
    return json.dumps({"epoch": 1.0, "log_history": [*history, {"eval_loss": 1.0, "step": 9}]})


def _read(tmp_path, text, name="train.log"):
    (tmp_path / name).write_text(text)
    return read_log(tmp_path / name)


@pytest.mark.parametrize("written", [_printed, _quoted, _state])
@pytest.mark.parametrize("name", PATTERNS)
def test_each_pattern_is_recognised_in_each_kind_of_log(tmp_path, name, written):
    assert diagnose(_read(tmp_path, written(PATTERNS[name]))).name == name


def test_every_diagnosis_is_reached_by_a_test():
    ours = {"no teacher", "teacher left out", "norm skips", "half weights", "no answers", "wrong answers"}
    assert set(PATTERNS) | ours == set(DIAGNOSES)


def _ours(pairs, causes) -> str:
    records = [{"event": "evaluation", "step": 0, "val_loss": 3.0}]
    for i, ((loss, norm), cause) in enumerate(zip(pairs, causes, strict=True), 1):
        metrics = {"loss": loss, "grad_norm": norm}
        metrics = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        records.append({"event": "step", "step": i, **metrics, "applied": cause is None, "cause": cause})
    return "\n".join(map(json.dumps, records))


@pytest.mark.parametrize(
    ("pairs", "causes", "name"),
    [
        (GOOD, [None] * 6, "healthy"),
        ([(2.9, 9.0)] * 6, ["norm"] * 6, "norm skips"),
        ([(NAN, NAN)] * 6, ["forward"] * 6, "forward overflow"),
        ([(2.9, 8.0), *[(NAN, NAN)] * 5], [None, *["forward"] * 5], "exploding"),
        ([(0.0, 0.0)] * 6, ["no_targets"] * 6, "no labels"),
        ([(2.9, INF), *GOOD[1:]], ["overflow", *[None] * 5], "calibration"),
        ([(loss, NAN) for loss, _ in GOOD], ["gradient"] * 6, "backward overflow"),
    ],
)
def test_a_runs_own_metrics_are_read_with_their_causes(tmp_path, pairs, causes, name):
    assert diagnose(_read(tmp_path, _ours(pairs, causes), "metrics.jsonl")).name == name
    assert diagnose(read_log(tmp_path)).name == name  # the folder that holds it


@pytest.mark.parametrize(
    ("dropped", "name", "line"),
    [
        ([400] * 6, "no teacher", "100.0% of its positions, in 6 steps; all of them in 6"),
        ([400] * 5 + [0], "no teacher", "83.3% of its positions, in 5 steps; all of them in 5"),
        ([100] * 6, "teacher left out", "25.0% of its positions, in 6 steps; all of them in 0"),
        ([0] * 5 + [4], "teacher left out", "0.2% of its positions, in 1 steps; all of them in 0"),
        ([0] * 6, "healthy", ""),
    ],
)
@pytest.mark.parametrize("denominator", ["teacher_positions", "num_target_tokens"])
def test_a_teacher_that_was_left_out_is_the_diagnosis(tmp_path, dropped, name, line, denominator):
    """Also in the logs of a version that applied such steps and counted the targets alone."""
    records = [json.loads(text) for text in _ours(GOOD, [None] * 6).splitlines()[1:]]
    records = [r | {"teacher_rows_dropped": n, denominator: 400} for r, n in zip(records, dropped, strict=True)]
    log = _read(tmp_path, "\n".join(map(json.dumps, records)), "metrics.jsonl")
    found = diagnose(log)
    assert found.name == name
    assert name == "healthy" or "--model_dtype float32" in found.remedy
    assert line in "\n".join(diagnosis_lines(log))


def test_positions_of_infinite_kl_are_told_apart_from_logits_that_are_not_finite(tmp_path):
    records = [json.loads(text) for text in _ours(GOOD, [None] * 6).splitlines()[1:]]
    counts = {"teacher_rows_dropped": 9, "teacher_rows_infinite": 9, "teacher_positions": 400}
    found = diagnose(_read(tmp_path, "\n".join(json.dumps(r | counts) for r in records), "metrics.jsonl"))
    assert (found.name, found.remedy) == ("teacher left out", "--kd_direction jsd")
    assert found.cause == "KL is infinite (masked tokens)"
    counts["teacher_rows_infinite"] = 8
    found = diagnose(_read(tmp_path, "\n".join(json.dumps(r | counts) for r in records), "metrics.jsonl"))
    assert found.remedy == "--model_dtype float32, or bfloat16 on a card that has it; --kd_direction jsd"


def test_steps_refused_for_the_teacher_are_no_teacher_and_float32_is_not_advised_where_it_is_in_use(tmp_path):
    log = _run(tmp_path, GOOD, ["teacher"] * 6, model_dtype="float32")
    assert diagnose(log).name == "no teacher"
    assert "float32" not in diagnose(log).remedy


def _run(tmp_path, pairs, causes, **settings):
    """A run folder of this program: its metrics and its config."""
    (tmp_path / "metrics.jsonl").write_text(_ours(pairs, causes))
    (tmp_path / "config.json").write_text(json.dumps({"format": 2, "mode": "balanced", "all": settings}))
    return read_log(tmp_path)


def test_a_run_that_diverged_is_told_its_own_rate_and_no_clip_that_is_in_force(tmp_path):
    pairs = [(4.39, 1.3), (77883.0, NAN), (77981.0, NAN), (74548.0, NAN)]
    causes = [None, *["gradient"] * 3]
    lines = diagnosis_lines(_run(tmp_path, pairs, causes, student_lr=1000.0, max_grad_norm=0.5, model_dtype="float32"))
    assert "Growth: loss 4.39 in line 1, 7.455e+04 in line 4" in lines
    assert "First line that is not finite: 2" in lines
    assert "What to try: a lower --student_lr (it is 1000)" in lines
    assert "learning_rate" not in " ".join(lines)
    assert "float32" not in " ".join(lines)
    loose = diagnose(_run(tmp_path, pairs, causes, student_lr=1000.0, max_grad_norm=50.0))
    assert loose.remedy == "a lower --student_lr (it is 1000), or --max_grad_norm 1 (it is 50)"


def test_a_run_in_float32_is_not_advised_to_compute_in_float32(tmp_path):
    pairs, causes = [(NAN, NAN)] * 6, ["forward"] * 6
    assert "float32" not in diagnose(_run(tmp_path, pairs, causes, model_dtype="float32", student_lr=1e-3)).remedy
    assert "--model_dtype float32" in diagnose(_run(tmp_path, pairs, causes, model_dtype="float16")).remedy


@pytest.mark.parametrize(
    ("rule", "remedy"), [("fixed", "--skip_rule adaptive"), ("adaptive", "--student_lr (it is 1)")]
)
def test_skips_for_a_norm_are_not_cured_by_a_rule_that_is_in_force(tmp_path, rule, remedy):
    found = diagnose(_run(tmp_path, [(2.9, 9.0)] * 6, ["norm"] * 6, skip_rule=rule, student_lr=1.0))
    assert (found.name, remedy in found.remedy) == ("norm skips", True)


def test_the_options_of_another_trainer_are_named_as_it_names_them(tmp_path):
    found = diagnose(_read(tmp_path, _printed(PATTERNS["exploding"])))
    assert found.remedy == "a lower learning_rate, max_grad_norm 1.0, more warmup_steps"


@pytest.mark.parametrize(
    "config", [None, "[1]", "{", '{"a": 1}', '{"all": {"student_lr": "high", "max_grad_norm": []}}']
)
def test_a_run_whose_config_is_missing_or_nonsense_is_explained_all_the_same(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    pairs = [(2.9, 8.0), *[(NAN, NAN)] * 5]
    found = diagnose(_read(tmp_path, _ours(pairs, [None, *["forward"] * 5]), "metrics.jsonl"))
    assert (found.name, found.remedy) == ("exploding", "a lower --student_lr")


@pytest.mark.parametrize(
    "text",
    [
        "{" * 100_000, "{}" * 50_000, "{" * 50_000 + "}" * 50_000, "{'loss'" * 100_000, "{'loss'" + " 'loss'" * 100_000,
        "{'loss': 1 " * 100_000, "'" * 100_000, '{"a": ' * 100_000, "accuracy " * 100_000, "{\n" * 100_000,
    ],
    ids=range(10),
)  # fmt: skip
def test_a_hundred_thousand_braces_take_no_time(tmp_path, text):
    (tmp_path / "x.log").write_text(text + "\n{'loss': 2.5}\n")
    started = time.process_time()
    assert read_log(tmp_path / "x.log").steps[-1].loss == 2.5
    assert time.process_time() - started < 2  # with work that grows with the square: over a minute


def test_half_weights_are_recognised_by_pytorchs_error(tmp_path):
    text = _printed(GOOD[:1]) + "\nValueError: Attempting to unscale FP16 gradients.\n"
    assert diagnose(_read(tmp_path, text)).name == "half weights"


@pytest.mark.parametrize(("rate", "name"), [("0.0", "no answers"), ("0.99", "wrong answers")])
def test_scores_of_zero_after_a_healthy_loss_are_explained(tmp_path, rate, name):
    before = "benchmark_result.accuracy=0.0  benchmark_result.answer_rate=0.0\n"
    after = f"\nbenchmark_result.accuracy=0.0  benchmark_result.answer_rate={rate}\n"
    assert diagnose(_read(tmp_path, before + _printed(GOOD) + after)).name == name
    good = "\nbenchmark_result.accuracy=0.6  benchmark_result.answer_rate=1.0\n"
    assert diagnose(_read(tmp_path, before + _printed(GOOD) + good)).name == "healthy"


def test_the_answer_names_pattern_cause_remedy_and_public_reports(tmp_path):
    lines = diagnosis_lines(_read(tmp_path, _printed(PATTERNS["forward overflow"])))
    assert lines[0].endswith("6 lines with a loss, from 0 to 0 (6 of them 0)")
    assert [line.split(":")[0] for line in lines[1:]] == ["Pattern", "Likely cause", "What to try", "Reported in"]
    assert "prints 0.0" in lines[2]


def test_a_teacher_beyond_float16_has_the_figure_in_its_cause_and_no_report():
    found = DIAGNOSES["no teacher"]
    assert "103,792" in found.cause
    assert found.reports == ""


def test_the_command_prints_it_and_ends_with_0(tmp_path, capsys):
    (tmp_path / "trainer_state.json").write_text(_state(PATTERNS["no labels"]))
    assert main(["explain", str(tmp_path)]) == 0
    assert "every label is masked" in capsys.readouterr().out
    assert main(["explain", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "no labels"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, "no such log"),
        ("nothing of the kind", "holds no loss"),
        ('{"log_history": [{"eval_loss": 1.0}]}', "holds no loss"),
        ("{'loss': 'high'}", "holds no loss"),
        ("Step 25: avg_loss=4.1834 (kd=2.5541, ce=4.2692) grad_norm=1.00", "or the folder of a run"),
    ],
)
def test_what_is_no_log_is_one_line(tmp_path, text, line):
    if text is not None:
        (tmp_path / "x.log").write_text(text)
    with pytest.raises(UsageError, match=line):
        read_log(tmp_path / "x.log")


@pytest.mark.parametrize(
    ("argv", "line"),
    [([], "LOG: not given"), (["a", "b"], "'b': belongs to no option"), (["a", "--loud"], "--loud: no such option")],
)
def test_the_command_wants_one_log(argv, line, capsys):
    assert main(["explain", *argv]) == 2
    assert line in capsys.readouterr().err
