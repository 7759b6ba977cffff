"""Perplexity and bits per byte of a model on fixed text: every token once, no clamps."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from sar_kd.alignment.segments import positions_per_tile
from sar_kd.data.batch import TokenBatch
from sar_kd.losses.tiled_loss import target_log_probs
from sar_kd.models.lm_head import LMHeads, device_of, forward_to_lm_head, in_eval_mode
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.runtime.precision import Precision


@dataclass(frozen=True)
class Evaluation:
    """Total loss over a text; `nan` as soon as the logits of one position are not finite."""

    nats: float
    """Sum over the tokens of -log p"""
    num_tokens: int
    num_bytes: int
    num_nonfinite: int = 0
    """Tokens at whose position the logits are not finite"""
    num_masked: int = 0
    """Tokens that the model masks at their position, so that their loss is infinite"""
    group_nats: tuple[float, ...] = field(default=(), repr=False, compare=False)
    """The sum over the tokens of each group, such as a document, where their number was given"""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens); inf where that exceeds a float."""
        return math.exp(self.loss) if self.loss < 700 else self.loss * math.inf

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes of the text: the only metric here that compares across tokenizers."""
        return self.nats / math.log(2) / self.num_bytes

    def metrics(self) -> dict[str, float]:
        """The evaluation by the run log's names; `val_nonfinite` and `val_masked` are shares, left out if 0."""
        metrics = {"val_ppl": self.perplexity, "val_loss": self.loss, "val_bits_per_byte": self.bits_per_byte}
        counts = {"val_nonfinite": self.num_nonfinite, "val_masked": self.num_masked}
        return metrics | {name: count / self.num_tokens for name, count in counts.items() if count}


def evaluate(
    model: nn.Module,
    batches: Iterable[TokenBatch],
    num_bytes: int,
    precision: Precision,
    process_group: ProcessGroup = SINGLE_PROCESS,
    *,
    heads: LMHeads | None = None,
    workspace_mb: int = 64,
    after_batch: Callable[[TokenBatch], None] | None = None,
    num_groups: int = 0,
) -> Evaluation:
    """Total loss of `model` over `batches`; each rank evaluates its shard of them, and the totals are summed.

    nats = sum over tokens, in float64, of logsumexp(z) - z[target], with z in float32

    num_bytes: size of the whole text
    heads: LM heads that have been verified already
    workspace_mb: memory for logits, MiB; the logits of a whole batch never exist at once
    after_batch: called with each batch of this rank, on the device, after its forward
    num_groups: in the text, whose batches name the groups of each target; 0 to sum over the whole text only
    """
    heads = LMHeads(precision) if heads is None else heads
    nats = torch.zeros((), dtype=torch.float64, device=precision.device)
    group_nats = torch.zeros(num_groups, dtype=torch.float64, device=precision.device)
    num_nonfinite = num_masked = torch.zeros((), dtype=torch.int64, device=precision.device)
    num_tokens = 0
    for batch in shard_batches(batches, process_group):
        batch = batch.to(precision.device)
        log_probs, is_finite = log_probs_of(model, batch, precision, heads, workspace_mb)
        nats -= log_probs.double().sum()
        num_tokens += len(batch.targets)
        for groups in batch.groups if num_groups and batch.groups is not None else ():
            group_nats.index_add_(0, groups, log_probs.double(), alpha=-1)
        num_nonfinite = num_nonfinite + (~is_finite).sum()
        num_masked = num_masked + log_probs.isneginf().sum()
        if after_batch is not None:
            after_batch(batch)
    totals = [nats.item(), num_tokens, num_nonfinite.item(), num_masked.item(), *group_nats.tolist()]
    sums = process_group.all_reduce_sum(totals)
    return Evaluation(sums[0], int(sums[1]), num_bytes, int(sums[2]), int(sums[3]), tuple(sums[4:]))


def shard_batches(batches: Iterable[TokenBatch], process_group: ProcessGroup) -> Iterator[TokenBatch]:
    """This rank's part of the batches.

    Every rank gets equally many, as a sharded model computes on all ranks together: missing ones at the end are
    replaced by a batch without targets.
    """
    remaining = iter(batches)
    while group := list(itertools.islice(remaining, process_group.size)):
        if process_group.rank < len(group):
            yield group[process_group.rank]
        else:
            none = group[0].positions[:0]
            yield dataclasses.replace(group[0], positions=none, targets=none, groups=None)


def log_probs_of(
    model: nn.Module, batch: TokenBatch, precision: Precision, heads: LMHeads, workspace_mb: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of each target of a batch, nats, float32 [N]; and whether all logits of its position are finite, bool [N].

    heads, workspace_mb: as in `evaluate`
    """
    head = heads.of(model)
    with eval_mode(model, precision) as used:
        return _log_probs(model, head, batch, used, workspace_mb)


def _log_probs(model, head, batch: TokenBatch, precision, workspace_mb=64) -> tuple[torch.Tensor, torch.Tensor]:
    logits, _ = forward_to_lm_head(model, head, batch.input_ids, precision)
    tile_size = positions_per_tile(workspace_mb, logits.vocab_size)
    return target_log_probs(logits.select(batch.positions), batch.targets, tile_size)


@torch.no_grad()
def count_nonfinite(model: nn.Module, batch: TokenBatch, precision: Precision, heads: LMHeads) -> int:
    """The targets at whose position the logits are not finite in a training step: in the model's mode and the run's
    dtype, which those of an evaluation need not be. heads: as in `evaluate`
    """
    with precision.fork_rng():
        _, is_finite = _log_probs(model, heads.of(model), batch.to(precision.device), precision)
    return int((~is_finite).sum())


@contextlib.contextmanager
def eval_mode(model: nn.Module, precision: Precision) -> Iterator[Precision]:
    """Run `model` in eval mode, without gradients, under autocast; yields the precision used. Restores the mode.

    A model with float32 weights (the student) computes in float32, as its saved copy will.
    """
    used = precision.as_float32() if next(model.parameters()).dtype is torch.float32 else precision
    with in_eval_mode(model), torch.no_grad(), used.autocast(), used.on(device_of(model)).autocast():
        yield used
