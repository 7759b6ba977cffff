"""The mathematics of routers: their shares, how evenly they are spread, how certain they are, how far they moved.

Everything that depends on text is taken block by block and summed with each block's number of target tokens, so that
splitting a window into other micro-batches changes nothing.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sar_kd.losses import Segments, Sums
from sar_kd.routers import Gate
from sar_kd.routing import weights_of


def shares_of(gate: Gate, logits: Tensor) -> Tensor:
    """The router's distribution over all experts: softmax(z), or sigmoid(z) / sum sigmoid(z).

    logits: float [N, E]
    Returns: float [N, E], rows that add up to 1
    """
    return weights_of(dataclasses.replace(gate, normalised=True, scale=1.0), logits)


def imbalance(shares: Tensor, blocks: Segments) -> Tensor:
    """How unevenly each block's tokens are spread over the experts; 0 if evenly, E - 1 if all go to one.

    CV^2 = Var_e(P[e]) / Mean_e(P[e])^2,   P[e] = sum over the block's tokens n of s[n, e]

    shares: float [N, E]; blocks: the block of each token
    Returns: float [B]; a block without tokens has 0
    Source: Kim et al., 2025 (arXiv 2502.12947), section 3.3, of whose two terms the other is constant when every
    expert is active; taken for each sequence as in DeepSeek-AI, 2024 (arXiv 2412.19437), section 2.1.2
    """
    num_experts = shares.shape[1]
    sums = shares.new_zeros(blocks.count, num_experts).index_add_(0, blocks.index, shares)
    counts = blocks.sum(shares.new_ones(len(shares)))
    means = sums / counts.clamp_min(1.0)[:, None]
    return (num_experts * means.square().sum(1) - 1.0).where(counts > 0, 0.0)


def entropy(shares: Tensor) -> Tensor:
    """How undecided a router is about each token: 1 if all experts are alike to it, 0 if only one counts.

    H[n] = -sum_e s[n, e] log s[n, e] / log E

    shares: float [N, E]
    Returns: float [N]
    """
    return -torch.special.xlogy(shares, shares).sum(1) / math.log(shares.shape[1])


def relative_change(weight: Tensor, initial: Tensor) -> Tensor:
    """||W - W0||^2 / ||W0||^2, the squared distance from the beginning in units of the beginning; a scalar."""
    return (weight - initial).square().sum() / initial.square().sum().clamp_min(1e-12)


@dataclass(frozen=True)
class RouterTerms(Sums):
    """Sums over a batch's target tokens, fp32 scalars on the device; all but `total` without a gradient."""

    total: Tensor
    """What the routers minimise"""
    divergence: Tensor
    """Of teacher and student, nats"""
    balance: Tensor
    """`imbalance`, mean over routers"""
    anchor: Tensor
    """`relative_change`, mean over routers"""
    entropy: Tensor
    """`entropy`, mean over routers"""
