"""A teacher cache beside a live teacher: size, error of losses and gradients, and memory as the text grows.

    python benchmarks/teacher_cache.py
    python benchmarks/teacher_cache.py --sizes 3 30

With `--keep topk`, whose losses are those of a live teacher cut to its top k; what each kind of cache is worth to a
student: `cache_gain.py`. First: bytes a token, the cost of building, the cost of a batch with its records, and how
far the cached losses and gradients are from the live ones on the same batches; for the embedded pair also where the
text was cut for a student with the teacher's own tokenizer, so that in many blocks the teacher had more context than
the student has. Two pairs: the embedded one, whose tokenizers differ; and a student of 5 M parameters with a
vocabulary of 8,192 that is the teacher's too, made here from a seed. One thread, CPU seconds. The cost of a step with
a cache: `step_floor.py`.

Then, for a text of each of --sizes MB: the peak of the anonymous memory (RssAnon, every 20 ms) of a process that builds
the cache with a tiny teacher, and of one that trains from it, beyond what each had before. Files that are mapped do
not count: the system takes them back. Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from paired import NEVER_SKIPS, Run, Shape, add_flags, device_of, make_pair, write

from sar_kd import embedded
from sar_kd.commands.main import main as run_command
from sar_kd.commands.main import start
from sar_kd.config.commands import CACHE

TOP_K = 32
TINY, FEW_TOKENS, FEW = Shape(32, 1), 512, 4
"""Of the large texts: both models, their vocabulary, and how many tokens of each row are kept"""


def gradient(run: Run, batch) -> tuple[float, torch.Tensor]:
    """The distillation term of a batch, nats a token, and the gradient of the whole loss as one vector."""
    scale = run.precision.loss_scale / batch.num_target_tokens
    terms = run.objective(batch, scale=scale)
    (terms.total * scale).backward()
    found = torch.cat([p.grad.flatten() for p in run.models.student.parameters()]) / run.precision.loss_scale
    run.optimizer.zero_grad(set_to_none=True)
    return float(terms.kd / batch.num_target_tokens), found


def build(flags: list[str], folder: Path) -> dict:
    """Build a cache; its figures, and the CPU seconds that it took."""
    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        found = start(CACHE, [*flags, "--keep", "topk", "--teacher_cache", str(folder)])
    return {**found, "build_seconds": time.process_time() - started}


def measure(flags: list[str], folder: Path) -> dict:
    """Figures of one pair in one dtype."""
    found = build(flags, folder)
    common = [*flags, *NEVER_SKIPS, "--alpha_kd", "0.5", "--alpha_ce", "0.5"]
    stored = Run([*common, "--teacher_cache", str(folder)])
    live = Run([*common, "--teacher_top_k", str(TOP_K)])
    found["off"] = difference(stored, live)
    seconds = []
    for number in range(10):
        started = time.process_time()
        stored.batches(number)
        seconds.append(time.process_time() - started)
    found["collating_ms"] = 1e3 * statistics.median(seconds)
    if "--student_model" not in flags:  # the embedded pair, whose tokenizers differ
        elsewhere = folder.with_name(f"{folder.name}-elsewhere")
        build([*flags, "--student_model", str(embedded.TEACHER_DIR)], elsewhere)
        found["off_elsewhere"] = difference(Run([*common, "--teacher_cache", str(elsewhere)]), live)
    return found


def difference(stored: Run, live: Run, batches: int = 4) -> dict:
    """How far the cached distillation term and the gradient of all are from the live ones; the largest of a few."""
    losses, gradients = [], []
    for number in range(batches):
        (batch,) = stored.batches(number)
        (a, one), (b, other) = gradient(stored, batch), gradient(live, dataclasses.replace(batch, cached_logits=None))
        losses.append(abs(a - b) / abs(b))
        gradients.append(float((one - other).norm() / other.norm()))
    return {"kd_loss": max(losses), "gradient": max(gradients)}


def in_process(argv: list[str]) -> None:
    """Run a command in this process; print its peak memory beyond that before it, MB."""
    from input import Meter, anonymous_mb

    torch.set_num_threads(1)
    before, meter = anonymous_mb(), Meter()
    with contextlib.redirect_stdout(sys.stderr):
        code = run_command(argv)
    print(json.dumps({"code": code, "anonymous_mb": meter.peak - before}))


def memory(size_mb: int, folder: Path, steps: int) -> dict:
    """What building a cache of a text, and training from it, hold beyond what the processes held before."""
    from input import write_text

    folder.mkdir()
    text = folder / "text.txt"
    write_text(text, size_mb * 10**6, "lines")
    flags = make_pair(folder, TINY, TINY, FEW_TOKENS)
    flags += [
        "--train_file",
        str(text),
        "--token_cache",
        str(folder / "tokens"),
        "--teacher_cache",
        str(folder / "kept"),
    ]
    train = ["--train_steps", str(steps), "--eval_steps", str(steps), "--output_dir", str(folder / "run")]
    found: dict = {"text_mb": text.stat().st_size / 1e6}
    for command_name, more in (("cache", ["--keep", "topk", "--teacher_top_k", str(FEW)]), ("train", train)):
        command = [sys.executable, __file__, "--command", command_name, *flags, *more, "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        row = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"code": done.returncode}
        if row["code"]:
            sys.exit(f"{command_name}: {done.stderr[-2000:]}")
        found[f"{command_name}_mb"] = row["anonymous_mb"]
    found["cache_bytes"] = sum(path.stat().st_size for path in (folder / "kept").rglob("*") if path.is_file())
    return found


def main() -> None:
    if sys.argv[1:2] == ["--command"]:
        in_process(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_flags(parser, "teacher_cache.json")
    parser.add_argument("--model_dtype", nargs="*", default=["float32", "float16"])
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 4], help="MB of text, while memory is measured")
    parser.add_argument("--steps", type=int, default=20, help="of the run that trains from it")
    options = parser.parse_args()
    device_of(options)
    torch.set_num_threads(1)
    results: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        print("| pair, dtype | bytes a token | built in | collating | kd off by | gradient off by |")
        print("|---|---:|---:|---:|---:|---:|")
        (text,) = embedded.read_text("transfer")
        (folder / "text.txt").write_text("\n\n".join(text.values())[:200_000], encoding="utf-8")
        student = make_pair(folder, Shape(128, 2), Shape(256, 4), 8192)
        for name, flags in {"embedded pair": [], "5 M student, equal tokenizers": student}.items():
            for dtype in options.model_dtype:
                of_dtype = [*flags, "--train_file", str(folder / "text.txt"), "--token_cache", "off"]
                of_dtype += ["--device", options.device, "--model_dtype", dtype]
                found = results[f"{name}, {dtype}"] = measure(of_dtype, folder / f"{len(results)}")
                off = " | ".join(f"{value:.1e}" for value in found["off"].values())
                print(
                    f"| {name}, {dtype} | {found['bytes_per_token']:.0f} | {found['build_seconds']:.0f} s | "
                    f"{found['collating_ms']:.0f} ms | {off} |", flush=True,
                )  # fmt: skip
        print("\n| text | cache | building holds | training from it holds |\n|---:|---:|---:|---:|")
        for size in options.sizes:
            found = results[f"memory, {size} MB"] = memory(size, folder / f"{size}MB", options.steps)
            print(
                f"| {found['text_mb']:.0f} MB | {found['cache_bytes'] / 1e6:.0f} MB | {found['cache_mb']:.0f} MB | "
                f"{found['train_mb']:.0f} MB |", flush=True,
            )  # fmt: skip
    write(options, results)


if __name__ == "__main__":
    main()
