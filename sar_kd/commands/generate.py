"""`sar-kd generate`: a prompt continued by the models of a run, or by any model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from sar_kd.config.commands import GenerateConfig
from sar_kd.config.sections import SELF, PrecisionConfig
from sar_kd.data.chat.encoding import DEFAULT_TEMPLATE, chat_prompt_ids
from sar_kd.errors import UsageError
from sar_kd.models.generation import generate
from sar_kd.models.loading import load_for_generation
from sar_kd.models.model_checks import context_length_of
from sar_kd.reporting.history import RunHistory, read_history
from sar_kd.runtime.console import count_of, print_stderr
from sar_kd.runtime.files import as_float
from sar_kd.runtime.precision import Precision, setup_precision
from sar_kd.runtime.run_folder import holds_run, saved_student
from sar_kd.tokenization.backends import called_ids

_AFTER = "student, after"


def main(config: GenerateConfig) -> dict:
    """Print the continuations; `--json` for programs.

    Raises: UsageError if the run has saved no student, a model cannot be loaded, or the prompt is longer than a
    model's context
    """
    if not config.prompt:
        raise UsageError("generate: the prompt is empty; give some text to continue")
    if config.sample_top_p > 1:
        raise UsageError(f"--sample_top_p {config.sample_top_p:g}: must be at most 1")
    run = read_history(Path(config.run), with_steps=False) if holds_run(Path(config.run)) else None
    sources = {"model": ("model", config.run)} if run is None else _models_of(run)
    trust = config.trust_remote_code or (run is not None and run.setting("trust_remote_code") is True)
    date = "" if run is None else str(run.setting("template_date") or "")
    template = DEFAULT_TEMPLATE if run is not None and run.start.get("learns_chat") is True else ""
    precision = setup_precision(PrecisionConfig(device=config.device), config.seed)
    texts: dict[str, str] = {}
    missing: dict[str, str] = {}
    for who, (kind, name) in sources.items():
        try:
            texts[who] = _generate(kind, name, trust, config, precision, date, template)
        except UsageError as error:  # the teacher, or the student before, may not be there any more
            if who in ("model", _AFTER) or len(sources) == 1:
                raise
            missing[who] = str(error)
    if config.json:
        record = {"prompt": config.prompt, **texts, **({"left_out": missing} if missing else {})}
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return {"status": "finished"}
    bits = _bits_per_byte(run) if run else {}
    print(f"Prompt: {config.prompt}")
    for who in sources:
        title = f"{who} ({bits.get(who, 'not measured')})" if run else config.run
        text = f"(left out: {missing[who]})" if who in missing else texts[who]
        lines = [line.rstrip() for line in text.splitlines()]
        print(f"\n-- {title}", *(lines if any(lines) else ["(nothing)"]), sep="\n")
    return {"status": "finished"}


def _models_of(run: RunHistory) -> dict[str, tuple[str, str]]:
    """The models of a run: the option and the name of each. Raises: UsageError if it has saved no student"""
    student = saved_student(run.folder)
    if not student.is_dir():
        raise UsageError(f"generate {run.folder}: its run has not saved a student yet")
    sources = {
        "teacher": ("teacher_model", str(run.setting("teacher_model"))),
        "student, before": ("student_model", str(run.setting("student_model"))),
        _AFTER: ("student_model", str(student)),
    }
    if run.setting("teacher_model") in (None, "", SELF):  # a fine-tuning run has none; the student, before, is itself
        del sources["teacher"]
    return sources


def _generate(
    kind: str,
    name: str,
    trust_remote_code: bool,
    config: GenerateConfig,
    precision: Precision,
    date: str,
    default_template: str,
) -> str:
    """The continuation by one model, which is loaded for it.

    kind: the option that it belongs to; date: that chat templates write, '' for today
    default_template: for a tokenizer without a chat template; '' if it needs one

    Raises: UsageError if it cannot be loaded, or its context is shorter than the prompt
    """
    title = f"generate {name}" if kind == "model" else ""
    model, tokenizer = load_for_generation(kind, name, trust_remote_code, precision.dtype, title)
    model.to(precision.device)
    if config.chat:
        if not (tokenizer.chat_template or default_template):
            raise UsageError(f"--chat: the tokenizer of {name} has no chat template; leave the option out")
        if not tokenizer.chat_template:
            tokenizer.chat_template = default_template
            print_stderr(f"{name} has no chat template, so its prompt is written as 'User: ... Assistant: ...'")
        try:
            ids = chat_prompt_ids(tokenizer, config.prompt, date)
        except ValueError as error:
            raise UsageError(f"--chat: the chat template of {name} fails: {error}; leave the option out") from None
    else:
        ids = called_ids(tokenizer, config.prompt)
    room = (context_length_of(model) or 2**31) - len(ids)
    if room <= 0:
        raise UsageError(
            f"generate: the prompt has {count_of(len(ids), 'token')} and {name} takes {len(ids) + room}, its answer "
            "included; shorten the prompt"
        )
    stops = model.generation_config.eos_token_id
    stops = [tokenizer.eos_token_id] if stops is None else stops if isinstance(stops, list) else [stops]
    torch.manual_seed(config.seed)
    with precision.autocast():
        (generation,) = generate(
            model,
            [ids],
            stop_token_ids=stops,
            max_new_tokens=[min(config.max_new_tokens, room)],
            temperature=config.sample_temperature,
            top_p=config.sample_top_p,
            repetition_penalty=config.repetition_penalty,
        )
    text = tokenizer.decode(generation.ids, skip_special_tokens=True)
    if not generation.is_finite:
        print_stderr(f"Warning: {name}: it ended where its logits are not finite; float32 may hold them: --device cpu")
    return text


def _bits_per_byte(run: RunHistory) -> dict[str, str]:
    """That of each model on the run's held-out text, where it was measured."""
    measured = (as_float(r.get("val_bits_per_byte")) for r in run.validations())
    best = min(filter(math.isfinite, measured), default=math.nan)
    bits = {
        "teacher": as_float(run.start.get("teacher_val_bits_per_byte")),
        "student, before": as_float(run.start.get("val_bits_per_byte")),
        _AFTER: best,
    }
    return {who: f"{value:.4f} bits per byte" for who, value in bits.items() if value == value}
