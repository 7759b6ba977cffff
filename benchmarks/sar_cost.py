"""The cost of trained routers: time of a step by routing, teacher forwards, bytes saved for backward.

    python benchmarks/sar_cost.py

The embedded pair and its text in one process; everything is timed in turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from sar_kd import embedded
from sar_kd.config.presets import MODES
from sar_kd.config.runs import Config
from sar_kd.data.batch import Batch
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.losses.objective import Objective
from sar_kd.models.loading import load_models
from sar_kd.runtime.precision import setup_precision
from sar_kd.teacher.live import LiveTeacher
from sar_kd.teacher.moe.router_training import FROZEN_ROUTERS
from sar_kd.training.guards import StepGuard
from sar_kd.training.optimizer import build_optimizer
from sar_kd.training.step import StepContext, train_step

RESULT = Path(__file__).parent / "results" / "sar_cost.json"
SAR = {"routing": "sar", "sar_routing": "all"}
VARIANTS = {
    "native": {"routing": "native"},
    "all": {"routing": "all"},
    "ka": {"routing": "ka"},
    "two_stage": {**SAR, "sar_schedule": "two_stage"},
    "joint": {**SAR, "sar_schedule": "joint"},
    "joint, checkpointing": {**SAR, "sar_schedule": "joint", "activation_checkpointing": True},
    "two_stage, own routing": {"routing": "sar", "sar_routing": "native", "sar_schedule": "two_stage"},
    "joint, own routing": {"routing": "sar", "sar_routing": "native", "sar_schedule": "joint"},
}


class Run:
    """One routing of the embedded pair, ready to step."""

    def __init__(self, flags: dict, texts: dict[str, str], batch_size: int, block_size: int):
        values = {**MODES["precise"], "student_lr": 1e-3, "router_lr": 1e-3, **flags}
        self.config = Config.from_options(values, "precise")
        self.precision = setup_precision(self.config.precision, 0)
        self.models = load_models(self.config, self.precision)
        limits = block_size, 8 * block_size
        corpus = build_dataset(
            [Document(*item) for item in texts.items()],
            self.models.tokenizers,
            *limits,
            loss_workspace_mb=self.config.loss.loss_workspace_mb,
        )
        loss = self.config.loss
        self.objective = Objective(self.models.teacher, self.models.student, loss, corpus.aligner, self.precision)
        self.optimizer = build_optimizer(self.models.student, self.config.optim)
        self.guard = StepGuard(self.config.guards)
        self.routing = LiveTeacher(self.config, self.objective, corpus.aligner)
        self.batch = corpus.batch(list(range(batch_size)))

    def step(self) -> None:
        """One attempted update; what it measures for the log is left out."""
        routers = self.routing.router_trainer or FROZEN_ROUTERS
        context = StepContext(self.objective, self.optimizer, self.guard, self.precision, 1.0, routers)
        with self.routing:
            train_step([self.batch], context)

    def forward(self) -> None:
        """The teacher alone, without a graph."""
        with self.routing, torch.no_grad():
            self.models.teacher(input_ids=self.batch.teacher.input_ids, use_cache=False)

    def forward_and_backward(self) -> None:
        """The teacher with the routers' graph, and backward through it."""
        with self.routing:
            logits = self.models.teacher(input_ids=self.batch.teacher.input_ids, use_cache=False).logits
            logits.backward(torch.ones_like(logits))
        for parameter in self.routing.router_trainer.parameters.values():
            parameter.grad = None

    def saved_bytes(self) -> tuple[int, int]:
        """Bytes kept for backward in the routers' pass, and those of them that the teacher keeps; weights left out.

        A recomputed layer keeps its inputs, which the graph does not show; they are counted with it.
        """
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.models.teacher.parameters()}
        layers = self.models.teacher.model.layers
        with self.routing:
            teacher = _kept(lambda: self._read(self.batch), layers, weights)
            trainer = self.routing.router_trainer
            whole = _kept(lambda: trainer.terms(self.batch, self._read(self.batch)).total, layers, weights)
        return whole, teacher

    def _read(self, batch: Batch):
        return self.objective.forward_models(batch, student_grad=False, teacher_grad=True)


def _kept(make: Callable[[], object], layers, weights: set[int]) -> int:
    alive, inputs = {}, {}

    def keep(tensor: torch.Tensor, where: dict) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            where[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no address is used twice
        return tensor

    def keep_inputs(module, args, kwargs) -> None:
        for value in [*args, *kwargs.values()]:
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, torch.Tensor):
                    keep(tensor, inputs)

    handles = [layer.register_forward_pre_hook(keep_inputs, with_kwargs=True) for layer in layers]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: keep(tensor, alive), lambda tensor: tensor):
        result = make()
    for handle in handles:
        handle.remove()
    total = sum(size for size, _ in {**inputs, **alive}.values())
    del result
    gc.collect()
    return total


def _in_turns(actions: dict[str, Callable[[], None]], rounds: int, warmup: int) -> dict[str, float]:
    """Median seconds of each action, one after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(warmup + rounds):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--block_size", type=int, default=128)
    options = parser.parse_args()
    (texts,) = embedded.read_text("transfer")
    texts = dict(list(texts.items())[:200])
    runs = {name: Run(flags, texts, options.batch_size, options.block_size) for name, flags in VARIANTS.items()}
    parts = {"forward": runs["all"].forward, "forward and backward": runs["joint"].forward_and_backward}
    parts["forward and backward, checkpointing"] = runs["joint, checkpointing"].forward_and_backward
    teacher = _in_turns(parts, options.rounds, options.warmup)
    steps = _in_turns({name: run.step for name, run in runs.items()}, options.rounds, options.warmup)
    kept = {name: runs[name].saved_bytes() for name in ("joint", "joint, checkpointing")}
    print("| step | ms | of plain KD |\n|---|---:|---:|")
    for name, seconds in steps.items():
        print(f"| {name} | {1e3 * seconds:.0f} | {seconds / steps['native']:.2f} |")
    forwards = {name: seconds / teacher["forward"] for name, seconds in teacher.items()}
    print("\nTeacher, every expert active, in forwards: " + ", ".join(f"{n} {f:.2f}" for n, f in forwards.items()))
    shares = [a / b for a, b in zip(kept["joint, checkpointing"], kept["joint"], strict=True)]
    for what, i in (("routers' whole pass", 0), ("teacher", 1)):
        plain, anew = (kept[name][i] / 1e6 for name in ("joint", "joint, checkpointing"))
        print(f"Saved for backward, {what}: {plain:.1f} MB, with checkpointing {anew:.1f} MB ({shares[i]:.1%})")
    record = {"threads": torch.get_num_threads(), "torch": torch.__version__, **vars(options)}
    record |= {"step_seconds": steps, "teacher_seconds": teacher, "kept_bytes": kept}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
