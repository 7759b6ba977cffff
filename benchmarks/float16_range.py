"""What it costs a model to stay in float16's range, and what it says then: layers alone, beside plain float16 autocast.

    python benchmarks/float16_range.py MODEL_DIRECTORY TEXT_FILE [--trains]

Text: the first 512 tokens. Times: medians of 5 on one core, in turn. Memory: the peak beside weights, as PyTorch counts
it. Bits per byte: of the text, without its first token; those of float32 too.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from sar_kd.models.half_precision import compute_in_range_
from sar_kd.models.loading import load_for_generation
from sar_kd.runtime.precision import Precision

CPU = torch.device("cpu")
FLOAT32, FLOAT16 = (Precision(CPU, dtype, 1.0) for dtype in (torch.float32, torch.float16))


def allocated(act: Callable[[], None]) -> int:
    """Bytes at the peak, beyond what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        act()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@torch.no_grad()
def bits_per_byte(model, ids: torch.Tensor, num_bytes: int, precision: Precision) -> float:
    with precision.autocast():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    parts = zip(logits.split(64), ids[0, 1:].split(64), strict=True)
    nats = sum(torch.nn.functional.cross_entropy(z.float(), t, reduction="sum").double().item() for z, t in parts)
    return nats / math.log(2) / num_bytes


def run_layers(model, ids: torch.Tensor, trains: bool) -> None:
    with torch.set_grad_enabled(trains), FLOAT16.autocast():
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if trains:
        FLOAT16.backward(states.float().square().mean())
        model.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--trains", action="store_true", help="float32 weights and a backward, as a student has")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_for_generation("teacher_model", options.model, False)
    ids = tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"][:512]
    num_bytes = len(tokenizer.decode(ids[1:]).encode())
    ids = torch.tensor([ids])
    print(f"float32: {bits_per_byte(model, ids, num_bytes, FLOAT32):.5f} bits per byte")
    plain = model.requires_grad_(options.trains) if options.trains else model.requires_grad_(False).half()
    models = {"plain": plain, "in range": copy.deepcopy(plain, {id(p): p for p in plain.parameters()})}
    compute_in_range_(models["in range"])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(6):
        for name, each in models.items():
            start = time.process_time()
            run_layers(each, ids, options.trains)
            if turn:
                seconds[name].append(time.process_time() - start)
    for name, each in models.items():
        peak = allocated(lambda each=each: run_layers(each, ids, options.trains)) / 1e6
        bits = bits_per_byte(each, ids, num_bytes, FLOAT16)
        print(f"{name}: {statistics.median(seconds[name]):.2f} s, {peak:.1f} MB, {bits:.5f} bits per byte")


if __name__ == "__main__":
    main()
