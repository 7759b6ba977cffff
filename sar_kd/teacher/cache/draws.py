"""Tokens drawn from a teacher's distribution: k for each position, beside the target, which every record holds.

With q the mean of the teacher's distributions t_T at the cache's temperatures, token v is expected a(v) times:

sampled  a(v) = k q(v): k independent draws (Anshumann et al., 2025, arXiv 2503.16870)
mixed    a(v) = min(1, r(v) / theta), theta such that k tokens are drawn, each at most once: the likely ones always, the
         others by chance. One random number u draws the tokens at u, u + 1, u + 2, ... of the cumulative sum of a(v),
         which is systematic sampling with unequal probabilities
         r(v) = q(v) * (1 + rho * sum over the prefixes of the target that v begins with of 1 / q(all with that prefix))

count(v) * t_T(v) / a(v) has the mean t_T(v), at every temperature T and for every r. The factor in r is for students
with another tokenizer: where one starts a token inside the target, they learn the distribution conditioned on a prefix
of it, however unlikely that prefix is. An estimate of it needs draws that begin with the prefix.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sar_kd.alignment.segments import split_range
from sar_kd.models.logit_tiles import exp_, logsumexp_per_position

CODES_PER_BIT = 8
"""Expected numbers are powers of 2 ** (-1 / 8), at most 1, so that a byte holds one of them exactly"""

_CODES_PER_GAP, _NOT_DRAWN = 45.0, 255
"""A gap g to the largest log-probability has the code 45 sqrt(g), rounded up or down by chance, so that its mean is
right; beyond 31.8 nats that of 31.8"""

_PREFIX_WEIGHT = 0.3
"""rho: about how often a student's token starts at a byte inside a teacher's"""

_SMALLEST = 1e-12
"""Masses below it are taken as it: differences of sums near 1, in float64, have no digits there"""


class Draws(NamedTuple):
    """What was drawn at n positions."""

    ids: Tensor
    """int64 [k, n], each once at its position, without the target; also tokens that were not drawn, where fewer were"""
    counts: Tensor
    """int64 [k, n]: how often; 0 for those"""
    codes: Tensor
    """int64 [k, n]: with `mixed` the expected number is 2 ** (-code / CODES_PER_BIT)"""


class TokenSampler:
    """Draws k tokens at each position of a tile of logits."""

    def __init__(self, metadata: dict, pieces: Sequence[bytes] | None, device: torch.device):
        """metadata: of the cache; pieces: the bytes of each token, None if the tokenizer does not keep them"""
        self.k, self.is_mixed = metadata["teacher_top_k"], metadata["keep"] == "mixed"
        self.temperatures = metadata["temperatures"]
        order = list(range(metadata["num_tokens"]))
        if pieces is not None:
            order.sort(key=lambda token: pieces[token])
        self._pieces = pieces
        self._sorted = [] if pieces is None else [pieces[token] for token in order]
        self._order = torch.tensor(order, device=device)
        self._index = self._order.argsort()
        self._prefix_ranges: dict[int, list[tuple[int, int]]] = {}

    def uniforms(self, seed: tuple[int, int], first: int, count: int) -> Tensor:
        """Random numbers of `count` records: float64 [count, ...] in [0, 1), a function of seed and position alone.

        seed: of the cache, and of the text; first: number of the first record
        """
        per_record = self.k + (1 if self.is_mixed else self.k)  # k for the rounding of gaps
        bits = np.random.PCG64(np.random.SeedSequence(seed)).advance(first * per_record)
        return torch.from_numpy(np.random.Generator(bits).random((count, per_record))).to(self._order.device)

    def write(self, records: np.ndarray, tile: Tensor, targets: Tensor, uniforms: Tensor) -> None:
        """Write the fields of `record_dtype` that hold what was drawn.

        tile: float32 [V, n], finite logits; targets: int64 [n]; uniforms: of these positions
        """
        largest = tile[: len(self._order)].amax(0)
        for part in split_range(len(targets), -(-len(targets) // 8)):  # drawing takes the memory of several tiles
            drawn = self._draw(tile[:, part], targets[part], uniforms[part, self.k :])
            gaps = (largest[part] - tile[:, part].gather(0, drawn.ids)).double()
            gap_codes = (_CODES_PER_GAP * gaps.sqrt() + uniforms[part, : self.k].T).floor_().clamp_max_(_NOT_DRAWN - 1)
            gap_codes = gap_codes.where(drawn.counts > 0, _NOT_DRAWN)
            codes = drawn.codes if self.is_mixed else drawn.counts
            for field, values in (("ids", drawn.ids), ("gap_codes", gap_codes), ("codes", codes)):
                records[field][part] = values.T.cpu().numpy()
        for i, temperature in enumerate(self.temperatures):
            log_sums = logsumexp_per_position(tile, temperature) - largest / temperature
            records["log_sums"][:, i] = log_sums.half().cpu().numpy()

    def _draw(self, tile: Tensor, targets: Tensor, uniforms: Tensor) -> Draws:
        own = self._index[targets][None]
        probs = torch.zeros(len(self._order), tile.shape[1], dtype=torch.float64, device=tile.device)
        for temperature in self.temperatures:
            log_probs = tile.index_select(0, self._order).div_(temperature)
            probs += exp_(log_probs.sub_(logsumexp_per_position(tile, temperature)))
        probs /= len(self.temperatures)
        if self.is_mixed:
            expected = self._at_most_one(self._favour_prefixes(probs, targets).scatter_(0, own, 0.0))
            codes = (-CODES_PER_BIT * expected.log2()).ceil_()
            expected = torch.exp2(codes / -CODES_PER_BIT).where(codes < 256, 0.0)
            points = uniforms + torch.arange(self.k, device=tile.device)
        else:
            expected, codes, points = probs.mul_(self.k), torch.zeros_like(probs), uniforms * self.k
        sums = expected.cumsum(0).T.contiguous()
        drawn = torch.searchsorted(sums, points, right=True).T
        is_drawn = (drawn < len(sums.T)).to(torch.int32)  # not if they are fewer, by rounding or by the head's padding
        counts = torch.zeros(probs.shape, dtype=torch.int32, device=tile.device)
        counts.scatter_add_(0, drawn.clamp_max(len(probs) - 1), is_drawn).scatter_(0, own, -1)
        top = counts.topk(self.k, dim=0)
        codes = codes.gather(0, top.indices).clamp_max(255)
        return Draws(self._order[top.indices], top.values.long(), codes.long())

    def _at_most_one(self, weights: Tensor) -> Tensor:
        """min(1, weights / theta), with the sum k at each position; float64 [V, n]."""
        top, total = weights.topk(self.k, dim=0).values, weights.sum(0)
        left = torch.arange(self.k, 0, -1, device=weights.device)[:, None]
        thetas = (total - top.cumsum(0) + top) / left  # if those before are drawn for certain
        number = (top > thetas).sum(0, keepdim=True).clamp_max(self.k - 1)
        theta = torch.maximum(thetas.gather(0, number)[0], _SMALLEST * total).clamp_min(1e-300)
        return (weights / theta).clamp_max_(1.0)

    def _favour_prefixes(self, probs: Tensor, targets: Tensor) -> Tensor:
        """r from q, float64 [V, n], both in the order of the bytes."""
        ranges = [(low, high, n) for n, token in enumerate(targets.tolist()) for low, high in self._ranges_of(token)]
        if not ranges:
            return probs
        lows, highs, columns = torch.tensor(ranges, device=probs.device).T
        sums = torch.cat([torch.zeros_like(probs[:1]), probs.cumsum(0)])
        inverse = _PREFIX_WEIGHT / (sums[highs, columns] - sums[lows, columns]).clamp_min(_SMALLEST)
        factors = torch.zeros_like(sums)
        factors.index_put_((lows, columns), inverse, accumulate=True)
        factors.index_put_((highs, columns), -inverse, accumulate=True)
        return probs * factors.cumsum(0)[:-1].add_(1.0).clamp_min_(1.0)

    def _ranges_of(self, token: int) -> list[tuple[int, int]]:
        """For each prefix of a token that others begin with too: where those are in the order of the bytes."""
        if self._pieces is None:
            return []
        if token not in self._prefix_ranges:
            found, piece = [], self._pieces[token]
            for length in range(1, len(piece) + 1):
                prefix = piece[:length]
                low = bisect.bisect_left(self._sorted, prefix)
                high = bisect.bisect_right(self._sorted, prefix, lo=low, key=lambda other: other[: len(prefix)])
                if high - low > 1:
                    found.append((low, high))
            self._prefix_ranges[token] = found
        return self._prefix_ranges[token]


def gaps_of(records: np.ndarray) -> np.ndarray:
    """Log-probability of each drawn token minus the largest, float32 [N, k], nats; -inf for one that was not drawn."""
    codes = records["gap_codes"]
    return np.where(codes == _NOT_DRAWN, -np.inf, -np.square(codes / np.float32(_CODES_PER_GAP))).astype(np.float32)


def log_factors_of(records: np.ndarray, metadata: dict) -> np.ndarray:
    """log(count / a) of each drawn token of some records, float32 [N, k]; see `CachedDraws`."""
    codes = records["codes"].astype(np.float32)
    if metadata["keep"] == "mixed":
        return codes * np.float32(math.log(2.0) / CODES_PER_BIT)
    gaps = np.where(codes > 0, gaps_of(records), 0.0).astype(np.float32)
    log_sums, temperatures = records["log_sums"].astype(np.float32), metadata["temperatures"]
    log_probs = [gaps / t - log_sums[:, i, None] for i, t in enumerate(temperatures)]
    log_expected = np.logaddexp.reduce(log_probs, axis=0) + math.log(metadata["teacher_top_k"] / len(temperatures))
    return (np.log(np.maximum(codes, 1.0)) - log_expected).astype(np.float32)
