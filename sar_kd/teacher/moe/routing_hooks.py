"""Replaces a model's routing by forward hooks on its routers, while a context is open.

A hook takes the logits that a router computed and returns other weights and indices to the block around it. No
weight, config or module is replaced, and leaving the context restores the model exactly. Setting
`config.num_experts_per_tok` instead would have no effect: routers keep the number that they were built with.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sar_kd.errors import UsageError
from sar_kd.models.lm_head import backbone_of
from sar_kd.teacher.moe.discovery import Gate, RouterSpec

RULES = ("native", "all", "ka")

_TOLERANCE = 2e-2
"""Largest difference of a weight when a gate is recognised by its output, which may be in float16."""


class Routing:
    """The rule by which a model's tokens are sent to its experts. Use as a context.

    native  the model's own routing
    all     every expert, weighted by its probability: softmax over all logits of the router, or normalised sigmoids,
            times the model's own scale
    ka      every expert but one, drawn again in each forward (knowledge augmentation): with probability 1 - lambda the
            one with the smallest logit, else the one that remains when all others are drawn from the gate's
            distribution without replacement; weights normalised over the others

    The dropped expert stays the same until the next forward, so recomputed activations in the backward are equal.
    Source: Kim et al., 2025 (arXiv 2502.12947), sections 3.2 and 3.3
    """

    def __init__(self, model: nn.Module, specs: list[RouterSpec], rule: str, ka_lambda: float = 0.05, seed: int = 0):
        assert rule in RULES
        self.model, self.specs, self.rule, self.ka_lambda = model, specs, rule, ka_lambda
        device = next(model.parameters()).device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._handles: list = []
        self._dropped: dict[str, Tensor] = {}
        self._logits: dict[str, Tensor] = {}
        self._in_forward = False
        self._top_k = {spec.name: spec.block.top_k for spec in specs if spec.gate.returns == "logits"}

    def __enter__(self) -> Routing:
        backbone = backbone_of(self.model)  # runs in every forward, with or without the LM head
        self._handles = [
            backbone.register_forward_pre_hook(self._on_forward_start),
            backbone.register_forward_hook(self._on_forward_end, always_call=True),
            *(spec.module.register_forward_hook(self._hook_of(spec)) for spec in self.specs),
        ]
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
        """Use another rule inside the context."""
        previous = self.rule
        self.use(rule)
        try:
            yield
        finally:
            self.use(previous)

    def use(self, rule: str) -> None:
        """Use another rule from now on."""
        assert rule in RULES
        self.rule = rule
        self._set_top_k()

    @contextlib.contextmanager
    def fork_rng(self) -> Iterator[None]:
        """Restore the random generator at the end of the context."""
        state = self.state_dict()
        try:
            yield
        finally:
            self.load_state_dict(state)

    @property
    def logits(self) -> list[Tensor]:
        """Each router's logits in the last forward, float [B * T, E], with their graph if they have one."""
        return [self._logits[spec.name] for spec in self.specs]

    def forget(self) -> None:
        """Release the logits of the last forward, the graph they hold, and the dropped experts."""
        self._dropped.clear()
        self._logits.clear()

    def state_dict(self) -> dict:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self._generator.set_state(state["generator"])

    def _on_forward_start(self, module, args) -> None:
        self.forget()
        self._in_forward = True

    def _on_forward_end(self, module, args, output) -> None:
        self._in_forward = False  # later calls are recomputations in the backward

    def _hook_of(self, spec: RouterSpec) -> Callable:
        def hook(module, args, output):
            logits = logits_of(spec, output)
            if self._in_forward:
                self._logits[spec.name] = logits
            if self.rule == "native":
                return None
            dropped = None
            if self.rule == "ka":
                if spec.name not in self._dropped:
                    self._dropped[spec.name] = self._draw(logits.detach())
                dropped = self._dropped[spec.name]
            return _replaced(spec, output, logits, dropped)

        return hook

    def _draw(self, logits: Tensor) -> Tensor:
        """The expert that each token drops under ka: int64 [N]."""
        logits = logits.float()
        device = self._generator.device  # a layer of a spread teacher may be on another one
        uniform = torch.rand(logits.shape, generator=self._generator, device=device).to(logits.device)
        is_random = torch.rand(len(logits), 1, generator=self._generator, device=device) < self.ka_lambda
        is_random = is_random.to(logits.device)
        # The order of logits with Gumbel noise is that of draws without replacement: the last one is not drawn.
        gumbel = -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()
        return (logits + torch.where(is_random, gumbel, 0.0)).argmin(-1)

    def _set_top_k(self) -> None:
        """Set how many experts a block that selects them itself takes; its own number outside the context."""
        for spec in self.specs:
            if spec.gate.returns == "logits":
                top_k = {"native": self._top_k[spec.name], "all": spec.num_experts, "ka": spec.num_experts - 1}
                block: Any = spec.block
                block.top_k = top_k[self.rule if self._handles else "native"]


def logits_of(spec: RouterSpec, output) -> Tensor:
    """The router's logits in the output of its module: float [N, E]."""
    if spec.gate.returns == "logits":
        return output
    if spec.gate.returns == "weights":
        return output[0]
    logits = output[1] if spec.gate.returns == "scores" else output[2]
    return logits.flatten(0, -2)


def weights_of(gate: Gate, logits: Tensor, indices: Tensor | None = None) -> Tensor:
    """Weights of the chosen experts; of all experts if `indices` is None.

    w[n, j] = scale * s[n, i(j)] / sum over chosen i of s[n, i],   s = softmax(z) or sigmoid(z), at least in float32

    Without the division where the gate is not normalised; a softmax over all experts needs none.

    logits: float [N, E]; indices: int64 [N, k]
    Returns: float [N, k] or [N, E]
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = logits.softmax(-1) if gate.score == "softmax" else logits.sigmoid()
    scores = scores if indices is None else scores.gather(-1, indices)
    if gate.normalised:
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    return scores * gate.scale


def _replaced(spec: RouterSpec, output, logits: Tensor, dropped: Tensor | None):
    """The output to return from the router: all experts, or all but the dropped one of each token."""
    gate = spec.gate
    experts = torch.arange(spec.num_experts, device=logits.device)
    if gate.returns != "weights":
        masked = logits if dropped is None else logits.masked_fill(experts == dropped[:, None], -torch.inf)
        if gate.returns == "logits":  # the block computes the weights
            return masked
        scores = weights_of(gate, masked).to(output[0].dtype)
        return (scores, *output[1:])
    if dropped is None:
        indices, weights = experts.expand(len(logits), -1), weights_of(gate, logits)
    else:
        others = experts[:-1]
        indices = others + (others >= dropped[:, None])
        # The paper's weights are a softmax over the others, even if the model does not normalise its own.
        renormalised = dataclasses.replace(gate, normalised=gate.normalised or gate.score == "softmax")
        weights = weights_of(renormalised, logits, indices)
    return (logits, weights.to(output[1].dtype), indices.to(output[2].dtype))


def verify(specs: list[RouterSpec], forward: Callable[[], object]) -> list[RouterSpec]:
    """Check each router's spec against one native forward, and recognise the gates of routers found by structure.

    forward: runs their model on some tokens
    Returns: the specs, every gate known
    Raises: UsageError if a router does not run, returns probabilities instead of logits, or weighs its experts in an
    unknown way
    """
    outputs: dict[str, object] = {}

    def hook_of(name: str) -> Callable:
        return lambda module, args, output: outputs.update({name: output})

    with contextlib.ExitStack() as stack, torch.no_grad():
        for spec in specs:
            stack.enter_context(spec.module.register_forward_hook(hook_of(spec.name)))
        forward()
    return [_verified(spec, outputs.get(spec.name)) for spec in specs]


def _verified(spec: RouterSpec, output) -> RouterSpec:
    module_class = type(spec.module).__name__
    if output is None:
        raise UsageError(f"--router_patterns: {spec.name} takes no part in a forward of the teacher; leave it out")
    is_known = spec.gate.score != "unknown"
    if not is_known and not _looks_like_weights(spec, output):
        raise UsageError(
            f"--routing: {spec.name} ({module_class}) does not return logits, weights and indices, so its routing "
            "cannot be replaced; use --routing native"
        )
    logits = logits_of(spec, output).float()
    if bool((logits >= 0).all()) and bool(((logits.sum(-1) - 1).abs() < 1e-2).all()):
        raise UsageError(
            f"--routing: {spec.name} ({module_class}) returns probabilities as its logits, as transformers before 5.6 "
            "did; use transformers 5.6 or later, or --routing native"
        )
    if is_known:
        return spec
    _, weights, indices = output
    for score, normalised in (("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False)):
        gate = Gate(score, normalised)
        expected = weights_of(gate, logits, indices.long())
        scale = (weights.float().sum() / expected.sum()).item()
        if (weights.float() - scale * expected).abs().max() <= _TOLERANCE * max(1.0, scale) * expected.max():
            return dataclasses.replace(spec, gate=dataclasses.replace(gate, scale=round(scale, 2)))
    raise UsageError(
        f"--routing: {spec.name} ({module_class}) weighs its experts in an unknown way (neither a softmax nor a "
        "sigmoid of its logits); use --routing native"
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
