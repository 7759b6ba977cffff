"""Settings of on-policy distillation: how much of the text the student writes itself, and how it writes."""

from __future__ import annotations

from dataclasses import dataclass

from sar_kd.settings import flag, require, require_at_least, require_positive


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """On-policy: the student learns, from the teacher alone, on what it writes itself."""

    recipe: str = flag(
        "",
        "sar-paper, ka-paper: Algorithm 2, or 1, of arXiv 2502.12947 with its values; says what differs from it",
        choices=("", "sar-paper", "ka-paper"),
    )
    on_policy_fraction: float = flag(
        0.0, "share of the micro-batches in which the student's own text stands behind the prompt; 1: all of them"
    )
    sample_temperature: float = flag(1.0, "temperature at which the student writes; 0: the likeliest token each time")
    sample_top_p: float = flag(1.0, "it draws from the fewest tokens that together have this probability")
    max_new_tokens: int = flag(128, "tokens that it writes at most, within a block")
    replay_size: int = flag(0, "responses to keep and learn from again; 0: each is used once")
    replay_fraction: float = flag(0.5, "share of the on-policy micro-batches that are taken from those kept")

    def __post_init__(self):
        for name in ("on_policy_fraction", "replay_fraction"):
            require(0.0 <= getattr(self, name) <= 1.0, name, getattr(self, name), "must be between 0 and 1")
        require_at_least(self, 0, "sample_temperature", "replay_size")
        require_at_least(self, 1, "max_new_tokens")
        require_positive(self, "sample_top_p")
        require(self.sample_top_p <= 1.0, "sample_top_p", self.sample_top_p, "must be at most 1")
        require(self.replay_fraction < 1.0 or not self.replay_size, "replay_fraction", self.replay_fraction,
                "must be below 1, or nothing would be written")  # fmt: skip
