"""Do the guards leave healthy runs alone? Each run beside the same run without guards: skipped steps, and the loss.

    python benchmarks/healthy_runs.py [--only WORD ...] [--seed N] [--real TEACHER STUDENT --steps N]

Students of ten families, tiny and fresh from transformers' configs, learn from the embedded student for 60 steps, in
every mode, one block a step and 64. Two of them have logits that are far from 0 as a whole. `--real` adds a pair of
real models from local folders, at the mode's own rate. With guards: the mode as it is. Without: no clamp, no clipping,
no limit of the norm. The loss is that of held-out text, unclamped, in nats per token. A spike of ten times the median
norm is tried at 20 places of every guarded run; one below 2.0, the lowest limit, is applied. Runs that are in the file
already are kept; `--only` makes those again whose name has one of the words. Both tables go to the terminal, the
numbers to `benchmarks/results/healthy_runs.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from paired import ROOT, Run, about
from torch import nn

from sar_kd import embedded
from sar_kd.commands.build_embedded import byte_level_bpe
from sar_kd.config.presets import MODES
from sar_kd.data.dataset import Dataset, build_dataset
from sar_kd.data.files.sources import load_documents
from sar_kd.evaluation.perplexity import evaluate
from sar_kd.models.pretrained import silence_transformers
from sar_kd.training.guards import StepGuard
from sar_kd.training.optimizer import learning_rate_at, set_learning_rate_
from sar_kd.training.step import train_step

STEPS, WIDTH, LAYERS, BLOCK, NUM_TOKENS, RATE = 60, 32, 2, 64, 448, "1e-2"
NO_GUARDS = (
    "--skip_rule", "fixed", "--skip_grad_norm", "1e30", "--max_grad_norm", "1e30",
    "--logit_clamp_style", "off", "--loss_clamp_style", "off",
)  # fmt: skip
DTYPES = {"ultra-conservative": "float16", "balanced": "float32", "precise": "float32"}
"""float16 where it is the mode's own dtype, in the script that begins with this mode"""

BATCH_SIZES = (1, 64)
SHAPE = {
    "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
OFFSET = -60.0
"""Added to every logit of an un-centred student, as GPT-2 has it"""


def _shift_bias_(model: nn.Module) -> None:
    model.lm_head.bias.data.fill_(OFFSET)


def _shift_norm_(model: nn.Module) -> None:
    """One feature of the last state is a constant, and every token has the same weight for it."""
    model.transformer.ln_f.weight.data[0] = 0.0
    model.transformer.ln_f.bias.data[0] = OFFSET
    model.transformer.wte.weight.data[:, 0] = 1.0


FAMILIES: dict[str, tuple[str, dict, Callable[[nn.Module], None] | None]] = {
    "GPT-2": ("GPT2Config", {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 256}, None),
    "GPT-2, un-centred logits": (
        "GPT2Config", {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 256}, _shift_norm_,
    ),
    "Llama": ("LlamaConfig", SHAPE, None),
    "Qwen2": ("Qwen2Config", SHAPE, None),
    "Qwen3": ("Qwen3Config", {**SHAPE, "head_dim": 16}, None),
    "Gemma 3": ("Gemma3TextConfig", {**SHAPE, "head_dim": 16}, None),
    "GPT-NeoX": ("GPTNeoXConfig", SHAPE, None),
    "OPT": ("OPTConfig", {**SHAPE, "ffn_dim": 3 * WIDTH, "word_embed_proj_dim": WIDTH}, None),
    "Phi, un-centred logits": ("PhiConfig", SHAPE, _shift_bias_),
    "Mamba": ("MambaConfig", {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 8}, None),
    "Mixtral (experts)": ("MixtralConfig", {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}, None),
}  # fmt: skip
"""Each family's config class, its shape, and what is changed of a fresh model."""


def make_student(name: str, texts: Sequence[str], folder: Path, seed: int = 0) -> Path:
    """Save a fresh student of a family with a small tokenizer of its own; returns its folder."""
    tokenizer = byte_level_bpe(texts, NUM_TOKENS)
    config_class, shape, change = FAMILIES[name]
    end = tokenizer.eos_token_id  # not the pad token as well, whose embedding transformers makes 0: see learn_pad_row_
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**shape, **tokens))
    if change is not None:
        change(model)
    model.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    return folder / "student"


def write_text(folder: Path, name: str, documents: dict[str, str], count: int) -> Path:
    """A small part of the embedded text."""
    lines = (json.dumps({"text": text[:2000]}) + "\n" for text in list(documents.values())[:count])
    path = folder / f"{name}.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def train(flags: Sequence[str], steps: int) -> dict:
    """One run without a run folder: counts by verdict, norms, limits, and the loss on held-out text."""
    run = Run(flags)
    held_out = build_dataset(
        load_documents(run.config.data)[1], run.models.tokenizers, *run.models.block_limits(run.config.data.block_size)
    )
    config, started, start = run.config, time.monotonic(), _loss(run, held_out)
    causes, norms, limits, reports = [], [], [], []
    for step in range(steps):
        set_learning_rate_(run.optimizer, learning_rate_at(step, steps, config.optim, config.optim.student_lr))
        report = train_step(run.batches(step), run.context)
        causes.append(report.verdict.cause)
        norms.append(report.grad_norm)
        limits.append(report.verdict.norm_limit)
        reports.append(report)
    return {
        "skipped": {cause: causes.count(cause) for cause in sorted(filter(None, set(causes)))},
        "loss_start": start,
        "loss_end": _loss(run, held_out),
        "norm_median": statistics.median(norms),
        "norms": [float(f"{norm:.4g}") for norm in norms],
        **_spikes(run.context.guard, reports),
        "seconds": round(time.monotonic() - started, 1),
    }


def _loss(run: Run, held_out: Dataset) -> float:
    batches, num_bytes = held_out.token_batches("student", 16), held_out.text.num_bytes
    return evaluate(run.models.student, batches, num_bytes, run.precision, heads=run.objective.heads).loss


def _spikes(guard: StepGuard, reports: Sequence) -> dict[str, int]:
    """At 20 positions of this run, behind five attempts and a finite norm: is ten times the median refused?"""
    positions = {5 + round(place * (len(reports) - 6) / 19) for place in range(20)}
    replayed, tried, refused = StepGuard(guard.settings), 0, 0
    for position, report in enumerate(reports):
        attempt = {"num_targets": 1, "forward_finite": report.verdict.cause != "forward", "loss_scale": 2.0}
        before = [earlier.grad_norm for earlier in reports[:position] if earlier.grad_norm < 1e30]
        if position in positions and before:
            spike = 10.0 * statistics.median(before)
            tried += 1
            refused += copy.deepcopy(replayed).judge(**attempt, grad_norm=spike).cause == "norm"
        replayed.judge(**attempt, grad_norm=report.grad_norm)
    return {"spikes_tried": tried, "spikes_refused": refused}


def compare(flags: Sequence[str], mode: str, steps: int) -> dict:
    """The same run with the guards of a mode and with none."""
    common = [*flags, "--mode", mode, "--model_dtype", DTYPES[mode], "--device", "cpu", "--token_cache", "off"]
    common += ["--train_steps", str(steps)]
    sides = {"guards": train(common, steps), "none": train([*common, *NO_GUARDS], steps)}
    ratio = sides["guards"]["loss_end"] / sides["none"]["loss_end"]
    return {**sides, "steps": steps, "loss_ratio": ratio}


def tiny_cases(folder: Path, seed: int):
    """Name, flags and mode of each run of a tiny student, made when its turn comes."""
    transfer, validation = embedded.read_text("transfer", "validation")
    files = write_text(folder, "train", transfer, 400), write_text(folder, "held_out", validation, 20)
    text = ["--train_file", str(files[0]), "--validation_file", str(files[1]), "--block_size", str(BLOCK)]
    for family in FAMILIES:
        for mode in MODES:
            for size in BATCH_SIZES:

                def flags(family=family, size=size):
                    texts = list(transfer.values())[:400]
                    student = make_student(family, texts, folder / family.replace(" ", "_"), seed)
                    models = ["--teacher_model", str(embedded.STUDENT_DIR), "--student_model", str(student)]
                    size_and_rate = ["--per_device_batch_size", str(size), "--student_lr", RATE]
                    return [*models, *text, *size_and_rate, "--seed", str(seed)]

                yield f"{family}, {mode}, batch {size}" + (f", seed {seed}" if seed else ""), flags, mode


def real_cases(folder: Path, teacher: str, student: str):
    """The same for a pair of real models: blocks of 254 tokens, one a step."""
    transfer, validation = embedded.read_text("transfer", "validation")
    files = write_text(folder, "real_train", transfer, 100), write_text(folder, "real_held_out", validation, 2)
    text = ["--train_file", str(files[0]), "--validation_file", str(files[1]), "--block_size", "254"]
    models = ["--teacher_model", teacher, "--student_model", student, "--per_device_batch_size", "1"]
    for mode in MODES:
        yield f"{Path(teacher).name} to {Path(student).name}, {mode}, batch 1", lambda: [*models, *text], mode


def row_of(name: str, found: dict) -> str:
    guards, none = found["guards"], found["none"]
    tried = guards.get("spikes_tried", min(20, len(guards["norms"]) - 5))
    skipped = ", ".join(f"{cause} {count}" for cause, count in guards["skipped"].items()) or "0"
    return (
        f"| {name} | {guards['norm_median']:.2f} | {skipped} | {guards['loss_start']:.3f} | {guards['loss_end']:.3f} | "
        f"{none['loss_end']:.3f} | {found['loss_ratio'] - 1:+.1%} | {guards['spikes_refused']} of {tried} |"
    )


HEAD = (
    "| student, mode, blocks | median norm | skipped | loss at the start | after the run | without guards | difference "
    "| spikes refused |",
    "|---|---:|---|---:|---:|---:|---:|---:|",
)  # fmt: skip


def short_table(runs: dict) -> list[str]:
    """A row for each family: steps skipped, and the loss beside that without guards, in %."""
    kinds = [f"{mode}, batch {size}" for mode in MODES for size in BATCH_SIZES]
    head = ["| student | " + " | ".join(kinds) + " |", "|---|" + "---:|" * len(kinds)]
    rows = []
    for family in FAMILIES:
        found = [runs.get(f"{family}, {kind}") for kind in kinds]
        rows.append(f"| {family} | " + " | ".join(_cell(run) if run else "" for run in found) + " |")
    return head + rows


def _cell(run: dict) -> str:
    others = {cause: count for cause, count in run["guards"]["skipped"].items() if cause != "norm"}
    more = "".join(f" ({count} {cause})" for cause, count in others.items())
    return f"{run['guards']['skipped'].get('norm', 0)}{more}, {run['loss_ratio'] - 1:+.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="make runs whose name has one of these words, anew")
    parser.add_argument("--seed", type=int, default=0, help="of tiny students and of the order of their text")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "healthy_runs.json")
    parser.add_argument("--real", nargs=2, metavar=("TEACHER", "STUDENT"), help="folders of a pair of real models")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the real pair")
    options = parser.parse_args()
    silence_transformers()
    runs = json.loads(options.output.read_text())["runs"] if options.output.is_file() else {}
    print("\n".join(HEAD))
    with tempfile.TemporaryDirectory() as folder:
        cases = [(*case, STEPS) for case in tiny_cases(Path(folder), options.seed)]
        if options.real:
            cases += [(*case, options.steps) for case in real_cases(Path(folder), *options.real)]
        for name, flags, mode, steps in cases:
            if any(word in name for word in options.only) or (not options.only and name not in runs):
                runs[name] = compare(flags(), mode, steps)
                record = about(torch.device("cpu")) | {"runs": runs}
                options.output.write_text(json.dumps(record, indent=1) + "\n")
            if name in runs:
                print(row_of(name, runs[name]), flush=True)
    print("\n" + "\n".join(short_table(runs)))


if __name__ == "__main__":
    main()
