"""`sar-kd eval`: the models of a run on tasks of lm-evaluation-harness; the results go into the run's pages too."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sar_kd.config.evaluating import EvalConfig
from sar_kd.config.sections import SELF, PrecisionConfig
from sar_kd.errors import UsageError
from sar_kd.evaluation.harness import Score, evaluate_tasks, load_tasks, require_harness
from sar_kd.models.loading import load_for_generation
from sar_kd.reporting.harness_table import HARNESS, harness_rows
from sar_kd.reporting.history import RunHistory, read_history
from sar_kd.reporting.summary_file import amend_summary
from sar_kd.runtime.console import print_stderr
from sar_kd.runtime.files import json_safe
from sar_kd.runtime.precision import setup_precision
from sar_kd.runtime.run_folder import holds_run, saved_student


def main(config: EvalConfig) -> dict:
    """Print the results and add them to `summary.json`, the model card and the report; `--json` for programs.

    Raises: UsageError if the harness is missing, or a model or a task cannot be loaded
    """
    folder = Path(config.run).expanduser()
    if not holds_run(folder):
        raise UsageError(f"eval {config.run}: holds no run; give a run folder")
    run = read_history(folder, with_steps=False)
    if not run.summary:
        raise UsageError(f"eval {config.run}: its run has not ended")
    sources = {which: _source(run, which) for which in config.which}
    require_harness()
    trust = config.trust_remote_code or run.setting("trust_remote_code") is True
    dtype = config.model_dtype or str(run.setting("model_dtype") or "auto")
    precision = setup_precision(PrecisionConfig(device=config.device, model_dtype=dtype), 0)
    tasks = load_tasks(config.tasks)
    dtype = str(precision.dtype).removeprefix("torch.")
    how = {name: getattr(config, name) for name in ("limit", "num_fewshot", "apply_chat_template", "add_bos_token")}
    results = dict(run.summary.get(HARNESS) or {})
    for which, (option, name) in sources.items():
        if not config.json:
            print_stderr(f"{which}: {name}, computing in {dtype}")
        # A student computes in the run's dtype on float32 weights, as it is trained and validated.
        weights = torch.float32 if option == "student_model" else precision.dtype
        model, tokenizer = load_for_generation(option, name, trust, weights)
        if config.apply_chat_template and not tokenizer.chat_template:
            raise UsageError(f"--apply_chat_template: the tokenizer of {name} has no chat template; leave it out")
        scores = evaluate_tasks(
            model.to(precision.device), tokenizer, tasks, precision, batch_size=config.per_device_batch_size, **how
        )
        del model
        results[which] = {**results.get(which, {}), **_as_entries(scores, how, dtype)}
        amend_summary(folder, {HARNESS: results})  # after each, as the next may take hours
    found = {which: {task: results[which][task] for task in results[which] if task in tasks} for which in sources}
    if config.json:
        print(json.dumps(json_safe(found), indent=2))
    else:
        _print_table([("model", "task", "metric", "value", "questions"), *harness_rows(found)])
    return {"status": "finished"}


def _source(run: RunHistory, which: str) -> tuple[str, str]:
    """The option that a model of the run belongs to, and its name. Raises: UsageError if the run has no such model"""
    teacher = run.setting("teacher_model")
    if which == "start":
        return "student_model", str(run.setting("student_model"))
    if which == "teacher" and teacher in (None, "", SELF):
        raise UsageError(f"--which teacher: the run in {run.folder} has none")
    if which == "teacher":
        return "teacher_model", str(teacher)
    folder = run.folder if which == "distilled" else Path(f"{str(run.folder).rstrip('/')}-control")
    student = saved_student(folder)
    if not student.is_dir():
        remedy = "; --resume --control trains one" if which == "control" else ""
        raise UsageError(f"--which {which}: there is no student in {folder}{remedy}")
    return "student_model", str(student)


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _as_entries(scores: list[Score], how: dict, dtype: str) -> dict[str, dict]:
    """By task: its metrics, each with its standard error, the number of questions, and how they were asked."""
    found: dict[str, dict] = {}
    for score in scores:
        entry = found.setdefault(
            score.task, {"num_questions": score.num_questions, "dtype": dtype, **how, "metrics": {}}
        )
        entry["metrics"][score.metric] = {"value": score.value, "stderr": score.stderr}
    return found
