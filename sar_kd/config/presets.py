"""Sets of values: modes, tasks, recipes; and the two scripts, which are one command with other defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sar_kd.config.fields import Command
from sar_kd.config.installation import as_called_here
from sar_kd.config.runs import Config

_CLAMPED = {
    "logit_clamp": 5.0, "logit_clamp_style": "normalized", "loss_clamp": 6.0, "loss_clamp_style": "scale",
    "max_grad_norm": 0.5, "skip_grad_norm": 2.0, "skip_rule": "adaptive", "skip_factor": 4.0, "max_nan_batches": 10,
}  # fmt: skip

MODES = {
    "ultra-conservative": {"student_lr": 5e-6, "temperature": 1.5, "alpha_kd": 0.05, "alpha_ce": 0.95, **_CLAMPED},
    "balanced": {"student_lr": 1e-5, "temperature": 2.0, "alpha_kd": 0.1, "alpha_ce": 0.9, **_CLAMPED},
    "precise": {
        "student_lr": 2e-5, "temperature": 1.0, "alpha_kd": 0.6, "alpha_ce": 0.4, **_CLAMPED,
        "logit_clamp_style": "off", "loss_clamp_style": "off", "max_grad_norm": 1.0,
    },
}  # fmt: skip

TASKS = {"units": {"per_device_batch_size": 16, "train_steps": 3000, "eval_steps": 500}}
"""`--task`: the settings that it brings, as a mode does."""

_PAPER = {
    "student_lr": 1e-5, "temperature": 1.0, "alpha_kd": 1.0, "alpha_ce": 0.0, "kd_direction": "reverse",
    "on_policy_fraction": 1.0, "sample_temperature": 1.0, "sample_top_p": 1.0, "max_new_tokens": 256, "block_size": 512,
    "per_device_batch_size": 4, "grad_accum_steps": 4,
    "logit_clamp_style": "off", "loss_clamp_style": "off",
}  # fmt: skip

RECIPES = {
    "on-policy": {
        **MODES["precise"], "student_lr": 1e-5, "lr_schedule": "cosine", "kd_direction": "forward",
        "on_policy_start": 0.5, "on_policy_fraction": 0.5, "sample_temperature": 1.0, "sample_top_p": 1.0,
        "max_new_tokens": 64, "keep_last": True,
    },
    "sar-paper": {
        **_PAPER, "routing": "sar", "sar_schedule": "two_stage", "sar_routing": "all", "router_lr": 1e-5,
        "router_beta": 0.01, "router_anchor": 0.0, "router_direction": "forward",
    },
    "ka-paper": {**_PAPER, "routing": "ka", "ka_lambda": 0.05, "ka_passes": 2},
}  # fmt: skip
"""`--recipe`. on-policy: by the cosine schedule the rate of the second half of the steps is a third of the first's.
The others: Algorithms 2 and 1 of arXiv 2502.12947, with the values of its section 4 and appendix.
"""

DEVIATIONS = {
    "sar-paper": (
        "the routers are the checkpoint's, without the paper's noise (W_noise) that makes every expert count",
        "the load balancing loss is taken per block, as CV^2 of the expert probabilities; with every expert active "
        "all experts have the same number of tokens",
    ),
    "ka-paper": ("experts are drawn, or not, per token and layer, which the paper leaves open",),
}

_COMMON_DEVIATIONS = (
    "gradients are clipped and steps skipped as the guards' options say; the paper names no clipping",
    "the learning rate warms up and decays as --warmup_steps and --lr_schedule say; the paper gives one rate",
    "--train_steps instead of 10 epochs; fine-tune teacher and student first, as the paper does (`sar-kd sft`)",
    "the best student has the lowest validation loss, not the highest ROUGE-L",
)


def recipe_lines(values: Mapping[str, Any]) -> tuple[str, ...]:
    """What a recipe does, or how it differs from its paper, a line each. values: of all options"""
    recipe = values.get("recipe", "")
    if not recipe:
        return ()
    if recipe not in DEVIATIONS:
        start, fraction = values["on_policy_start"], values["on_policy_fraction"]
        first = f"Recipe {recipe}: {start:.0%} of the steps on the given text, then {fraction:.0%} of the micro-batches"
        command = as_called_here("`sar-kd write`")
        return (f"{first} with responses of the student; the text should be the teacher's own answers: {command}",)
    return tuple(as_called_here(f"Unlike the paper: {line}.") for line in (*DEVIATIONS[recipe], *_COMMON_DEVIATIONS))


def first_on_policy_step(on_policy_start: float, train_steps: int, passes: int) -> int:
    """The first step that may have responses, of those with a text of their own; passes: steps on one text"""
    return round(on_policy_start * train_steps / passes)


def generation_lines(values: Mapping[str, Any]) -> tuple[str, ...]:
    """A warning where a run is too short for a single generated response. values: of all options"""
    fraction = values.get("on_policy_fraction", 0.0)
    if not fraction:
        return ()
    passes = values["ka_passes"] if values["routing"] == "ka" else 1
    steps = -(-values["train_steps"] // passes)
    first = first_on_policy_step(values["on_policy_start"], values["train_steps"], passes)
    count = (steps - first) * values["grad_accum_steps"]
    if math.floor(count * fraction) > 0:
        return ()
    steps = f"--train_steps {values['train_steps']} --on_policy_fraction {fraction:g}"
    return (f"Warning: {steps}: no response is generated in so few steps",)


EMBEDDED_LR_FACTOR = 200.0
"""A student of 0.4 M parameters needs a far higher rate than the pretrained models that the modes are written for."""

EMBEDDED_ROUTER_LR_FACTOR = 20.0
"""The embedded teacher's routers too; at 200 they follow the student so far that the teacher itself gets worse."""

ADAFACTOR_LR_FACTOR = 10.0
"""Adafactor multiplies the rate by the root mean square of each weight tensor: 0.02 to 0.4 in the models looked at."""

LORA_LR_FACTOR = 10.0
"""An adapter needs a higher rate than all weights; where `--fit` sets `--lora_rank`, it multiplies the mode's rate."""

STABLE: Command[Config] = Command(
    "",
    "Distil a large causal language model into a small one, in fp16, without NaN.",
    Config,
    "train:train",
    defaults={"mode": "balanced", "model_dtype": "auto"},
    presets={"mode": MODES, "task": TASKS, "recipe": RECIPES},
    embedded_lr_factors={"student_lr": EMBEDDED_LR_FACTOR, "router_lr": EMBEDDED_ROUTER_LR_FACTOR},
    run_name="stable",
)

FP16_SAFE = dataclasses.replace(
    STABLE, defaults={"mode": "ultra-conservative", "model_dtype": "float16"}, run_name="fp16_safe"
)


def default_batch_size(train: Any, task: str) -> int:
    """Blocks in a micro-batch where `--per_device_batch_size` is not given; train: a section."""
    return TASKS.get(task, {}).get("per_device_batch_size", train.per_device_batch_size)
