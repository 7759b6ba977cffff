"""The memory plan beside what is measured: steps and evaluations of real models, each in a process of its own.

    python benchmarks/memory_plan.py
    python benchmarks/memory_plan.py --only llama_32000 moe

What is measured, in three ways: `allocated` is the peak of the allocator, every allocation and release as
PyTorch's profiler reports it, kernels' own included; it is what `torch.cuda.max_memory_allocated` counts on a GPU, and
what the plan's parts predict. `ledger` counts storages while the real step runs. `resident` is the peak resident set of
the process (Linux), against the plan with what the process held before. Off by is (plan - measured) / measured.

A step is the second one, when the optimizer has its state. Two steps, then an evaluation of both models.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RESULT = ROOT / "benchmarks" / "results" / "memory_plan.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: a pair of models, a vocabulary, and how much is computed at once."""

    student: str = "llama"
    teacher: str = "llama"
    vocab_size: int = 32000
    batch_size: int = 2
    block_size: int = 256
    accum: int = 1
    flags: tuple[str, ...] = ()
    dtype: str = "float32"
    width: int = 256
    layers: int = 4


CASES = {
    "gpt2_2048": Case("gpt2", "gpt2", 2048, batch_size=4),
    "gpt2_50257": Case("gpt2", "gpt2", 50257),
    "llama_2048": Case(vocab_size=2048, batch_size=4),
    "llama_2048_batch_16": Case(vocab_size=2048, batch_size=16, block_size=128),
    "llama_2048_long": Case(vocab_size=2048, batch_size=1, block_size=1024),
    "llama_32000": Case(),
    "llama_32000_accum_2": Case(accum=2),
    "llama_32000_recomputed": Case(batch_size=8, flags=("gradient_checkpointing",)),
    "llama_32000_not_recomputed": Case(batch_size=8),
    "llama_151936": Case(vocab_size=151936, batch_size=1),
    "llama_32000_half": Case(dtype="float16"),
    "llama_2048_half_batch_16": Case(vocab_size=2048, batch_size=16, block_size=128, dtype="float16"),
    "llama_151936_half": Case(vocab_size=151936, batch_size=1, dtype="float16"),
    "moe_teacher_32000": Case(teacher="moe"),
    "moe_both_2048": Case("moe", "moe", 2048, batch_size=4),
    "moe_both_2048_half_accum_2": Case("moe", "moe", 2048, batch_size=4, accum=2, dtype="float16"),
    "moe_sar_2048": Case("llama", "moe", 2048, batch_size=4, flags=("routing=sar",)),
    "moe_all_2048": Case("llama", "moe", 2048, batch_size=4, flags=("routing=all",)),
    "embedded": Case("embedded", "embedded", 0, batch_size=4),
    "embedded_half": Case("embedded", "embedded", 0, batch_size=4, dtype="float16"),
    "embedded_batch_16": Case("embedded", "embedded", 0, batch_size=16),
}


def config_of(case: Case):
    """The settings of a case."""
    from sar_kd.config import Config
    from sar_kd.presets import MODES, STABLE

    flags = dict(flag.partition("=")[::2] for flag in case.flags)
    values = {name: value or True for name, value in flags.items()}
    values |= {"per_device_batch_size": case.batch_size, "grad_accum_steps": case.accum, "block_size": case.block_size}
    values |= {"model_dtype": case.dtype, "device": "cpu", "skip_grad_norm": 1e9, "skip_rule": "fixed"}
    return Config.from_flags({**MODES[STABLE["mode"]], **values}, STABLE["mode"])


def model_config(kind: str, case: Case, teacher: bool):
    """What builds one of the two models."""
    import transformers

    width, layers = (2 * case.width if teacher else case.width), case.layers
    heads, vocab_size = width // 64, case.vocab_size
    if kind == "gpt2":
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        return transformers.GPT2Config(vocab_size=vocab_size, n_embd=width, n_layer=layers, n_head=heads, **ends)
    settings = {
        "vocab_size": vocab_size, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2), "intermediate_size": 8 * width // 3 // 8 * 8,
        "max_position_embeddings": 2048, "tie_word_embeddings": not teacher,
    }  # fmt: skip
    if kind == "llama":
        return transformers.LlamaConfig(**settings)
    own = {"moe_intermediate_size": width // 2, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 64}
    return transformers.Qwen3MoeConfig(**settings, **own)


class Meter:
    """The allocator's peak, from the profiler's record of every allocation."""

    def __enter__(self):
        import torch

        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *exception):
        self._profile.__exit__(*exception)
        events = self._profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        self.peak = live = 0
        for _, change in changes:
            live += change
            self.peak = max(self.peak, live)


def resident(kind: str) -> int:
    """Bytes of this process: 'VmRSS' now, 'VmHWM' at the peak since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def measure(name: str, how: str) -> dict:
    """One case, planned and measured in this process. how: 'allocated', 'ledger' or 'resident'"""
    import torch
    import transformers

    from sar_kd.hollow import Ledger
    from sar_kd.memory_plan import plan
    from sar_kd.precision import Precision

    transformers.utils.logging.set_verbosity_error()
    case = CASES[name]
    config, dtype = config_of(case), getattr(torch, case.dtype)
    device = torch.device("cpu")
    run = _embedded(config) if case.student == "embedded" else _invented(case, config, dtype)
    found = plan(config, run.skeletons(), device, dtype)
    record = {"plan": found.record(), "held": found.held}
    Path("/proc/self/clear_refs").write_text("5")
    precision = Precision(device, dtype, 1024.0)
    if how == "allocated":
        with Meter() as meter:
            run.go(config, precision)
        return record | {"allocated": meter.peak}
    if how == "ledger":
        with Ledger() as ledger:
            run.go(config, precision)
        return record | {"ledger": ledger.peak}
    run.go(config, precision)
    return record | {"resident": resident("VmHWM")}


def _invented(case: Case, config, dtype):
    """Models with random weights, and random text that both read alike."""
    import torch
    import transformers

    from sar_kd.data import Batch, TokenBatch

    kinds = {"teacher": model_config(case.teacher, case, True), "student": model_config(case.student, case, False)}
    build = transformers.AutoModelForCausalLM.from_config

    def skeletons():
        with torch.device("meta"):
            return {whose: build(kind) for whose, kind in kinds.items()}

    def go(config, precision):
        teacher = build(kinds["teacher"]).to(dtype).requires_grad_(False).eval()
        student = build(kinds["student"]).train()
        sizes = dict.fromkeys(("student_rows", "teacher_rows", "teacher_tokens"), case.vocab_size)
        rows = SimpleNamespace(**sizes, tables=None)
        pairing = SimpleNamespace(pair=rows)

        def batch():
            input_ids = torch.randint(0, case.vocab_size, (case.batch_size, case.block_size))
            labels = input_ids.clone()
            labels[:, 0] = -100
            places = torch.arange(input_ids.numel()).view_as(input_ids)[:, :-1].flatten()
            side = TokenBatch(input_ids, labels, places, input_ids[:, 1:].flatten())
            return Batch(side, side, SimpleNamespace(teacher_rows=places), ())

        _train(config, precision, teacher, student, pairing, lambda step: [batch() for _ in range(case.accum)])

    return SimpleNamespace(skeletons=skeletons, go=go)


def _embedded(config):
    """The pair that ships with the package, and its text: different tokenizers."""
    from sar_kd.data import Corpus
    from sar_kd.documents import load_documents
    from sar_kd.loading import load_skeleton
    from sar_kd.models import load_models

    def skeletons():
        return {
            whose: load_skeleton(f"{whose}_model", "embedded", trust_remote_code=False)
            for whose in ("teacher", "student")
        }

    def go(config, precision):
        models = load_models(config, precision)
        texts = load_documents(config.data)
        corpus = Corpus(texts[0], models.tokenizers, *models.block_limits(config.data.block_size))
        train = config.train

        def batches(step):
            return corpus.micro_batches(step, train.per_device_batch_size, train.grad_accum_steps, 0)

        _train(config, precision, models.teacher, models.student, corpus.pairing, batches, models, corpus)

    return SimpleNamespace(skeletons=skeletons, go=go)


def _train(config, precision, teacher, student, pairing, batches, models=None, corpus=None) -> None:
    from sar_kd.evaluate import evaluate
    from sar_kd.guards import StepGuard
    from sar_kd.layers import recompute_activations_
    from sar_kd.models import Models
    from sar_kd.objective import Objective
    from sar_kd.optim import build_optimizer
    from sar_kd.step import train_step
    from sar_kd.teacher_routing import build_teacher_routing

    if config.memory.gradient_checkpointing:
        recompute_activations_(student, same_dropout=True)
    models = models or Models(teacher, student, None, False)
    objective = Objective(teacher, student, config.loss, pairing, precision)
    optimizer = build_optimizer(student, config.optim, objective.parameters())
    guard = StepGuard(config.guards)
    routing = build_teacher_routing(config, models, objective, corpus or SimpleNamespace(pairing=pairing))
    with routing:
        for step in range(2):
            learner = routing.learner_at(step)
            train_step(batches(step), objective, optimizer, guard, precision, 1.0, learner)
        (first, *_) = batches(0)
        for model, batch in ((student, first.student), (teacher, first.teacher)):
            evaluate(model, [batch], 1, precision, heads=objective.heads, workspace_mb=config.loss.loss_workspace_mb)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(CASES), help="words that begin the names of cases")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    rows, worst = [], 0.0
    print("| case | plan MB | at | allocated MB | off by | ledger MB | resident: plan MB | measured MB | off by |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for name in (name for name in CASES if any(name.startswith(word) for word in options.only)):
        row: dict = {"case": name, **dataclasses.asdict(CASES[name])}
        for how in ("allocated", "ledger", "resident"):
            command = [sys.executable, __file__, "--one", name, how]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}, {how}: {done.stderr}")
            row |= json.loads(done.stdout.splitlines()[-1])
        found = row["plan"]
        planned = found["needed_bytes"] - found["held_bytes"]
        row["off"] = planned / row["allocated"] - 1
        row["resident_off"] = found["needed_bytes"] / row["resident"] - 1
        worst = max(worst, abs(row["off"]))
        rows.append(row)
        sizes = [f"{size / 1e6:.1f}" for size in (planned, row["allocated"], row["ledger"], found["needed_bytes"])]
        print(
            f"| {name} | {sizes[0]} | {found['peak']} | {sizes[1]} | {row['off']:+.1%} | {sizes[2]} | {sizes[3]} | "
            f"{row['resident'] / 1e6:.1f} | {row['resident_off']:+.1%} |",
            flush=True,
        )
    print(f"\nFarthest off the allocator: {worst:.1%}")
    if options.only == list(CASES):
        options.output.write_text(json.dumps({"worst": worst, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
