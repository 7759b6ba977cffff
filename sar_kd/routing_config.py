"""Settings of a mixture-of-experts teacher: how it chooses its experts, and how its routers learn."""

from __future__ import annotations

from dataclasses import dataclass

from sar_kd.settings import flag, require, require_at_least, require_positive

ROUTER_PATTERNS = "regular expressions that match the routers' full names; by default class and structure find them"


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Routing: how a mixture-of-experts teacher chooses its experts, and whether its routers learn from the student."""

    routing: str = flag(
        "native",
        "native: the teacher's own; all: every expert; ka: every expert but one, drawn anew; sar: the routers learn "
        "from the student (see --sar_routing); auto: sar for a mixture of experts, native for a dense teacher",
        choices=("auto", "native", "all", "sar", "ka"),
    )
    router_patterns: tuple[str, ...] = flag((), ROUTER_PATTERNS, metavar="REGEX")
    sar_schedule: str = flag(
        "joint",
        "joint: both updates from one teacher forward; two_stage: the routers' first, then the student's with the "
        "updated teacher",
        choices=("two_stage", "joint"),
    )
    sar_routing: str = flag(
        "auto",
        "experts that are active in sar; all: every one; native: the teacher's own choice, cheaper; auto: all, unless "
        "that makes the teacher's perplexity more than 5 %% worse",
        choices=("auto", "all", "native"),
    )
    router_lr: float = flag(1e-5, "peak learning rate of the routers")
    router_beta: float = flag(0.01, "weight of the load balance, CV^2 of the experts' probabilities")
    router_anchor: float = flag(0.1, "weight of the routers' squared distance from where they began, relative")
    router_direction: str = flag(
        "forward",
        "what the routers lower; forward: KL(teacher || student), reverse: KL(student || teacher), jsd: between them",
        choices=("forward", "reverse", "jsd"),
    )
    router_max_grad_norm: float = flag(0.5, "the routers' gradients are clipped to this L2 norm")
    router_stop_on_drift: bool = flag(False, "at an alarm (entropy, teacher perplexity) the routers stop learning")
    activation_checkpointing: bool = flag(
        False, "compute the teacher's activations anew in backward: less memory, one more teacher forward"
    )
    ka_lambda: float = flag(0.05, "ka: probability that a token's experts are drawn instead of taken by rank")
    ka_passes: int = flag(2, "ka: steps in a row on the same text, each with experts drawn anew")

    def __post_init__(self):
        require_at_least(self, 0.0, "router_lr", "router_beta", "router_anchor")
        require_positive(self, "router_max_grad_norm")
        require_at_least(self, 1, "ka_passes")
        require(0.0 <= self.ka_lambda <= 1.0, "ka_lambda", self.ka_lambda, "must be between 0 and 1")
