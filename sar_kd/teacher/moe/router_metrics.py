"""What a teacher's routers do on held-out text, and when it is alarming."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sar_kd.data.batch import TokenBatch
from sar_kd.evaluation.perplexity import Evaluation
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.teacher.moe.router_training import entropy, router_probs
from sar_kd.teacher.moe.routing_hooks import Routing

LARGEST_DRIFT = 0.02
"""Alarm when the teacher's perplexity has risen by this share."""

LEAST_ENTROPY = 0.5
"""Alarm when the routers' mean entropy has fallen below this share of what it was."""


class Shares:
    """Collects what the routers do while a model is evaluated."""

    def __init__(self, routing: Routing, process_group: ProcessGroup = SINGLE_PROCESS):
        self.routing, self.process_group = routing, process_group
        self._entropy = self._count = 0.0
        self._chosen = [torch.zeros(spec.num_experts) for spec in routing.specs]

    def watch(self, batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
        """The same batches; each is looked at once its reader asks for the next one."""
        for batch in batches:
            yield batch
            self._add(batch.rows)  # asked for the next batch, the reader has run the model on this one

    def _add(self, rows: torch.Tensor) -> None:
        for spec, chosen, logits in zip(self.routing.specs, self._chosen, self.routing.logits, strict=True):
            logits = logits[rows.to(logits.device)]
            self._entropy += entropy(router_probs(spec.gate, logits)).sum().item() / len(self._chosen)
            best = logits.topk(spec.top_k).indices.flatten().cpu()
            chosen += torch.bincount(best, minlength=spec.num_experts)
        self._count += len(rows)

    def figures(self) -> dict:
        """Mean entropy in [0, 1], and by router the share of each expert in the tokens' k largest logits; {} without
        routers.
        """
        if not self.routing.specs:
            return {}
        sizes = [len(chosen) for chosen in self._chosen]
        entropies, count, *counts = self.process_group.all_reduce_sum(
            [self._entropy, self._count, *torch.cat(self._chosen).tolist()]
        )
        usage = {
            spec.name: [round(share, 4) for share in (chosen / chosen.sum()).tolist()]
            for spec, chosen in zip(self.routing.specs, torch.tensor(counts).split(sizes), strict=True)
        }
        return {"router_entropy": entropies / count, "router_usage": usage}


def figures_of(evaluation: Evaluation, how: str) -> dict:
    """The teacher's perplexity and bits per byte under 'native' or 'routed', the run's routing."""
    return {
        f"teacher_val_ppl_{how}": evaluation.perplexity,
        f"teacher_val_bits_per_byte_{how}": evaluation.bits_per_byte,
    }


def alarms_of(start: dict, now: dict) -> list[tuple[str, str]]:
    """What is alarming in `now` beside `start`, both as `teacher_routing` measures them: a name and a line each."""
    found = []
    for how in ("native", "routed"):
        before, after = (figures[f"teacher_val_ppl_{how}"] for figures in (start, now))
        if not after <= (1 + LARGEST_DRIFT) * before:  # nan alarms too
            found.append(
                (
                    f"drift_{how}",
                    f"the teacher's perplexity ({how} routing) went from {before:.2f} to {after:.2f}, by more than "
                    f"{LARGEST_DRIFT:.0%}: its routers follow the student too far; raise --router_anchor or lower "
                    "--router_lr",
                )
            )
    before, after = start["router_entropy"], now["router_entropy"]
    if not after >= LEAST_ENTROPY * before:
        found.append(
            (
                "entropy",
                f"the routers' entropy fell from {before:.3f} to {after:.3f}, below {LEAST_ENTROPY:.0%}: they collapse "
                "onto few experts; raise --router_anchor or lower --router_lr",
            )
        )
    return found
