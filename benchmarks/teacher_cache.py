"""What a step with a teacher cache costs, beside the student's own training step and beside a live teacher, in turns.

    python benchmarks/teacher_cache.py

Four sides: cross-entropy alone, which is the student's own training step; with the cache; with the teacher there, cut
to as many tokens; with the whole teacher. Each has a student of its own; each round takes the same batch through all
four, in an order that moves on, and what counts is the median over rounds of the ratio to cross-entropy alone. Batches
are made beforehand, as the prefetch thread makes them beside a step; what making one takes is a column of its own. One
thread. Then: bytes a token, what building took, and how far the cached losses and gradients are from the live ones on
the same batches; for the embedded pair also where the text was cut for a student with the teacher's own tokenizer, so
that in many a block the teacher had read more than the student has. The table goes to the terminal, the figures to
`benchmarks/results/teacher_cache.json`.

Two pairs: the embedded one, whose tokenizers differ and whose student is so small that its step is next to nothing; and
a student of 5 M parameters with a vocabulary of 8,192 that is the teacher's too, made here from a seed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sar_kd import cache, embedded  # noqa: E402
from sar_kd.arguments import parse_args  # noqa: E402
from sar_kd.data import Corpus  # noqa: E402
from sar_kd.documents import load_documents  # noqa: E402
from sar_kd.embedded.build import byte_level_bpe  # noqa: E402
from sar_kd.guards import StepGuard  # noqa: E402
from sar_kd.models import load_models  # noqa: E402
from sar_kd.objective import Objective  # noqa: E402
from sar_kd.optim import build_optimizer  # noqa: E402
from sar_kd.precision import setup  # noqa: E402
from sar_kd.presets import STABLE  # noqa: E402
from sar_kd.step import train_step  # noqa: E402
from sar_kd.teacher_cache import open_teacher_cache  # noqa: E402
from sar_kd.world import ALONE  # noqa: E402

SIDES = ("cross-entropy alone", "cache", "live, top k", "live, whole")
VOCABULARY = 8192


class Side:
    """A step with one kind of teacher, on a student of its own."""

    def __init__(self, flags: list[str]):
        config = parse_args(STABLE, flags)
        config, stored = open_teacher_cache(config, ALONE, _Quiet())
        self.config, self.precision = config, setup(config.precision, 0)
        models = load_models(config, self.precision, stored.teacher)
        limits, texts = models.block_limits(config.data.block_size), load_documents(config.data)
        answers = stored.texts(texts, models.tokenizers.teacher)
        self.corpus = Corpus(texts[0], models.tokenizers, *limits, stored=answers[0])
        sides = models.teacher, models.student
        self.objective = Objective(*sides, config.loss, self.corpus.pairing, self.precision)
        self.optimizer, self.guard = build_optimizer(models.student, config.optim), StepGuard(config.guards)
        self.student = models.student

    def batches(self, number: int) -> list:
        return self.corpus.micro_batches(number, self.config.train.per_device_batch_size, 1, 0)

    def step(self, batches: list) -> float:
        """CPU seconds of one update."""
        started = time.process_time()
        limit = self.config.guards.max_grad_norm
        report = train_step(batches, self.objective, self.optimizer, self.guard, self.precision, limit)
        assert report.verdict.applied
        return time.process_time() - started

    def gradient(self, batch) -> tuple[float, torch.Tensor]:
        """The loss of a batch, nats a token, and its gradient as one vector."""
        scale = self.precision.loss_scale / batch.num_target_tokens
        terms = self.objective(batch, scale=scale)
        (terms.total * scale).backward()
        found = torch.cat([p.grad.flatten() for p in self.student.parameters()]) / self.precision.loss_scale
        self.optimizer.zero_grad(set_to_none=True)
        return float(terms.kd / batch.num_target_tokens), found


class _Quiet:
    def say(self, line: str) -> None:
        """Nothing."""


def make_pair(folder: Path) -> list[str]:
    """A teacher and a student that share a vocabulary, from a seed; the flags that name them."""
    texts = [text for split in embedded.read_text("teacher", "transfer") for text in split.values()]
    tokenizer = byte_level_bpe(texts, VOCABULARY)
    for name, width, layers in (("teacher", 128, 2), ("student", 256, 4)):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.1,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return ["--teacher_model", str(folder / "teacher"), "--student_model", str(folder / "student")]


def build(flags: list[str], folder: Path, dtype: str) -> dict:
    """Build a cache; its figures, and the CPU seconds that it took."""
    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        found = cache.main([*flags, "--teacher_cache", str(folder), "--model_dtype", dtype])
    return {**found, "build_seconds": time.process_time() - started}


def measure(flags: list[str], folder: Path, dtype: str, rounds: int, warmup: int = 3) -> dict:
    """Figures of one pair in one dtype."""
    found = build(flags, folder, dtype)
    common = [*flags, "--model_dtype", dtype, "--mode", "balanced", "--alpha_kd", "0.5", "--alpha_ce", "0.5"]
    common += ["--skip_rule", "adaptive", "--student_lr", "1e-4"]
    stored, top = ["--teacher_cache", str(folder)], ["--teacher_top_k", "32"]
    each = [["--alpha_kd", "0", "--alpha_ce", "1"], stored, top, []]
    sides = {name: Side([*common, *more]) for name, more in zip(SIDES, each, strict=True)}
    found |= {"difference": _difference(sides["cache"], sides["live, top k"])}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    collating = []
    for number in range(rounds + warmup):
        started = time.process_time()
        own = sides["cache"].batches(number)
        collating.append(time.process_time() - started)
        live = sides["live, top k"].batches(number)
        order = [SIDES[(number + i) % len(SIDES)] for i in range(len(SIDES))]
        for name in order:
            seconds[name].append(sides[name].step(own if name == "cache" else live))
    seconds = {name: values[warmup:] for name, values in seconds.items()}
    base = seconds[SIDES[0]]
    found["ms"] = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    found["ratio"] = {
        name: statistics.median(a / b for a, b in zip(values, base, strict=True)) for name, values in seconds.items()
    }
    found["collating_ms"] = 1e3 * statistics.median(collating[warmup:])
    if not flags:  # the embedded pair, whose tokenizers differ
        elsewhere = folder.with_name(f"{folder.name}-elsewhere")
        build(["--student_model", str(embedded.TEACHER_DIR)], elsewhere, dtype)
        found["difference_elsewhere"] = _difference(
            Side([*common, "--teacher_cache", str(elsewhere)]), sides["live, top k"]
        )
    return found


def _difference(stored: Side, live: Side, batches: int = 4) -> dict:
    """How far the cached distillation term and the gradient of all are from the live ones; the largest of a few."""
    losses, gradients = [], []
    for number in range(batches):
        (batch,) = stored.batches(number)
        (a, one), (b, other) = stored.gradient(batch), live.gradient(dataclasses.replace(batch, stored=None))
        losses.append(abs(a - b) / abs(b))
        gradients.append(float((one - other).norm() / other.norm()))
    return {"kd_loss": max(losses), "gradient": max(gradients)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "teacher_cache.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    print(f"| step, {options.rounds} rounds, to cross-entropy alone | {' | '.join(SIDES[1:])} | collating | bytes a "
          "token | kd off by | gradient off by |")  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pairs = {"embedded pair": [], "5 M student, equal tokenizers": make_pair(folder)}
        for name, flags in pairs.items():
            for dtype in ("float32", "float16"):
                found = measure(flags, folder / f"{len(results)}", dtype, options.rounds)
                results[f"{name}, {dtype}"] = found
                ratios = " | ".join(f"{found['ratio'][side]:.3f}" for side in SIDES[1:])
                off = found["difference"]
                print(
                    f"| {name}, {dtype} ({found['ms'][SIDES[0]]:.0f} ms) | {ratios} | {found['collating_ms']:.0f} ms | "
                    f"{found['bytes_per_token']:.0f} | {off['kd_loss']:.1e} | {off['gradient']:.1e} |", flush=True,
                )  # fmt: skip
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
