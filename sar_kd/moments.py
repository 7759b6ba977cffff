"""The moments of a step and what is alive at each: as words, and by a rule of thumb."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sar_kd.loading import num_rows
from sar_kd.writing_memory import cache_bytes, writing_sizes

PARTS = ("teacher", "student", "gradients", "optimizer", "activations", "loss")


@dataclass(frozen=True)
class Moment:
    """A stretch of a step, and what is alive when most is."""

    name: str
    parts: Mapping[str, int]
    """Bytes, by the words in `PARTS`"""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def teacher_width(width: int, student_rows: int, teacher_rows: int) -> int:
    """How many tokens of the teacher's make `width` of the student's, as their vocabularies' sizes suggest: the text of
    a token is about as long as the logarithm of their number.
    """
    if alike(student_rows, teacher_rows):
        return width
    return max(2, round(width * math.log(student_rows) / math.log(teacher_rows)))


def alike(student_rows: int, teacher_rows: int) -> bool:
    """Are the vocabularies' sizes those of the same tokenizer, padding apart?"""
    return max(student_rows, teacher_rows) <= 1.02 * min(student_rows, teacher_rows)


def estimate(config: Any, skeletons: Mapping[str, nn.Module], dtype: torch.dtype) -> list[Moment]:
    """The moments of a step by a rule of thumb, for models that do not run without numbers.

    saved for backward = B * T * layers * (17 * D + 5 * I) numbers of the compute dtype, I the width of what a token
    passes in a feed-forward block; without layers being kept, one of them and each layer's input
    """
    train, own = config.train, getattr(config, "on_policy", None)
    tokens, half = train.per_device_batch_size * config.data.block_size, torch.finfo(dtype).bits // 8
    weights = {whose: sum(p.numel() for p in model.parameters()) for whose, model in skeletons.items()}
    saved = {whose: _saved(model, half * tokens, config) for whose, model in skeletons.items()}
    learned, passing = weights["student"], saved.get("teacher", (0, 0))[1]
    heads = {whose: num_rows(model) for whose, model in skeletons.items()}
    student = skeletons["student"].get_output_embeddings().weight  # type: ignore[operator]  # transformers'
    loss = min(config.loss.loss_workspace_mb * 2**20, 4 * tokens * sum(heads.values())) + 4 * student.numel()
    standing = {
        "teacher": half * weights.get("teacher", 0), "student": 4 * learned, "gradients": 0, "optimizer": 8 * learned,
        "activations": 0, "loss": 0,
    }  # fmt: skip
    kept = {"gradients": 4 * learned} if train.grad_accum_steps > 1 else {}
    sizes = own and writing_sizes(own, train.per_device_batch_size, train.grad_accum_steps, config.data.block_size)
    writing = []
    if sizes:  # at its beginning all prompts pass a layer at once, at its end all keys and values are there
        passes = saved["student"][1] * sizes.rows * sizes.prompt // tokens
        written = max(passes, cache_bytes(skeletons["student"], sizes, half))
        writing.append(Moment("writing", {**standing, "activations": written}))
    return [
        *writing,
        Moment("forward", {**standing, **kept, "activations": saved["student"][0] + passing}),
        Moment("loss", {**standing, **kept, "activations": saved["student"][0], "loss": loss}),
        Moment("backward", {**standing, "activations": saved["student"][0], "gradients": 4 * learned}),
        Moment("update", {**standing, "gradients": 4 * learned}),
        Moment("evaluation", {**standing, "activations": max(saved["student"][1], passing)}),
    ]


def _saved(model: Any, unit: int, config: Any) -> tuple[int, int]:
    """Bytes that a forward keeps for its backward, and that it needs while it passes one layer.

    unit: bytes of one number of each token
    """
    settings = model.config.get_text_config()
    width = settings.hidden_size
    inner = getattr(settings, "moe_intermediate_size", None) or getattr(settings, "intermediate_size", None)
    inner = (inner or 4 * width) * (getattr(settings, "num_experts_per_tok", None) or 1)
    one = unit * (17 * width + 5 * inner)
    if config.memory.gradient_checkpointing:
        return unit * width * settings.num_hidden_layers + one, one
    return one * settings.num_hidden_layers, one
