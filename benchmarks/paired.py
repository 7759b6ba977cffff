"""Shared by the benchmarks of whole steps: a run up to its first step, and paired timing.

Sides take turns in one process, in a rotating order, and the result is the median over rounds of the ratio of two sides
in the same round: what slows the machine for a while slows both. On a GPU the queue is empty before and after each
timing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sar_kd import embedded  # noqa: E402
from sar_kd.commands.build_embedded import byte_level_bpe  # noqa: E402
from sar_kd.config.command_line import parse  # noqa: E402
from sar_kd.config.fields import Command  # noqa: E402
from sar_kd.config.presets import STABLE  # noqa: E402
from sar_kd.config.runs import Config  # noqa: E402
from sar_kd.data.batch import Batch  # noqa: E402
from sar_kd.data.dataset import build_dataset  # noqa: E402
from sar_kd.data.files.sources import load_documents  # noqa: E402
from sar_kd.losses.objective import Objective  # noqa: E402
from sar_kd.models.loading import NO_LOADED_MODELS, LoadedModels, load_models  # noqa: E402
from sar_kd.models.pretrained import silence_transformers  # noqa: E402
from sar_kd.runtime.distributed import SINGLE_PROCESS  # noqa: E402
from sar_kd.runtime.precision import setup_precision  # noqa: E402
from sar_kd.teacher.cached import open_teacher_cache  # noqa: E402
from sar_kd.training.guards import StepGuard  # noqa: E402
from sar_kd.training.optimizer import build_optimizer  # noqa: E402
from sar_kd.training.step import StepContext, StepReport, train_step  # noqa: E402

NEVER_SKIPS = ("--skip_rule", "fixed", "--skip_grad_norm", "1e9")
"""A step that is skipped costs less."""


class Run:
    """What a script has when its first step begins."""

    def __init__(self, flags: Sequence[str], command: Command[Config] = STABLE, given: LoadedModels = NO_LOADED_MODELS):
        """given: models that are in memory already, of another run"""
        config, teacher_cache = open_teacher_cache(parse(command, list(flags)), SINGLE_PROCESS, lambda line: None)
        self.config, self.precision = config, setup_precision(config.precision, 0)
        self.models = models = load_models(config, self.precision, teacher_cache and teacher_cache.teacher, given)
        limits, texts = models.block_limits(config.data.block_size), load_documents(config.data)
        cached = teacher_cache.texts(texts, models.tokenizers.teacher)[0] if teacher_cache else None
        self.corpus = build_dataset(
            texts[0], models.tokenizers, *limits, cached_logits=cached, loss_workspace_mb=config.loss.loss_workspace_mb
        )
        sides = models.teacher, models.student
        self.objective = Objective(*sides, config.loss, self.corpus.aligner, self.precision)
        self.optimizer = build_optimizer(models.student, config.optim, self.objective.parameters())
        guard, limit = StepGuard(config.guards), config.guards.max_grad_norm
        self.context = StepContext(self.objective, self.optimizer, guard, self.precision, limit)

    @property
    def given(self) -> LoadedModels:
        """Its models, for another run."""
        both, tokenizers = self.models, self.models.tokenizers
        pairs = {"student_model": (both.student, tokenizers.student)}
        return LoadedModels(pairs | {"teacher_model": (both.teacher, tokenizers.teacher)})

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step."""
        train = self.config.train
        return self.corpus.micro_batches(step, train.per_device_batch_size, train.grad_accum_steps, train.seed)

    def step(self, batches: list[Batch]) -> StepReport:
        """One update, as the scripts make it; applied, or the benchmark measured something else."""
        report = train_step(batches, self.context)
        assert report.verdict.applied, report
        return report


class Shape(NamedTuple):
    """Of a Llama."""

    width: int
    layers: int


LARGE = Shape(768, 12), Shape(512, 8)
"""A teacher and a student of a size at which a model is one."""


def make_model(shape: Shape, vocab_size: int, end: int) -> transformers.LlamaForCausalLM:
    """A Llama from a seed, its head tied. end: the end-of-text token"""
    torch.manual_seed(0)
    heads = max(2, shape.width // 64)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=shape.width, intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end,
        initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def make_pair(folder: Path, teacher: Shape, student: Shape, vocab_size: int, num_tokens: int = 8192) -> list[str]:
    """A teacher and a student with the same tokenizer, from a seed; the flags that name them.

    vocab_size: rows of both heads, of which the tokenizer has `num_tokens` or fewer
    """
    silence_transformers()
    texts = [text for split in embedded.read_text("teacher", "transfer") for text in split.values()]
    tokenizer = byte_level_bpe(texts, min(num_tokens, vocab_size))
    for name, shape in (("teacher", teacher), ("student", student)):
        make_model(shape, vocab_size, tokenizer.eos_token_id).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return ["--teacher_model", str(folder / "teacher"), "--student_model", str(folder / "student")]


class Clock:
    """Seconds that something takes: by the wall; or of the CPU, of all threads, where the machine has other work."""

    def __init__(self, device: torch.device, of_cpu: bool = False):
        self._device, self._now = device, time.process_time if of_cpu else time.perf_counter

    def __call__(self, act: Callable[[], object]) -> float:
        synchronize(self._device)
        started = self._now()
        act()
        synchronize(self._device)
        return self._now() - started


def synchronize(device: torch.device) -> None:
    """Wait for all that a GPU has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device, act: Callable[[], object]) -> int:
    """What the allocator gives at the peak of `act`, beyond what was allocated before it. On a CPU from the profiler's
    record of every allocation, kernels' own included, so that nothing should be timed meanwhile.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        act()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells the terminal of its start and end
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        act()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def take_turns(sides: Mapping[str, Callable[[int], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """What each side returns (seconds) for the numbers of some rounds, in an order that moves on; without the first."""
    names = list(sides)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + warmup):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            found[name].append(sides[name](number))
    return {name: values[warmup:] for name, values in found.items()}


class Ratio(NamedTuple):
    """Of two sides, round by round."""

    median: float
    low: float
    """The quartiles"""
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio_of(ours: Sequence[float], others: Sequence[float]) -> Ratio:
    """ours / others."""
    ratios = [own / other for own, other in zip(ours, others, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(median, low, high)


def add_flags(parser: argparse.ArgumentParser, output: str) -> None:
    """The flags that these benchmarks share. output: the file's name among the results"""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds, of a machine that has other work")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / output)


def device_of(options: argparse.Namespace) -> torch.device:
    """What `--device` names; exits with 2 where it is not there."""
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"error: --device {options.device}: PyTorch sees no CUDA GPU; use --device cpu", file=sys.stderr)
        raise SystemExit(2)
    return device


def about(device: torch.device) -> dict:
    """What a file of results says of the machine."""
    found: dict = {"torch": torch.__version__, "transformers": transformers.__version__}
    found |= {"python": platform.python_version(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", str(device.index or 0)]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        found |= {"card": torch.cuda.get_device_name(device), "driver": driver, "cuda": torch.version.cuda}
    return found


def write(options: argparse.Namespace, record: dict) -> None:
    """Write a benchmark's figures, with the machine's, to its file."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(about(device_of(options)) | record, indent=1) + "\n")
