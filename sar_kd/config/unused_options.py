"""Options that are given and change nothing, because of the value of another one."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from sar_kd.config.sections import EMBEDDED

_Values = Mapping[str, Any]


class _Rule(NamedTuple):
    """Options that have an effect under one condition only."""

    options: tuple[str, ...]
    has_effect: Callable[[_Values], bool]
    condition: str
    """Behind 'has no effect'"""


_TASK = ("task_teacher_steps", "skip_baseline")
ROUTER_OPTIONS = (
    "sar_schedule", "sar_routing", "router_lr", "router_beta", "router_anchor", "router_direction",
    "router_max_grad_norm", "router_stop_on_drift", "activation_checkpointing",
)  # fmt: skip
"""Of routers that learn"""

_SAMPLING = (
    "on_policy_start", "sample_temperature", "sample_top_p", "max_new_tokens", "replay_size", "replay_fraction",
)  # fmt: skip
_DISTILLATION = (
    "teacher_system_prompt",
    "temperature",
    "alignment",
    "kd_direction",
    "jsd_beta",
    "alm_tau",
    "teacher_top_k",
)

_LIVE_CACHE = (
    "model_dtype", "device", "loss_workspace_mb", "teacher_device", "teacher_device_map", "teacher_max_memory",
)  # fmt: skip
"""Of a cache's options those of a teacher that is loaded"""

_RULES = (
    _Rule(_DISTILLATION, lambda v: v["alpha_kd"] > 0, "where --alpha_kd is 0: nothing is distilled"),
    _Rule(("temperature", "kd_direction", "jsd_beta", "teacher_top_k"), lambda v: v["alignment"] != "hidden",
          "with --alignment hidden, which compares hidden states"),
    _Rule(("kd_direction", "jsd_beta"), lambda v: v["alignment"] not in ("uld", "alm"),
          "with --alignment uld or alm, which has a distance of its own"),
    _Rule(("jsd_beta",), lambda v: "jsd" in (v["kd_direction"], v["router_direction"]), "without --kd_direction jsd"),
    _Rule(("alm_tau",), lambda v: v["alignment"] == "alm", "without --alignment alm"),
    _Rule(("logit_clamp",), lambda v: v["logit_clamp_style"] != "off", "with --logit_clamp_style off"),
    _Rule(("loss_clamp",), lambda v: v["loss_clamp_style"] != "off", "with --loss_clamp_style off"),
    _Rule(ROUTER_OPTIONS, lambda v: v["routing"] in ("auto", "sar"), "without --routing sar or auto"),
    _Rule(("router_patterns",), lambda v: v["routing"] != "native", "with --routing native"),
    _Rule(("ka_lambda", "ka_passes"), lambda v: v["routing"] == "ka", "without --routing ka"),
    _Rule(_SAMPLING, lambda v: v["on_policy_fraction"] > 0, "without --on_policy_fraction above 0"),
    _Rule(("replay_fraction",), lambda v: v["replay_size"] > 0, "without --replay_size above 0"),
    _Rule(("sample_top_p", "seed"), lambda v: v["sample_temperature"] > 0, "with --sample_temperature 0"),
    _Rule(_TASK, lambda v: bool(v["task"]), "without --task"),
    _Rule(("skip_baseline",), lambda v: not v["control"], "beside --control"),
    _Rule(("task_teacher_steps",), lambda v: v["teacher_model"] == EMBEDDED, "without the embedded teacher"),
    _Rule(("text_field",), lambda v: bool(v["train_file"] or v["dataset_name"]),
          "without --train_file or --dataset_name"),
    _Rule(("init_loss_scale",), lambda v: v["model_dtype"] in ("auto", "float16"),
          "without float16: only its gradients are scaled"),
    _Rule(("skip_factor",), lambda v: v["skip_rule"] != "fixed", "with --skip_rule fixed"),
    _Rule(("offload_teacher_to_cpu",), lambda v: v["device"] != "cpu", "with --device cpu"),
    _Rule(("teacher_max_memory",), lambda v: bool(v["teacher_device_map"]), "without --teacher_device_map"),
    _Rule(("lora_alpha", "lora_dropout", "lora_targets", "adapter_only"), lambda v: v["lora_rank"] > 0,
          "without --lora_rank above 0"),
    _Rule(("student_lr", "per_device_batch_size", "model_dtype"), lambda v: v["heal_steps"] > 0,
          "without --heal_steps"),
    _Rule(("save_dtype",), lambda v: not v["adapter_only"], "with --adapter_only: an adapter stays float32"),
    _Rule(("public",), lambda v: bool(v["push_to_hub"]), "without --push_to_hub"),
    _Rule(("quantize", "output", "converter"), lambda v: v["gguf"], "without --gguf"),
    _Rule(("vocab_from",), lambda v: bool(v["vocab_size"]), "without --vocab_size"),
    _Rule(("seed",), lambda v: v["keep"] != "topk", "with --keep topk, which draws nothing"),
    _Rule(("teacher_model",), lambda v: not v["from_logprobs"], "with --from_logprobs: --teacher_tokenizer names it"),
    _Rule(("per_device_batch_size",), lambda v: not v["from_logprobs"], "with --from_logprobs, which is read"),
    _Rule(_LIVE_CACHE, lambda v: not (v["from_logprobs"] or v["teacher_url"]),
          "where another program runs the teacher"),
    _Rule(("server_timeout",), lambda v: bool(v["teacher_url"]), "without --teacher_url"),
    _Rule(("epochs",), lambda v: v["train_steps"] == 0, "beside --train_steps"),
    _Rule(("save_steps",), lambda v: v["save_strategy"] == "steps", "without --save_strategy steps"),
    _Rule(("parallel",), lambda v: "epochs" not in v, "on fine-tuning, which takes one process"),
    _Rule(("parallel",), lambda v: os.environ.get("WORLD_SIZE", "1") != "1",
          "on one process; start several with torchrun --nproc_per_node N"),
    _Rule(("log_steps",), lambda v: v["max_steps"] == 0, "with --max_steps, which prints every step"),
)  # fmt: skip
"""A rule counts where the command has all options that its condition asks for."""

_ONLY_FOR = {"seed": ("generate", "cache")}


def unused_option_lines(command: str, values: _Values, given: Collection[str]) -> tuple[str, ...]:
    """A line for each reason why options that are given change nothing.

    values: every option of the command; given: the names of those that somebody chose
    """
    lines, named = [], set[str]()
    for options, has_effect, condition in _RULES:
        found = [name for name in options if name in given and name not in named]
        found = [name for name in found if command in _ONLY_FOR.get(name, (command,))]
        if found and not _holds(has_effect, values):
            named.update(found)
            names = ", ".join(f"--{name}" for name in found)
            lines.append(f"{names}: {'has' if len(found) == 1 else 'have'} no effect {condition}")
    return tuple(lines)


def _holds(condition: Callable[[_Values], bool], values: _Values) -> bool:
    try:
        return condition(values)
    except KeyError:  # the command has no such option, so nothing depends on it
        return True
