"""Another routing than a model's own, by hooks on its routers, for as long as a context is open.

A hook sees the logits that a router made and gives its block other weights and indices; no weight, config or module
is replaced, and leaving the context restores the model exactly. Setting `config.num_experts_per_tok` instead would do
nothing: routers keep the number that they were built with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sar_kd.errors import UsageError
from sar_kd.models.lm_head import backbone_of
from sar_kd.teacher.moe.discovery import Gate, RouterSpec

RULES = ("native", "all", "ka")

_TOLERANCE = 2e-2
"""Largest difference of a weight when a gate is recognised by its output; the dtype may be a half."""


class Routing:
    """How a model's tokens find their experts. Use as a context.

    native  the model's own routing
    all     every expert, weighted by its share of the scores: softmax over all of a router's logits, or normalised
            sigmoids, times the model's own scale
    ka      every expert but one, which is drawn anew in each forward: with probability 1 - lambda the one with the
            smallest logit, else the one that is left when the others are drawn from the gate's distribution without
            replacement; weights normalised over the rest

    What is drawn stays drawn until the next forward of the model, so that activations that are computed anew in
    backward are the same.
    Source: Kim et al., 2025 (arXiv 2502.12947), sections 3.2 and 3.3
    """

    def __init__(self, model: nn.Module, specs: list[RouterSpec], rule: str, ka_lambda: float = 0.05, seed: int = 0):
        assert rule in RULES
        self.model, self.specs, self.rule, self.ka_lambda = model, specs, rule, ka_lambda
        device = next(model.parameters()).device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._handles: list = []
        self._left_out: dict[str, Tensor] = {}
        self._logits: dict[str, Tensor] = {}
        self._records = False
        self._top_k = {spec.name: spec.block.top_k for spec in specs if spec.gate.returns == "logits"}

    def __enter__(self) -> Routing:
        body = backbone_of(self.model)  # which some call with the head and some without
        hooks = [
            body.register_forward_pre_hook(self._begin),
            body.register_forward_hook(self._end, always_call=True),
        ]
        hooks += [spec.module.register_forward_hook(self._hook_of(spec)) for spec in self.specs]
        self._handles = hooks
        self._set_top_k()
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.forget()
        self._set_top_k()

    @contextlib.contextmanager
    def using(self, rule: str) -> Iterator[None]:
        """Route by `rule` inside, and as before outside."""
        former = self.rule
        self.use(rule)
        try:
            yield
        finally:
            self.use(former)

    def use(self, rule: str) -> None:
        """Route by `rule` from here on."""
        assert rule in RULES
        self.rule = rule
        self._set_top_k()

    @contextlib.contextmanager
    def same_draws(self) -> Iterator[None]:
        """Leave the draws that follow as if what happens inside had drawn none."""
        state = self.state_dict()
        yield
        self.load_state_dict(state)

    @property
    def logits(self) -> list[Tensor]:
        """Each router's logits in the last forward, float [B * T, E], with their graph if they have one."""
        return [self._logits[spec.name] for spec in self.specs]

    def state_dict(self) -> dict:
        """The state of the draws."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Put it back."""
        self._generator.set_state(state["generator"])

    def _begin(self, module, args) -> None:
        self.forget()
        self._records = True

    def _end(self, module, args, output) -> None:
        self._records = False  # what runs from here on is computed anew in backward

    def forget(self) -> None:
        """Let go of the last forward's logits and draws, and of the graph that hangs on them."""
        self._left_out.clear()
        self._logits.clear()

    def _set_top_k(self) -> None:
        """A block that chooses by itself chooses as many as the rule says; its own number outside the context."""
        for spec in self.specs:
            if spec.gate.returns == "logits":
                active = {"native": self._top_k[spec.name], "all": spec.num_experts, "ka": spec.num_experts - 1}
                block: Any = spec.block
                block.top_k = active[self.rule if self._handles else "native"]

    def _hook_of(self, spec: RouterSpec) -> Callable:
        def hook(module, args, output):
            logits = logits_of(spec, output)
            if self._records:
                self._logits[spec.name] = logits
            if self.rule == "native":
                return None
            left_out = None
            if self.rule == "ka":
                if spec.name not in self._left_out:
                    self._left_out[spec.name] = self._draw(logits.detach())
                left_out = self._left_out[spec.name]
            return _replaced(spec, output, logits, left_out)

        return hook

    def _draw(self, logits: Tensor) -> Tensor:
        """The expert that each token does without: int64 [N]."""
        logits = logits.float()
        uniform = torch.rand(logits.shape, generator=self._generator, device=logits.device)
        coin = torch.rand(len(logits), 1, generator=self._generator, device=logits.device) < self.ka_lambda
        # The order of logits with Gumbel noise is that of draws without replacement: the last one is not drawn.
        gumbel = -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()
        return (logits + torch.where(coin, gumbel, 0.0)).argmin(-1)


def logits_of(spec: RouterSpec, output) -> Tensor:
    """A router's logits among what its module returns: float [N, E]."""
    if spec.gate.returns == "logits":
        return output
    if spec.gate.returns == "weights":
        return output[0]
    logits = output[1] if spec.gate.returns == "scores" else output[2]
    return logits.flatten(0, -2)


def weights_of(gate: Gate, logits: Tensor, indices: Tensor | None = None) -> Tensor:
    """Weights of the chosen experts, all of them if `indices` is None.

    w[n, j] = scale * s[n, i(j)] / sum over chosen i of s[n, i],   s = softmax(z) or sigmoid(z), at least in float32

    Not divided where the model itself does not, but for a softmax over all experts, which needs no division.

    logits: float [N, E]; indices: int64 [N, k]
    Returns: float [N, k] or [N, E]
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = logits.softmax(-1) if gate.score == "softmax" else logits.sigmoid()
    scores = scores if indices is None else scores.gather(-1, indices)
    if gate.normalised:
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    return scores * gate.scale


def _replaced(spec: RouterSpec, output, logits: Tensor, left_out: Tensor | None):
    """What the router is to return instead: all experts, or all but one for each token."""
    gate, num_experts = spec.gate, spec.num_experts
    everyone = torch.arange(num_experts, device=logits.device)
    if gate.returns != "weights":
        dropped = None if left_out is None else everyone == left_out[:, None]
        masked = logits if dropped is None else logits.masked_fill(dropped, -torch.inf)
        if gate.returns == "logits":  # the block around it does the rest
            return masked
        scores = weights_of(gate, masked).to(output[0].dtype)
        return (scores, *output[1:])
    if left_out is None:
        indices, weights = everyone.expand(len(logits), -1), weights_of(gate, logits)
    else:
        others = everyone[:-1]
        indices = others + (others >= left_out[:, None])
        # The paper's weights are a softmax over what is left, whatever the model's own do.
        renormalised = Gate(gate.score, gate.normalised or gate.score == "softmax", gate.returns, gate.scale)
        weights = weights_of(renormalised, logits, indices)
    return (logits, weights.to(output[1].dtype), indices.to(output[2].dtype))


def verify(model: nn.Module, specs: list[RouterSpec], forward: Callable[[], object]) -> list[RouterSpec]:
    """Compare one native forward with what is known of each router; a gate found by structure is recognised by it.

    forward: runs `model` on some tokens
    Returns: the specs, every gate known
    Raises: UsageError where a router was not asked, returns probabilities as its logits, or weighs its experts in a
    way that is not known
    """
    seen: dict[str, object] = {}

    def hook_of(name: str):
        def keep(module, args, output) -> None:
            seen[name] = output

        return keep

    handles = [spec.module.register_forward_hook(hook_of(spec.name)) for spec in specs]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return [_verified(spec, seen.get(spec.name)) for spec in specs]


def _verified(spec: RouterSpec, output) -> RouterSpec:
    kind = type(spec.module).__name__
    if output is None:
        raise UsageError(f"--router_patterns: {spec.name} takes no part in a forward of the teacher; leave it out")
    known = spec.gate.score != "unknown"
    if not known and not _looks_like_weights(spec, output):
        raise UsageError(
            f"--routing: {spec.name} ({kind}) does not return logits, weights and indices, so it cannot be given "
            "another routing; use --routing native"
        )
    logits = logits_of(spec, output).float()
    if bool((logits >= 0).all()) and bool(((logits.sum(-1) - 1).abs() < 1e-2).all()):
        raise UsageError(
            f"--routing: {spec.name} ({kind}) returns probabilities as its logits, as transformers before 5.6 did; "
            "use transformers 5.6 or later, or --routing native"
        )
    if known:
        return spec
    candidates = [Gate(score, normalised) for score in ("softmax", "sigmoid") for normalised in (True, False)]
    _, weights, indices = output
    for gate in candidates:
        expected = weights_of(gate, logits, indices.long())
        scale = (weights.float().sum() / expected.sum()).item()
        if (weights.float() - scale * expected).abs().max() <= _TOLERANCE * max(1.0, scale) * expected.max():
            gate = Gate(gate.score, gate.normalised, "weights", round(scale, 2))
            return RouterSpec(
                spec.name, spec.module, spec.block, spec.num_experts, spec.top_k, gate, spec.trainable, spec.found_by
            )
    raise UsageError(
        f"--routing: how {spec.name} ({kind}) weighs its experts is not known (neither a softmax nor a sigmoid of its "
        "logits); use --routing native"
    )


def _looks_like_weights(spec: RouterSpec, output) -> bool:
    if not (isinstance(output, tuple) and len(output) == 3 and all(isinstance(part, Tensor) for part in output)):
        return False
    logits, weights, indices = output
    return (
        logits.ndim == 2
        and logits.shape[1] == spec.num_experts
        and weights.shape == indices.shape == (len(logits), spec.top_k)
        and not indices.is_floating_point()
    )
