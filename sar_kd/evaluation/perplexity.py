"""How good a model is: perplexity and bits per byte on fixed text, every token once, nothing clamped."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from sar_kd.data.batch import TokenBatch
from sar_kd.losses.tiled_loss import target_log_probs, tile_rows
from sar_kd.models.lm_head import LMHeads, forward_to_lm_head
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.runtime.precision import Precision


@dataclass(frozen=True)
class Evaluation:
    """Total nats over a text; `nan` as soon as one token's is not finite."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(total nats / tokens); inf where that exceeds a float."""
        return math.exp(self.loss) if self.loss < 700 else self.loss * math.inf

    @property
    def bits_per_byte(self) -> float:
        """total nats / ln 2 / bytes of the text: the only one of these that compares across tokenizers."""
        return self.nats / math.log(2) / self.num_bytes


def shard_batches(batches: Iterable[TokenBatch], process_group: ProcessGroup) -> Iterator[TokenBatch]:
    """This rank's part of the batches. Every rank runs its model equally often: what is missing at the end is made up
    for by a batch in which nothing counts.
    """
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == process_group.size:
            yield group[process_group.rank]
            group = []
    if group:
        first, none = group[0], group[0].rows[:0]
        yield (
            group[process_group.rank]
            if process_group.rank < len(group)
            else dataclasses.replace(first, rows=none, targets=none)
        )


@contextlib.contextmanager
def reading(model: nn.Module, precision: Precision) -> Iterator[Precision]:
    """`model` in eval mode and without gradients, left in the mode in which it was found; in which precision it reads.

    A model with float32 weights (the student) also computes in float32, as its saved copy will.
    """
    was_training = model.training
    model.eval()
    used = precision.in_float32() if next(model.parameters()).dtype is torch.float32 else precision
    with torch.no_grad(), used.autocast():
        yield used
    model.train(was_training)


def evaluate(
    model: nn.Module,
    batches: Iterable[TokenBatch],
    num_bytes: int,
    precision: Precision,
    process_group: ProcessGroup = SINGLE_PROCESS,
    *,
    heads: LMHeads | None = None,
    workspace_mb: int = 64,
) -> Evaluation:
    """Total nats of all ranks' `batches` under `model`, as `reading` computes.

    sum over tokens, in float64, of logsumexp(z) - z[target], with z in float32

    heads: of models that have been tried already
    workspace_mb: memory for logits, MiB; the whole batch's are never there at once
    """
    heads = LMHeads(precision) if heads is None else heads
    nats = torch.zeros((), dtype=torch.float64, device=precision.device)
    num_tokens = 0
    for batch in batches:
        nats -= log_probs_of(model, batch.to(precision.device), precision, heads, workspace_mb).double().sum()
        num_tokens += len(batch.targets)
    total, count = process_group.all_reduce_sum([nats.item(), num_tokens])
    return Evaluation(total, int(count), num_bytes)


def log_probs_of(
    model: nn.Module, batch: TokenBatch, precision: Precision, heads: LMHeads, workspace_mb: int
) -> torch.Tensor:
    """log p of each target of a batch, nats, float32 [N]; nan where the row's logits are not finite. See `evaluate`."""
    head = heads.of(model)
    with reading(model, precision) as used:
        readout, _ = forward_to_lm_head(model, head, batch.input_ids, used)
        rows = tile_rows(workspace_mb, readout.vocab_size)
        return target_log_probs(readout.at(batch.rows), batch.targets, rows)[0]


def figures_of(evaluation: Evaluation) -> dict:
    """An evaluation in the words of the run folder's files."""
    return {
        "val_ppl": evaluation.perplexity,
        "val_loss": evaluation.loss,
        "val_bits_per_byte": evaluation.bits_per_byte,
    }
