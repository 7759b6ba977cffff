"""Routers on held-out text: entropy, expert usage, and alarms when the teacher drifts or its routers collapse."""

from __future__ import annotations

import torch

from sar_kd.data.batch import TokenBatch
from sar_kd.evaluation.perplexity import Evaluation
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.teacher.moe.router_training import entropy, router_probs
from sar_kd.teacher.moe.routing_hooks import Routing

MAX_DRIFT = 0.02
"""Alarm when the teacher's perplexity has risen by more than this share."""

MIN_ENTROPY_RATIO = 0.5
"""Alarm when the routers' mean entropy has fallen below this share of its initial value."""


class RouterStatistics:
    """Entropy and expert usage, summed over the batches of an evaluation."""

    def __init__(self, routing: Routing, process_group: ProcessGroup = SINGLE_PROCESS):
        self.routing, self.process_group = routing, process_group
        self._entropy = self._num_positions = 0.0
        self._counts = [torch.zeros(spec.num_experts) for spec in routing.specs]

    def add(self, batch: TokenBatch) -> None:
        """Add the last forward, which was on `batch`."""
        for spec, counts, logits in zip(self.routing.specs, self._counts, self.routing.logits, strict=True):
            logits = logits[batch.positions.to(logits.device)]
            self._entropy += entropy(router_probs(spec.gate, logits)).sum().item() / len(self._counts)
            chosen = logits.topk(spec.top_k).indices.flatten().cpu()
            counts += torch.bincount(chosen, minlength=spec.num_experts)
        self._num_positions += len(batch.positions)

    def metrics(self) -> dict:
        """Over all ranks; {} without routers.

        router_entropy  mean entropy in [0, 1]
        router_usage    for each router, the share of each expert among the top k of all tokens
        """
        if not self.routing.specs:
            return {}
        entropies, num_positions, *flat_counts = self.process_group.all_reduce_sum(
            [self._entropy, self._num_positions, *torch.cat(self._counts).tolist()]
        )
        by_router = torch.tensor(flat_counts).split([len(counts) for counts in self._counts])
        usage = {
            spec.name: [round(share, 4) for share in (counts / counts.sum()).tolist()]
            for spec, counts in zip(self.routing.specs, by_router, strict=True)
        }
        return {"router_entropy": entropies / num_positions, "router_usage": usage}


def teacher_metrics(evaluation: Evaluation, routing: str) -> dict[str, float]:
    """The teacher's metrics for the run log. routing: 'native', or 'routed' for the run's routing."""
    names = ("val_ppl", "val_bits_per_byte", "val_nonfinite")
    return {f"teacher_{name}_{routing}": value for name, value in evaluation.metrics().items() if name in names}


def find_alarms(start: dict, now: dict) -> list[tuple[str, str]]:
    """The alarms that the metrics `now` raise lookup those at the `start` of the run: a name and a line each."""
    found = []
    remedy = "raise --router_anchor or lower --router_lr"
    for routing in ("native", "routed"):
        before, after = (metrics[f"teacher_val_ppl_{routing}"] for metrics in (start, now))
        if not after <= (1 + MAX_DRIFT) * before:  # nan raises an alarm too
            line = (
                f"the teacher's perplexity ({routing} routing) went from {before:.2f} to {after:.2f}, by more than "
                f"{MAX_DRIFT:.0%}: its routers follow the student too far; {remedy}"
            )
            found.append((f"drift_{routing}", line))
    before, after = start["router_entropy"], now["router_entropy"]
    if not after >= MIN_ENTROPY_RATIO * before:
        line = (
            f"the routers' entropy fell from {before:.3f} to {after:.3f}, below {MIN_ENTROPY_RATIO:.0%}: they collapse "
            f"onto few experts; {remedy}"
        )
        found.append(("entropy", line))
    return found
