"""From the logits of a vocabulary's tokens to log-probabilities of shared classes, and back to gradients of tokens.

A class holds one token of the finer vocabulary, with those that are merged into it, and every token of the coarser one
that begins with it (`alignment.vocabulary_map`). A token without a class takes no part, so no probability is pushed
down because the other vocabulary lacks the token. With equal vocabularies every class is one token, and the divergence
the token-level one.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sar_kd.alignment.batch_alignment import Continuations
from sar_kd.losses.functional import GroupSums
from sar_kd.models.logit_tiles import exp_, flat_view
from sar_kd.runtime.precision import MASKED_BELOW, MASKED_LOGIT

warnings.filterwarnings("ignore", message="index_reduce")  # "in beta" for years; its substitute is many times slower


class ClassMap(nn.Module):
    """The tokens of one vocabulary by shared class, at a common boundary.

    Each class has a representative, its first token. Written over a tile of logits, the class logits stand at the
    representatives: for a class of one token that is the token's own logit, so only the few others change.
    """

    representatives: Tensor
    """int64 [C]: the first token of each class"""
    multi_index: Tensor
    """int64 [C]: index among the S classes of several tokens, -1 for a class of one"""
    multi_classes: Tensor
    """int64 [S]: the classes of several tokens"""
    members: Tensor
    """int64 [J]: the tokens of those"""
    member_groups: Tensor
    """int64 [J]: which of the S each belongs to"""
    class_index: Tensor
    """int64, by token: its class, 0 without one"""
    unclassed: Tensor
    """int64: tokens without a class"""
    others: Tensor
    """int64: tokens that represent no class"""

    def __init__(self, tokens: Tensor, classes: Tensor, num_classes: int):
        """tokens, classes: int64 [M], the tokens with a class, and that class; every class has at least one token"""
        super().__init__()
        sizes = torch.bincount(classes, minlength=num_classes)
        is_member = sizes[classes] > 1
        multi_classes = torch.arange(num_classes)[sizes > 1]
        class_index = torch.full((int(tokens.max()) + 1,), -1).index_copy_(0, tokens, classes)
        representatives = tokens[classes.argsort(stable=True)[sizes.cumsum(0) - sizes]]
        is_other = torch.ones(len(class_index), dtype=torch.bool).index_fill_(0, representatives, False)
        multi_index = torch.full((num_classes,), -1).index_copy_(0, multi_classes, torch.arange(len(multi_classes)))
        buffers = {
            "representatives": representatives,
            "multi_index": multi_index,
            "multi_classes": multi_classes,
            "members": tokens[is_member],
            "member_groups": torch.searchsorted(multi_classes, classes[is_member]),
            "class_index": class_index.clamp_min(0),
            "unclassed": torch.arange(len(class_index))[class_index < 0],
            "others": torch.arange(len(class_index))[is_other],
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        self._workspace = torch.empty(0)

    def __len__(self) -> int:
        """Tokens up to the last one with a class."""
        return len(self.class_index)

    def classes_of(self, ids: Tensor) -> Tensor:
        """The class of each token, int64 of the shape of `ids`; -1 for none."""
        class_of = ids.new_full((len(self) + 1,), -1)
        class_of[:-1] = self.class_index
        class_of[self.unclassed] = -1
        return class_of[ids.clamp_max(len(self))]

    def tokens_beyond(self, vocab_size: int) -> Tensor:
        """The tokens of an LM head behind the last one with a class."""
        return torch.arange(len(self), max(len(self), vocab_size), device=self.representatives.device)

    def multi_token_logits(self, tile: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Logits of the S classes of several tokens, and each token's share of its class's probability.

        y[s, k] = T * log sum over v of s of exp(z[v, k] / T)

        tile: float32 [V, K]
        Returns: float32 [S, K] and [J, K]
        """
        shares = tile.index_select(0, self.members)
        if temperature != 1.0:
            shares.div_(temperature)
        # By each class's own maximum: its probability may underflow beside the position's.
        peaks = shares.new_full((len(self.multi_classes), tile.shape[1]), -torch.inf)
        peaks.index_reduce_(0, self.member_groups, shares, "amax")
        exp_(shares.sub_(peaks.index_select(0, self.member_groups)))
        totals = torch.zeros_like(peaks).index_add_(0, self.member_groups, shares)
        shares.div_(totals.index_select(0, self.member_groups))
        return peaks.add_(totals.log_()).mul_(temperature), shares

    @property
    def _multi_representatives(self) -> Tensor:
        return self.representatives[self.multi_classes]

    def to_classes_(self, tile: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Turn token logits, float32 [V, K], into class logits at the representatives; `MASKED_LOGIT` elsewhere.

        Returns: the overwritten logits, for `restore_`; the shares of `multi_token_logits`
        """
        values, shares = self.multi_token_logits(tile, temperature)
        overwritten = tile.index_select(0, torch.cat([self.others, self._multi_representatives]))
        tile.index_fill_(0, self.others, MASKED_LOGIT)
        tile.index_copy_(0, self._multi_representatives, values)
        return overwritten, shares

    def restore_(self, tile: Tensor, overwritten: Tensor) -> None:
        """Undo `to_classes_`."""
        tile.index_copy_(0, torch.cat([self.others, self._multi_representatives]), overwritten)

    def scatter_grad_(self, grad: Tensor, shares: Tensor) -> None:
        """From gradients of class logits, at the representatives, to those of token logits."""
        if len(self.members):
            sources = self._multi_representatives[self.member_groups]
            grad.index_copy_(0, self.members, grad.index_select(0, sources).mul_(shares))

    def to_other_vocab(self, other: ClassMap, tile: Tensor, temperature: float) -> Tensor:
        """Class logits of the other vocabulary's tile, at the representatives of this one.

        tile: float32 [V_o, K], of `other`
        Returns: float32 [V, K], valid until the next call; `MASKED_LOGIT` where this vocabulary has no representative
        """
        size = len(self) * tile.shape[1]
        if len(self._workspace) < size or self._workspace.device != tile.device:
            # Reused: on a CPU newly allocated memory costs more than the operations on it.
            self._workspace = tile.new_empty(size)
        mapped = self._workspace[:size].view(len(self), tile.shape[1])
        torch.index_select(tile, 0, other.representatives[self.class_index], out=mapped)
        values, _ = other.multi_token_logits(tile, temperature)
        mapped.index_copy_(0, self.representatives[other.multi_classes], values)
        return mapped.index_fill_(0, self.others, MASKED_LOGIT)


class GatheredLogits(NamedTuple):
    """Logits of one model that the projection needs, divided by the temperature; float32."""

    boundary: Tensor
    """[C, K]: class logits at common boundaries, y[c, k] = log sum over v of c of exp(z[v, k] / T)"""
    inside: Tensor
    """[V, K_1]: all logits at positions inside a token of the other side"""
    entries: Tensor
    """[E]: single logits, the `continuing_entries` of this side's continuations"""


def gather_logits(
    tile: Tensor, class_map: ClassMap, num_pairs: int, num_inside: int, continuations: Continuations, temperature: float
) -> GatheredLogits:
    """Gather `GatheredLogits` from a tile, with one gradient for all of them.

    tile: float32 [V, n]: K = num_pairs positions at common boundaries, K_1 = num_inside positions inside a token of the
    other side, then any others; continuations: of this side's tokens
    """
    continuation, token, _ = continuations.continuing_entries
    entries = token, continuations.continuing_positions[continuation]
    return GatheredLogits(*_GatherLogits.apply(tile, class_map, num_pairs, num_inside, *entries, temperature))


class _GatherLogits(torch.autograd.Function):
    """dz[v, k] = dy[c(v), k] * exp(z[v, k] / T - y[c(v), k]) / T, plus the gradients of `inside` and `entries`.

    One buffer for the gradient, and shares only for classes of several tokens: passes over [V, n] are the cost.
    """

    @staticmethod
    def forward(ctx, tile, class_map: ClassMap, num_pairs: int, num_inside: int, tokens, positions, temperature: float):
        ctx.shape, ctx.class_map, ctx.temperature = (*tile.shape, num_pairs, num_inside), class_map, temperature
        pairs, inside = tile[:, :num_pairs], tile[:, num_pairs : num_pairs + num_inside]
        boundary = pairs.index_select(0, class_map.representatives)
        values, shares = class_map.multi_token_logits(pairs, temperature)
        boundary.index_copy_(0, class_map.multi_classes, values)
        entries = flat_view(tile).index_select(0, tokens * tile.stride(0) + positions)
        inside = inside.contiguous()
        if temperature != 1.0:
            for part in (boundary, entries, inside):
                part.div_(temperature)
        ctx.save_for_backward(tokens * tile.shape[1] + positions, shares)  # the gradient has no padding
        return boundary, inside, entries

    @staticmethod
    def backward(ctx, grad_boundary: Tensor, grad_inside: Tensor, grad_entries: Tensor):
        indices, shares = ctx.saved_tensors
        (vocab_size, width, num_pairs, num_inside), class_map = ctx.shape, ctx.class_map
        grad = grad_boundary.new_zeros(vocab_size, width)
        pairs = grad[: len(class_map), :num_pairs]
        pairs.copy_(grad_boundary.index_select(0, class_map.class_index))
        multi = grad_boundary.index_select(0, class_map.multi_classes)
        pairs.index_copy_(0, class_map.members, multi.index_select(0, class_map.member_groups).mul_(shares))
        pairs.index_fill_(0, class_map.unclassed, 0.0)
        grad[:, num_pairs : num_pairs + num_inside] = grad_inside
        grad.view(-1).index_add_(0, indices, grad_entries)
        return grad if ctx.temperature == 1.0 else grad.div_(ctx.temperature), *[None] * 6


class BeforeLogits(NamedTuple):
    """Logits of the `TokensBefore` of B continuations, divided by the temperature; float32."""

    entries: Tensor
    """[F]: of its entries"""
    tokens: Tensor
    """[B]: of the token before"""
    normalisers: Tensor
    """[B]: logsumexp of the whole vocabulary at the continuing position, where that token has ended"""


def continuing_log_probs(entries: Tensor, continuations: Continuations, before: BeforeLogits | None = None) -> Tensor:
    """Log-probabilities of a continuation's classes for the continuing side, conditioned on the prefix.

    A softmax over the tokens that extend the prefix and the token that is the prefix itself. Where the token before may
    go on over the prefix, over both paths to it; with w that token, p the prefix and z' the logits before w:

    weight of class c = exp(z'[w]) * sum over v of c of exp(z[v] - logsumexp z) + sum over v' of c of exp(z'[v'])

    with v all tokens that begin with p, and v' all that begin with w and p. A continuation of which a teacher's top k
    holds no token counts as one that ends.

    entries: float32 [E], the logits z of `continuing_entries`; before: of `continuations.before`
    Returns: float32 [O]; about `MASKED_LOGIT` for an impossible class
    """
    continuation_of, end_classes = continuations.class_continuations, continuations.end_classes
    continuation, _, class_of = continuations.continuing_entries
    if before is not None and continuations.before is not None:
        has_ended = torch.zeros_like(end_classes, dtype=entries.dtype).index_copy(
            0, continuations.before.continuations, before.tokens - before.normalisers
        )
        entries = torch.cat([entries + has_ended[continuation], before.entries])
        class_of = torch.cat([class_of, continuations.before.entries[2]])
    classes = GroupSums(class_of, len(continuation_of)).logsumexp(entries)
    totals = GroupSums(continuation_of, len(end_classes)).logsumexp(classes)
    is_unknown = totals < MASKED_BELOW
    log_probs = classes - totals.masked_fill(is_unknown, 0.0)[continuation_of]
    return log_probs.index_fill(0, end_classes, 0.0).where(is_unknown[continuation_of], log_probs)


def starting_log_probs(logits: Tensor, continuations: Continuations, masks_impossible_end: bool) -> Tensor:
    """Log-probabilities of the same classes for the starting side, at the first K_1 continuations.

    A softmax over the whole vocabulary, in which every token that no class lists counts for the end of the continuing
    token. Where the continuing vocabulary has no token that ends there, its end has probability 0; with
    `masks_impossible_end` the starting side's softmax then leaves the end out too, else it keeps the whole vocabulary.

    logits: float32 [V, K_1]
    Returns: float32 [O_1]; about `MASKED_LOGIT` for an impossible class
    """
    size = logits.shape[1]
    end_classes = continuations.end_classes[:size]
    continuation_of = continuations.class_continuations[: continuations.num_inside_classes]
    continuation, token, class_ = continuations.starting_entries
    indices, flat = token * size + continuation, logits.view(-1)
    classes = GroupSums(class_, len(continuation_of)).logsumexp(flat.index_select(0, indices))
    # From the other tokens' logits, not as 1 - p: a student that is certain of the continuation still gets a gradient.
    end = flat.scatter(0, indices, MASKED_LOGIT).view_as(logits).logsumexp(0)
    if masks_impossible_end:
        end = torch.where(continuations.can_end, end, MASKED_LOGIT)
    classes = classes.index_copy(0, end_classes, end)
    log_probs = classes - GroupSums(continuation_of, size).logsumexp(classes)[continuation_of]
    return torch.where(classes > MASKED_BELOW, log_probs, MASKED_LOGIT)


def on_support(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's logits with `MASKED_LOGIT` for the classes that the teacher's top k does not hold.

    Both are then renormalised on the others, so nothing is pushed down because it is not in the top k.
    """
    return torch.where(teacher > MASKED_BELOW, student, MASKED_LOGIT)


def renormalise(student: Tensor, teacher: Tensor, groups: GroupSums | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Both with the probabilities of each group adding up to 1, and bool [K]: both have a known class in the group.

    student, teacher: float [C, K], or [O] with `groups`
    """

    def by_class(values: Tensor) -> Tensor:
        return values if groups is None else values[groups.index]

    totals = [side.logsumexp(0) if groups is None else groups.logsumexp(side) for side in (student, teacher)]
    shared = torch.minimum(*totals) > MASKED_BELOW
    student, teacher = (side - by_class(total) for side, total in zip((student, teacher), totals, strict=True))
    keep = by_class(shared)
    return student.where(keep, 0.0), teacher.where(keep, 0.0), shared
