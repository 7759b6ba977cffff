"""Where the time of a step goes on real models, beside the least that it could cost.

    python benchmarks/real_models.py --prepare            # once
    python benchmarks/real_step.py [--model_dtype float32 float16] [--rounds 5]

Two pairs, one block of text a step, `--mode precise`: SmolLM2-135M-Instruct over itself without 10 of its layers (equal
tokenizers), and Gemma 3 270M over the same student (different ones: 262,144 tokens onto 49,152).

    teacher   its forward up to the LM head
    student   the same
    loss      both heads, the comparison, the gradients of the student's head and hidden states
    backward  the student's layers
    update    unscale, norm, clip, AdamW
    step      `training.step.train_step`, which is all of these and the guards
    floor     of `step_floor.py`: the teacher's forward with its logits; the student's forward, cross-entropy and
              backward; AdamW; without this package

Sides take turns in one process. The ratio of a step to its floor is a median over rounds, with quartiles; "beside
equal" divides it by that of equal tokenizers: what the projection adds beyond a teacher of another size.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from pathlib import Path

import torch
from growth import by_parts
from paired import NEVER_SKIPS, Clock, Run, add_flags, device_of, ratio_of, take_turns, write
from real_models import flags_of
from step_floor import Floor

from sar_kd.data.batch import Batch
from sar_kd.models.lm_head import forward_to_lm_head

PARTS = ("teacher", "student", "loss", "backward", "update")


class Pair:
    """One pair of models up to its first step, and what is timed of it."""

    def __init__(self, flags: list[str], clock: Clock):
        self.run, self.clock, self.parts = Run(flags), clock, []
        self.floor = Floor(self.run)

    def sides(self) -> dict:
        """Seconds of a step's number, by side."""
        return {"floor": self._floor, "step": self._step, "parts": self._parts}

    def _batch(self, number: int) -> Batch:
        (batch,) = self.run.batches(number)
        return batch.to(self.run.precision.device)

    def _floor(self, number: int) -> float:
        batch = self._batch(number)

        def act() -> None:
            self.floor.read_teacher(batch)
            self.floor.train(batch)

        return self.clock(act)

    def _step(self, number: int) -> float:
        return self.clock(functools.partial(self.run.step, [self._batch(number)]))

    def _parts(self, number: int) -> float:
        batch, objective = self._batch(number), self.run.objective
        head = objective.heads.of(objective.teacher)
        call = (objective.teacher, head, batch.teacher.input_ids, self.run.precision)
        with torch.no_grad():
            teacher = self.clock(functools.partial(forward_to_lm_head, *call))
        found = by_parts(self.run, batch, self.clock)
        found |= {"teacher": teacher, "student": found.pop("forward") - teacher}
        self.parts.append(found)
        return sum(found.values())


def measure(flags: list[str], clock: Clock, rounds: int) -> dict:
    """Figures of one pair in one dtype: ms of each side and part, and the ratio of a step to its floor."""
    pair = Pair(flags, clock)
    seconds = take_turns(pair.sides(), rounds)
    found = {side: 1e3 * statistics.median(seconds[side]) for side in ("floor", "step")}
    found |= {part: 1e3 * statistics.median(each[part] for each in pair.parts[1:]) for part in PARTS}
    return {"ms": found, "ratio": ratio_of(seconds["step"], seconds["floor"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_flags(parser, "real_step.json")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/models/real"), help="of the models and texts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model_dtype", nargs="+", default=["float32"])
    parser.add_argument("--block_size", type=int, default=256)
    options = parser.parse_args()
    clock, results = Clock(device_of(options), options.cpu_time), {}
    print("| pair, dtype | floor, ms | step, ms | to the floor | beside equal | " + " | ".join(PARTS) + " |")
    print("|---" * (5 + len(PARTS)) + "|")
    for dtype in options.model_dtype:
        for name in ("equal", "different"):
            with tempfile.TemporaryDirectory() as scratch:
                flags = [
                    *flags_of(options.folder, name, "english", options.block_size), "--token_cache", scratch,
                    "--device", options.device, "--model_dtype", dtype, "--mode", "precise",
                    "--per_device_batch_size", "1", *NEVER_SKIPS, "--student_lr", "1e-6",
                ]  # fmt: skip
                results[f"{name}, {dtype}"] = found = measure(flags, clock, options.rounds)
            equal = results[f"equal, {dtype}"]["ratio"]
            print(_row(f"{name}, {dtype}", found, found["ratio"].median / equal.median), flush=True)
    write(options, {"rounds": options.rounds, "pairs": results})


def _row(title: str, found: dict, beside: float) -> str:
    ms, ratio = found["ms"], found["ratio"]
    cells = [title, f"{ms['floor']:.0f}", f"{ms['step']:.0f}", str(ratio), f"{beside:.3f}"]
    return "| " + " | ".join([*cells, *(f"{ms[part]:.0f}" for part in PARTS)]) + " |"


if __name__ == "__main__":
    main()
