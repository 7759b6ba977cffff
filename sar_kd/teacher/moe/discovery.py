"""Finds the routers of a mixture-of-experts model, and how each of them weighs its experts.

Routers are found by class name where transformers' class is known, else by structure, or by `--router_patterns`. All
are validated: a module that looks like a feed-forward gate, has another width than there are experts, or is too large
for a router is an error, because training the wrong tensor would go unnoticed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from sar_kd.config.installation import program_name
from sar_kd.errors import UsageError

MAX_PARAMETER_SHARE = 0.01
"""Of a model's parameters; the routers of published models hold 0.002 to 0.04 %."""

# Parameters of router modules that are not trained: balancing statistics and fixed tables.
_NEVER_TRAINED = ("e_score_correction_bias", "balancing_biases", "tid2eid", "moe_statics", "per_expert_scale")

_NO_ROUTER = re.compile(r"(gate|up|down|gate_up|[qkvo])_proj|shared_(expert|experts|mlp)(_gate)?|lm_head|embed_tokens")

CONFIG_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Settings that hold the number of experts"""


@dataclass(frozen=True)
class Gate:
    """How a router turns logits into expert weights: weight = scale * score, for the chosen experts."""

    score: str
    """'softmax' or 'sigmoid'; 'unknown' for a router found by structure, until `routing_hooks.verify` recognises it"""
    normalised: bool | str
    """The weights of the chosen experts sum to `scale`; a string names the attribute of the router that holds this"""
    returns: str = "weights"
    """What the router module returns:

    weights  (logits, weights [N, k], indices [N, k])
    scores   (scores [N, E], logits): every expert computes, scaled by its score
    logits   logits alone: the block around it selects `top_k` experts
    native   an output for which only the model's own routing is possible"""
    scale: float = 1.0


_CLASSES = {
    Gate("softmax", True): """
        MixtralTopKRouter MiniMaxTopKRouter Qwen3_5MoeTopKRouter Qwen3VLMoeTextTopKRouter GptOssTopKRouter
        GraniteMoeTopKRouter GraniteMoeHybridTopKRouter GraniteMoeSharedTopKRouter AriaTextTopKRouter
        Ernie4_5_MoeTopKRouter HunYuanMoEV1Gate""",
    Gate("softmax", "norm_topk_prob"): """
        Qwen2MoeTopKRouter Qwen3MoeTopKRouter Qwen3NextTopKRouter OlmoeTopKRouter FlexOlmoTopKRouter""",
    Gate("softmax", False): "DeepseekV2TopkRouter JambaTopKRouter",
    Gate("softmax", True, scale=2.0): "PhimoeTopKRouter",  # two slots, each normalised on its own
    Gate("sigmoid", "norm_topk_prob"): "DeepseekV3TopkRouter Glm4MoeTopkRouter Dots1TopkRouter ExaoneMoeTopkRouter",
    Gate("sigmoid", True): "MiniMaxM2TopKRouter",
    Gate("sigmoid", False, "scores"): "Llama4Router",
    Gate("softmax", True, "logits"): "DbrxRouter",
    Gate("softmax", False, "native"): "SwitchTransformersTop1Router NllbMoeTop2Router JetMoeTopKGating",
}

REGISTRY = {name: gate for gate, names in _CLASSES.items() for name in names.split()}

_FIXED_TOP_K = {"SwitchTransformersTop1Router": 1, "NllbMoeTop2Router": 2, "PhimoeTopKRouter": 2}


@dataclass(frozen=True)
class RouterSpec:
    """One router of a model."""

    name: str
    """Full name of the module"""
    module: nn.Module
    block: nn.Module
    """The module that contains the router and its experts"""
    num_experts: int
    top_k: int
    gate: Gate
    """`normalised` and `scale` as this router has them"""
    trainable: tuple[str, ...]
    """Full names of the parameters that produce the logits"""
    found_by: str
    """'class', 'structure' or 'pattern'"""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, by full name."""
        return {name: self.module.get_parameter(name.removeprefix(f"{self.name}.")) for name in self.trainable}

    @property
    def overridable(self) -> bool:
        """Its routing can be replaced."""
        return self.gate.returns != "native"

    @property
    def has_native_gradient(self) -> bool:
        """Its logits get a gradient under the model's own routing; a single weight that is always 1 has none."""
        return not (self.top_k == 1 and self.gate.normalised)


def find_routers(model: nn.Module, patterns: tuple[str, ...] = ()) -> list[RouterSpec]:
    """Every router of `model`, in the order of its modules, validated; empty for a dense model.

    patterns: regular expressions for the full names of the routers; empty to find them by class and structure
    Raises: UsageError naming the module and the reason, if a module found cannot be a router
    """
    modules = dict(model.named_modules())
    blocks = {name: module for name, module in modules.items() if experts_of(module) is not None}
    if patterns:
        chosen = _matching(modules, patterns)
    else:
        chosen = {name: "class" for name, module in modules.items() if type(module).__name__ in REGISTRY}
        for name in set(blocks) - set(map(_parent, chosen)):
            chosen |= dict.fromkeys(_by_structure(name, blocks[name], _num_experts(model, blocks[name])), "structure")
    specs = [_spec(model, modules, name, chosen[name]) for name in modules if name in chosen]
    _validate(model, specs, blocks)
    return specs


def _matching(modules: dict[str, nn.Module], patterns: tuple[str, ...]) -> dict[str, str]:
    matched: dict[str, str] = {}
    for pattern in patterns:
        try:
            found = [name for name in modules if re.fullmatch(pattern, name)]
        except re.error as error:
            raise UsageError(f"--router_patterns {pattern}: is no regular expression ({error})") from None
        if not found:
            raise UsageError(
                f"--router_patterns {pattern}: matches the full name of no module; "
                f"`{program_name()} routers --model M` lists the routers found without it"
            )
        matched |= dict.fromkeys(found, "pattern")
    return matched


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def experts_of(module: nn.Module) -> nn.Module | None:
    """The child that holds the routed experts. Shared experts run for every token and have no router."""
    for name, child in module.named_children():
        if name.endswith("experts") and not name.startswith("shared") and next(child.parameters(), None) is not None:
            return child
    return None


def _num_experts(model: Any, block: nn.Module) -> int | None:
    """Number of experts of a block, from its modules and tensors, else from the config; None if unknown."""
    experts: Any = experts_of(block)
    if experts is not None:
        if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
            return sum(next(child.parameters(), None) is not None for child in experts.children())
        stacked = [parameter.shape[0] for parameter in experts.parameters() if parameter.ndim == 3]
        if stacked:
            return stacked[0]
        if isinstance(getattr(experts, "num_experts", None), int):
            return experts.num_experts
    text = model.config.get_text_config()
    counts = [getattr(text, name, None) for name in CONFIG_COUNTS]
    return next((count for count in counts if isinstance(count, int)), None)


def _by_structure(name: str, block: nn.Module, num_experts: int | None) -> list[str]:
    """Children of a block with a weight matrix [experts, ...]."""
    return [
        f"{name}.{child_name}"
        for child_name, child in block.named_children()
        if child is not experts_of(block) and not _NO_ROUTER.fullmatch(child_name)
        if any(p.ndim == 2 and p.shape[0] == num_experts for p in child.parameters())
    ]


def _spec(model: nn.Module, modules: dict[str, nn.Module], name: str, found_by: str) -> RouterSpec:
    module, block = modules[name], modules[_parent(name)]
    module_class = type(module).__name__
    refused = [part for part in name.split(".") if _NO_ROUTER.fullmatch(part)]
    if refused:
        raise UsageError(
            f"--router_patterns: {name} is no router ('{refused[0]}' names a feed-forward, attention or shared-expert "
            "part); give patterns that match routers only"
        )
    own = dict(module.named_parameters())
    trainable = tuple(f"{name}.{key}" for key in own if not any(part in _NEVER_TRAINED for part in key.split(".")))
    num_experts = _num_experts(model, block)
    matrices = [own[key.removeprefix(f"{name}.")] for key in trainable]
    widths, ranks = {parameter.shape[0] for parameter in matrices}, {parameter.ndim for parameter in matrices}
    if num_experts is None or widths != {num_experts} or max(ranks) != 2:
        shapes = ", ".join(f"{key} {tuple(p.shape)}" for key, p in own.items()) or "no parameters"
        raise UsageError(
            f"--router_patterns: {name} ({shapes}) cannot be a router of {num_experts or 'no'} experts, "
            "whose weight has one row for each; give patterns that match routers only"
        )
    gate = REGISTRY.get(module_class, Gate("unknown", False))
    normalised = getattr(module, gate.normalised) if isinstance(gate.normalised, str) else gate.normalised
    if gate.returns == "logits":
        normalised = block.moe_normalize_expert_weights is not None
    scale = gate.scale * getattr(module, "routed_scaling_factor", 1.0)
    gate = Gate(gate.score, bool(normalised), gate.returns, float(scale))
    top_k = _FIXED_TOP_K.get(module_class) or getattr(module, "top_k", None) or getattr(block, "top_k", None)
    if top_k is None:
        raise UsageError(f"--router_patterns: {name} ({module_class}) has no number of experts per token (top_k)")
    return RouterSpec(name, module, block, num_experts, top_k, gate, trainable, found_by)


def _validate(model: nn.Module, specs: list[RouterSpec], blocks: dict[str, nn.Module]) -> None:
    by_block: dict[str, list[str]] = {}
    for spec in specs:
        by_block.setdefault(_parent(spec.name), []).append(spec.name)
    missed = sorted(set(blocks) - set(by_block))
    if missed:
        raise UsageError(
            f"--router_patterns: no router found for {len(missed)} of {len(blocks)} blocks of experts, the first is "
            f"{missed[0]}; name all routers with full-name regular expressions"
        )
    for block, names in sorted(by_block.items()):
        if len(names) > 1:
            raise UsageError(
                f"--router_patterns: {' and '.join(names)} would both route {block}; name the one that does"
            )
    total = sum(parameter.numel() for parameter in model.parameters())
    routers = sum(parameter.numel() for parameter in router_parameters(specs).values())
    if routers > MAX_PARAMETER_SHARE * total:
        raise UsageError(
            f"--router_patterns: the routers found hold {routers / total:.1%} of the model's parameters, more than the "
            f"{MAX_PARAMETER_SHARE:.0%} that a router can be; give patterns that match routers only"
        )


def require_routers(model: nn.Module, specs: list[RouterSpec], routing: str, trains_natively: bool) -> None:
    """Raise UsageError, with the reason and the remedy, if the routers of `model` do not support a routing.

    routing: 'all', 'sar' or 'ka'; trains_natively: under the model's own routing (`--sar_routing native`)
    """
    if not specs:
        count = _num_experts(model, model) or 0
        reason = (
            f"the teacher's config names {count} experts, but none of its modules looks like a router; name them with "
            "--router_patterns"
            if count > 1
            else "the teacher is dense, it has no routers; use --routing native, or a mixture-of-experts teacher"
        )
        raise UsageError(f"--routing {routing}: {reason}")
    fixed = [spec for spec in specs if not spec.overridable]
    if fixed and not trains_natively:
        raise UsageError(
            f"--routing {routing}: {type(fixed[0].module).__name__} ({fixed[0].name}) allows no routing but its own; "
            "use --routing native"
        )
    without_gradient = [spec for spec in specs if not spec.has_native_gradient]
    if without_gradient and trains_natively:
        raise UsageError(
            f"--sar_routing native: {without_gradient[0].name} takes one expert and normalises its weight, which is "
            "then 1 for any logits, so its gradient is identically zero; use --sar_routing all"
        )


def router_parameters(specs: list[RouterSpec]) -> dict[str, nn.Parameter]:
    """The trainable parameters of all routers, by full name."""
    return {name: parameter for spec in specs for name, parameter in spec.parameters.items()}


def describe_routers(specs: list[RouterSpec]) -> list[dict]:
    """A JSON-compatible record for each router."""
    return [
        {
            "name": spec.name,
            "class": type(spec.module).__name__,
            "shapes": {name: list(parameter.shape) for name, parameter in spec.parameters.items()},
            "num_experts": spec.num_experts,
            "top_k": spec.top_k,
            "score": spec.gate.score,
            "normalised": spec.gate.normalised,
            "scale": spec.gate.scale,
            "routing": "any" if spec.overridable else "native only",
            "native_gradient": spec.has_native_gradient,
            "found_by": spec.found_by,
            "trainable": sum(parameter.numel() for parameter in spec.parameters.values()),
        }
        for spec in specs
    ]
