"""`sar-kd generate`: a prompt continued by the teacher, the student before and the student after the run."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sar_kd.config.commands import GenerateConfig
from sar_kd.config.sections import PrecisionConfig
from sar_kd.errors import UsageError
from sar_kd.models.generation import generate
from sar_kd.models.loading import load_for_generation
from sar_kd.reporting.history import RunHistory, read_history
from sar_kd.runtime.files import as_float
from sar_kd.runtime.precision import Precision, setup_precision


def main(config: GenerateConfig) -> dict:
    """Print the continuations; `--json` for programs.

    Raises: UsageError if the run has saved no student, or a model cannot be loaded
    """
    if not config.prompt:
        raise UsageError("generate: the prompt is empty; give some text to continue")
    run = read_history(Path(config.run))
    student = run.folder / "student"
    if not student.is_dir():
        raise UsageError(f"generate {run.folder}: its run has not saved a student yet")
    precision = setup_precision(PrecisionConfig(device=config.device), config.seed)
    sources = {
        "teacher": ("teacher_model", str(run.setting("teacher_model"))),
        "student, before": ("student_model", str(run.setting("student_model"))),
        "student, after": ("student_model", str(student)),
    }
    if not run.setting("teacher_model"):  # a fine-tuning run has none
        del sources["teacher"]
    trust = run.setting("trust_remote_code") is True
    texts = {who: _generate(*source, trust, config, precision) for who, source in sources.items()}
    if config.json:
        print(json.dumps({"prompt": config.prompt, **texts}, indent=2, ensure_ascii=False))
        return {"status": "finished"}
    bits = _bits_per_byte(run)
    print(f"Prompt: {config.prompt}")
    for who, text in texts.items():
        lines = [line.rstrip() for line in text.splitlines()]
        print(f"\n-- {who} ({bits.get(who, 'not measured')})", *(lines if any(lines) else ["(nothing)"]), sep="\n")
    return {"status": "finished"}


def _generate(kind: str, name: str, trust_remote_code: bool, config: GenerateConfig, precision: Precision) -> str:
    """The continuation by one model, which is loaded for it. kind: `teacher_model` or `student_model`"""
    model, tokenizer = load_for_generation(kind, name, trust_remote_code, precision.dtype)
    model.to(precision.device)
    if config.chat:
        if not tokenizer.chat_template:
            raise UsageError(f"--chat: the tokenizer of {name} has no chat template; leave the option out")
        message = [{"role": "user", "content": config.prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(config.prompt)["input_ids"]
    stops = model.generation_config.eos_token_id
    stops = [tokenizer.eos_token_id] if stops is None else stops if isinstance(stops, list) else [stops]
    torch.manual_seed(config.seed)
    with precision.autocast():
        (generation,) = generate(
            model,
            [ids],
            stop_token_ids=stops,
            max_new_tokens=[config.max_new_tokens],
            temperature=config.sample_temperature,
        )
    return tokenizer.decode(generation.ids, skip_special_tokens=True)


def _bits_per_byte(run: RunHistory) -> dict[str, str]:
    """That of each model on the run's held-out text, where it was measured."""
    best = min((as_float(r.get("val_bits_per_byte")) for r in run.validations()), default=float("nan"))
    bits = {
        "teacher": as_float(run.start.get("teacher_val_bits_per_byte")),
        "student, before": as_float(run.start.get("val_bits_per_byte")),
        "student, after": best,
    }
    return {who: f"{value:.4f} bits per byte" for who, value in bits.items() if value == value}
