"""Tasks of lm-evaluation-harness on a model that is in memory. The shipped one needs no download."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from tokenizers.processors import TemplateProcessing

from sar_kd.errors import UsageError
from sar_kd.models.pretrained import silence_transformers
from sar_kd.runtime.environment import is_installed
from sar_kd.runtime.files import as_float
from sar_kd.runtime.hub import explain_hub_error
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.backends import called_ids
from sar_kd.tokenization.token_table import start_and_end

TASKS = Path(__file__).parent / "tasks"
"""The task files that ship with the package"""

_STDERR = "_stderr"


class Score(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str
    """With the name of its filter, where a task has several"""
    value: float
    stderr: float
    """nan where the harness gives none"""
    num_questions: int


def require_harness() -> None:
    """Raise UsageError with what to install, if the harness is missing, or what it needs for a model in memory."""
    missing = [name for name in ("lm_eval", "accelerate") if not is_installed(name)]
    if missing:
        raise UsageError(f"eval: needs `pip install {' '.join(missing).replace('_', '-')}`")


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """The harness's tasks of these names, or of these .yaml files; their data is read, or downloaded.

    Raises: UsageError naming one that cannot be loaded
    """
    silence_transformers()
    for library in ("lm_eval", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    files = {name for name in names if name.endswith((".yaml", ".yml"))}
    shipped = {path.stem for path in TASKS.glob("*.yaml")}
    # Its own tasks are thousands of files, which take seconds to be looked through.
    manager = TaskManager(include_path=str(TASKS), include_defaults=bool(set(names) - files - shipped))
    found: dict[str, Any] = {}
    for name in names:
        is_file = name in files
        if not (Path(name).is_file() if is_file else name in manager.all_tasks):
            known = f"see `lm-eval ls tasks`, or give a .yaml file; {TASKS.name} of this package has unit_conversion"
            raise UsageError(f"--tasks {name}: {'no such file' if is_file else f'no such task; {known}'}")
        try:
            found |= manager.load([name])["tasks"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError) as error:
            reason = explain_hub_error(error, name, "dataset")
            raise UsageError(f"--tasks {name}: cannot be loaded ({reason})") from None
    return found


@torch.no_grad()
def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: dict[str, Any],
    precision: Precision,
    *,
    limit: int = 0,
    num_fewshot: int = -1,
    apply_chat_template: bool = False,
    add_bos_token: bool = False,
    batch_size: int = 8,
) -> list[Score]:
    """The metrics of a model on tasks, each with the harness's standard error.

    limit: the first questions of each task; 0: all; num_fewshot: examples before each; -1: as the task says
    add_bos_token: put the start token before each prompt, of a tokenizer too that puts none
    Raises: UsageError if a task fails on this model
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if add_bos_token:
        tokenizer = _with_start_token(tokenizer)
    wrapped = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=True if add_bos_token else None
    )
    try:
        # The harness asks git for the commit of the current folder, which is of no use here and may fail aloud.
        with precision.autocast(), mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value="", create=True):
            found = lm_eval.simple_evaluate(
                wrapped,
                tasks=list(tasks.values()),
                num_fewshot=None if num_fewshot < 0 else num_fewshot,
                limit=limit or None,
                apply_chat_template=apply_chat_template,
                log_samples=False,
                bootstrap_iters=1000,
            )
    except (ValueError, LookupError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"--tasks {' '.join(tasks)}: lm-evaluation-harness fails ({reason})") from None
    assert found is not None
    return [score for name, values in found["results"].items() for score in _scores(name, values, found["n-samples"])]


def _with_start_token(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it that puts the start token before a text, as each block of a run begins with it."""
    start, _ = start_and_end(tokenizer)
    if list(called_ids(tokenizer, "a")[:1]) == [start]:
        return tokenizer
    token, own = tokenizer.convert_ids_to_tokens(start), copy.deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, start)]
    )
    return own


def _scores(task: str, values: dict[str, Any], num_samples: dict[str, dict]) -> list[Score]:
    """The harness names a metric 'metric,filter', and its standard error 'metric_stderr,filter'."""
    found, count = [], int(num_samples.get(task, {}).get("effective", 0))
    for key, value in values.items():
        metric, _, rule = key.partition(",")
        if not rule or metric.endswith(_STDERR) or not isinstance(value, (int, float)):
            continue
        stderr = as_float(values.get(f"{metric}{_STDERR},{rule}", math.nan))
        found.append(Score(task, metric if rule == "none" else f"{metric} ({rule})", float(value), stderr, count))
    return found
