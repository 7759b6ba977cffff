"""Naive definitions in float64 and random logits, for the tests of losses."""

import math

import torch
from torch import Tensor

from sar_kd.losses.divergence import Divergence

N, V = 7, 11


def naive_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    weights = torch.stack([(z / temperature).exp() for z in logits])
    return weights / sum(weights)


def naive_kl(first: Tensor, second: Tensor, floor: float = -math.inf) -> Tensor:
    """KL(first || second) of two distributions."""
    pairs = zip(first, second, strict=True)
    return sum(a * (a.log().clamp_min(floor) - b.log().clamp_min(floor)) for a, b in pairs if a > 0)


def naive_divergence(student: Tensor, teacher: Tensor, divergence: Divergence, temperature: float = 1.0) -> Tensor:
    """Sum over positions, from logits."""
    total, beta = torch.zeros((), dtype=torch.float64), divergence.beta
    for z, y in zip(student, teacher, strict=True):
        p, t = naive_softmax(z, temperature), naive_softmax(y, temperature)
        if divergence.direction == "forward":
            total = total + naive_kl(t, p, divergence.floor)
        elif divergence.direction == "reverse":
            total = total + naive_kl(p, t, divergence.floor)
        else:
            m = beta * t + (1 - beta) * p
            total = total + beta * naive_kl(t, m, divergence.floor) + (1 - beta) * naive_kl(p, m, divergence.floor)
    return total


def random_logits(seed: int = 0, count: int = N, vocab_size: int = V, spread: float = 3.0) -> Tensor:
    return torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def random_targets(count: int = N, vocab_size: int = V) -> Tensor:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(2))


def value_and_grad(function, logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = function(leaf)
    value.backward()
    return value.detach(), leaf.grad


def assert_matches(function, naive, logits: Tensor) -> None:
    value, grad = value_and_grad(function, logits)
    expected_value, expected_grad = value_and_grad(naive, logits.double())
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=4e-6)


def half_log_probs(logits: Tensor) -> Tensor:
    """log_softmax in float16 arithmetic throughout."""
    shifted = logits - logits.max(-1, keepdim=True).values
    return shifted - shifted.exp().sum(-1, keepdim=True).log()
