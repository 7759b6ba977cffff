"""The memory plan beside what is measured: steps and evaluations of real models, each in its own process.

    python benchmarks/memory_plan.py
    python benchmarks/memory_plan.py --only llama_32000 moe

Measured in three ways: `allocated` is the peak of the allocator, every allocation and release as
PyTorch's profiler reports it, kernels' own included; the plan's categories predict it. `tracked` counts storages
while the real step runs. `resident` is the peak resident set of the process (Linux), against the plan plus what the
process had before. On a GPU there is one way: `torch.cuda.max_memory_allocated`, against the plan with what libraries
take. Off by is (plan - measured) / measured.

A step is the second one, when the optimizer has its state. Two steps, then an evaluation of both models; with
`on_policy_fraction` responses to full prompts are sampled first.
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
    "llama_2048_on_policy": Case(
        vocab_size=2048, batch_size=16, block_size=128, accum=8, flags=("on_policy_fraction=1.0",)
    ),
    "llama_32000_adafactor": Case(flags=("optimizer=adafactor",)),
    "llama_32000_8bit": Case(flags=("optimizer=adamw8bit",)),
    "llama_32000_lora": Case(flags=("lora_rank=16",)),
    "llama_32000_lora_half": Case(flags=("lora_rank=16",), dtype="float16"),
    "llama_151936_lora_half": Case(vocab_size=151936, batch_size=1, flags=("lora_rank=16",), dtype="float16"),
    "llama_151936_half_adafactor": Case(
        vocab_size=151936, batch_size=1, flags=("optimizer=adafactor",), dtype="float16"
    ),
    # Of the size of SmolLM2-135M under a teacher of 400 M; not among those of a CPU.
    "real_half": Case(vocab_size=49152, batch_size=1, block_size=512, dtype="float16", width=512, layers=24),
    "real_lora_half": Case(
        vocab_size=49152, batch_size=1, block_size=512, dtype="float16", width=512, layers=24, flags=("lora_rank=16",)
    ),
    "embedded": Case("embedded", "embedded", 0, batch_size=4),
    "embedded_half": Case("embedded", "embedded", 0, batch_size=4, dtype="float16"),
    "embedded_batch_16": Case("embedded", "embedded", 0, batch_size=16),
}


_ON_A_CPU = [name for name in CASES if not name.startswith("real")]


def config_of(case: Case, device: str):
    """The settings of a case."""
    from sar_kd.config.presets import MODES
    from sar_kd.config.runs import Config

    flags = dict(flag.partition("=")[::2] for flag in case.flags)
    values: dict = {name: value or True for name, value in flags.items()}
    values |= {name: float(value) for name, value in flags.items() if name == "on_policy_fraction"}
    values |= {name: int(value) for name, value in flags.items() if name == "lora_rank"}
    values |= {"per_device_batch_size": case.batch_size, "grad_accum_steps": case.accum, "block_size": case.block_size}
    values |= {"model_dtype": case.dtype, "device": device, "skip_grad_norm": 1e9, "skip_rule": "fixed"}
    return Config.from_options({**MODES["balanced"], **values}, "balanced")


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


def resident(kind: str) -> int:
    """Bytes of this process: 'VmRSS' now, 'VmHWM' at the peak since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def measure(name: str, how: str, device_name: str, dtype_name: str) -> dict:
    """One case, planned and measured in this process. how: 'allocated', 'tracked' or 'resident'; dtype_name: of all
    cases if it is not empty
    """
    import torch
    import transformers
    from paired import peak_bytes

    from sar_kd.preflight.memory_plan import plan
    from sar_kd.preflight.memory_tracker import MemoryTracker
    from sar_kd.runtime.precision import Precision

    transformers.utils.logging.set_verbosity_error()
    case = CASES[name]
    case = dataclasses.replace(case, dtype=dtype_name or case.dtype)
    config, dtype, device = config_of(case, device_name), getattr(torch, case.dtype), torch.device(device_name)
    run = _embedded(config) if case.student == "embedded" else _invented(case, config, dtype)
    found = plan(config, run.meta_models(), device, dtype)
    record, precision = {"plan": found.record(), "baseline": found.baseline}, Precision(device, dtype, 1024.0)
    if how == "allocated":
        return record | {"allocated": peak_bytes(device, lambda: run.go(config, precision))}
    if how == "tracked":
        with MemoryTracker() as tracker:
            run.go(config, precision)
        return record | {"tracked": tracker.peak}
    Path("/proc/self/clear_refs").write_text("5")
    run.go(config, precision)
    return record | {"resident": resident("VmHWM")}


def _invented(case: Case, config, dtype):
    """Models with random weights, and random text that both read alike."""
    import torch
    import transformers

    from sar_kd.data.batch import Batch, TokenBatch
    from sar_kd.models.lora import add_adapter

    kinds = {"teacher": model_config(case.teacher, case, True), "student": model_config(case.student, case, False)}
    build = transformers.AutoModelForCausalLM.from_config

    def meta_models():
        with torch.device("meta"):
            return {whose: build(kind) for whose, kind in kinds.items()}

    def go(config, precision):
        teacher = build(kinds["teacher"]).to(precision.device, dtype).requires_grad_(False).eval()
        student = build(kinds["student"]).train()
        student.to(precision.device, dtype if config.lora.lora_rank else torch.float32)
        student = add_adapter(student, config.lora)
        sizes = dict.fromkeys(("student_vocab_size", "teacher_vocab_size", "num_teacher_tokens"), case.vocab_size)
        rows = SimpleNamespace(**sizes, tables=None)
        aligner = SimpleNamespace(pair=rows)

        def batch():
            input_ids = torch.randint(0, case.vocab_size, (case.batch_size, case.block_size))
            labels = input_ids.clone()
            labels[:, 0] = -100
            places = torch.arange(input_ids.numel()).view_as(input_ids)[:, :-1].flatten()
            side = TokenBatch(input_ids, labels, places, input_ids[:, 1:].flatten())
            return Batch(side, side, SimpleNamespace(teacher_positions=places), ())

        _train(config, precision, teacher, student, aligner, lambda step: [batch() for _ in range(case.accum)])

    return SimpleNamespace(meta_models=meta_models, go=go)


def _embedded(config):
    """The pair that ships with the package, and its text: different tokenizers."""
    from sar_kd.data.dataset import build_dataset
    from sar_kd.data.files.sources import load_documents
    from sar_kd.models.loading import load_meta_model, load_models

    def meta_models():
        return {
            whose: load_meta_model(f"{whose}_model", "embedded", trust_remote_code=False)
            for whose in ("teacher", "student")
        }

    def go(config, precision):
        models = load_models(config, precision)
        texts = load_documents(config.data)
        corpus = build_dataset(
            texts[0],
            models.tokenizers,
            *models.block_limits(config.data.block_size),
            loss_workspace_mb=config.loss.loss_workspace_mb,
        )
        train = config.train

        def batches(step):
            return corpus.micro_batches(step, train.per_device_batch_size, train.grad_accum_steps, 0)

        _train(config, precision, models.teacher, models.student, corpus.aligner, batches)

    return SimpleNamespace(meta_models=meta_models, go=go)


def _train(config, precision, teacher, student, aligner, batches) -> None:
    from sar_kd.evaluation.perplexity import evaluate
    from sar_kd.losses.objective import Objective
    from sar_kd.models.memory_saving import recompute_activations_
    from sar_kd.teacher.live import LiveTeacher
    from sar_kd.training.guards import StepGuard
    from sar_kd.training.optimizer import build_optimizer
    from sar_kd.training.step import StepContext, train_step

    if config.memory.gradient_checkpointing:
        recompute_activations_(student, same_dropout=True)
    if config.on_policy.on_policy_fraction:
        _write(config, precision, student)
    objective = Objective(teacher, student, config.loss, aligner, precision)
    optimizer = build_optimizer(student, config.optim, objective.parameters())
    guard = StepGuard(config.guards)
    live_teacher = LiveTeacher(config, objective, aligner)
    with live_teacher:
        for step in range(2):
            routers = live_teacher.router_trainer_at(step, lambda peak: peak)
            train_step(batches(step), StepContext(objective, optimizer, guard, precision, 1.0, routers))
        (first, *_) = batches(0)
        for model, batch in ((student, first.student), (teacher, first.teacher)):
            evaluate(model, [batch], 1, precision, heads=objective.heads, workspace_mb=config.loss.loss_workspace_mb)


def _write(config, precision, student) -> None:
    """Behind prompts that fill a block but for one token, and one that is short, so that there is room."""
    from sar_kd.models.generation import generate

    train, most = config.train, config.data.block_size - 1
    prompts = [[1] * most] * (train.per_device_batch_size * train.grad_accum_steps - 1) + [[1]]
    max_new_tokens = [max(1, min(config.on_policy.max_new_tokens, most + 1 - len(prompt))) for prompt in prompts]
    with precision.autocast():
        generate(student.eval(), prompts, stop_token_ids=[0], max_new_tokens=max_new_tokens, temperature=1.0)
    student.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only",
        nargs="+",
        default=_ON_A_CPU,
        help="words that begin the names of cases",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--model_dtype", default="", help="of all cases; by default each has its own")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    where = options.device, options.model_dtype
    if options.one:
        print(json.dumps(measure(*options.one, *where)))
        return
    on_cpu, rows, worst = options.device == "cpu", [], 0.0
    names = [name for name in CASES if any(name.startswith(word) for word in options.only)]
    columns = "plan MB | at | allocated MB | off by" + (
        " | tracked MB | resident: plan MB | measured MB | off by" * on_cpu
    )
    print(f"| case | {columns} |\n|---|---:|---|---:|---:|" + "---:|---:|---:|---:|" * on_cpu)
    for name in names:
        row: dict = {"case": name, **dataclasses.asdict(CASES[name])}
        for how in ("allocated", "tracked", "resident") if on_cpu else ("allocated",):
            command = [sys.executable, __file__, "--one", name, how, "--device", where[0], "--model_dtype", where[1]]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}, {how}: {done.stderr}")
            row |= json.loads(done.stdout.splitlines()[-1])
        found = row["plan"]
        planned = found["needed_bytes"] - (found["baseline_bytes"] if on_cpu else 0)
        row["off"] = planned / row["allocated"] - 1
        worst = max(worst, abs(row["off"]))
        cells = [name, f"{planned / 1e6:.1f}", found["peak"], f"{row['allocated'] / 1e6:.1f}", f"{row['off']:+.1%}"]
        if on_cpu:
            row["resident_off"] = found["needed_bytes"] / row["resident"] - 1
            cells += [f"{size / 1e6:.1f}" for size in (row["tracked"], found["needed_bytes"], row["resident"])]
            cells.append(f"{row['resident_off']:+.1%}")
        rows.append(row)
        print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\nFarthest off the allocator: {worst:.1%}")
    if options.output != RESULT or names == list(CASES):
        options.output.write_text(json.dumps({"worst": worst, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
