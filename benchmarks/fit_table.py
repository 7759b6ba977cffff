"""Which published models fit a 16 GB card, by the memory plan, from their shapes alone: no weights, no download.

    python benchmarks/fit_table.py
    python benchmarks/fit_table.py --students Qwen3-0.6B    # the rows of others stay as they are in the result
    python benchmarks/fit_table.py --trainings "LoRA 16, 4 bits"    # likewise

A T4 has 14.7 GiB. Each run has one block at once, accumulation and activation checkpointing, and computes in float16;
'fits' leaves the plan's margin of 15 %. There is no GPU here: the operations are those of a CPU with a GPU's float16
products, and 32 MiB are for libraries.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RESULT = ROOT / "benchmarks" / "results" / "fit_table.json"

CARD = 14.7 * 2**30
BLOCKS = (512, 1024)

_QWEN = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40960}
_LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "num_attention_heads": 32, "max_position_embeddings": 131072}
_GEMMA = {"head_dim": 256, "max_position_embeddings": 32768, "tie_word_embeddings": True}


def _sizes(width: int, inner: int, layers: int, heads: int | None = None, tied: bool = True) -> dict:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "tie_word_embeddings": tied}
    return sizes | ({"num_attention_heads": heads} if heads else {})


MODELS = {
    "Qwen3-0.6B": ("Qwen3Config", {**_QWEN, **_sizes(1024, 3072, 28, 16)}, 0.596),
    "Qwen3-1.7B": ("Qwen3Config", {**_QWEN, **_sizes(2048, 6144, 28, 16)}, 1.721),
    "Qwen3-4B": ("Qwen3Config", {**_QWEN, **_sizes(2560, 9728, 36, 32)}, 4.022),
    "Qwen3-8B": ("Qwen3Config", {**_QWEN, **_sizes(4096, 12288, 36, 32, tied=False)}, 8.191),
    "Llama-3.2-1B": ("LlamaConfig", {**_LLAMA, **_sizes(2048, 8192, 16), "head_dim": 64}, 1.236),
    "Llama-3.1-8B": ("LlamaConfig", {**_LLAMA, **_sizes(4096, 14336, 32, tied=False), "head_dim": 128}, 8.030),
    "SmolLM2-360M": (
        "LlamaConfig",
        {**_sizes(960, 2560, 32, 15), "vocab_size": 49152, "num_key_value_heads": 5, "max_position_embeddings": 8192},
        0.362,
    ),
    "SmolLM3-3B": (
        "SmolLM3Config",
        {**_sizes(2048, 11008, 36, 16), "vocab_size": 128256, "num_key_value_heads": 4, "pad_token_id": 128004,
         "max_position_embeddings": 65536},
        3.075,
    ),
    "Gemma-3-1B": (
        "Gemma3TextConfig",
        {**_GEMMA, **_sizes(1152, 6912, 26, 4), "vocab_size": 262144, "num_key_value_heads": 1, "sliding_window": 512},
        1.000,
    ),
    "Gemma-3-4B": (
        "Gemma3TextConfig",
        {**_GEMMA, **_sizes(2560, 10240, 34, 8), "vocab_size": 262208, "num_key_value_heads": 4,
         "sliding_window": 1024},
        3.880,
    ),
}  # fmt: skip
"""Name -> config class, its values, and billions of parameters, as the model's card or technical report has them.

The shapes are those of Qwen/Qwen3-*, meta-llama/Llama-3.2-1B and -3.1-8B, HuggingFaceTB/SmolLM2-360M and SmolLM3-3B,
google/gemma-3-1b-pt and, its text model, gemma-3-4b-pt; the test compares the number of parameters.
"""

PAIRS = {
    "SmolLM2-360M": ("SmolLM3-3B",),
    "Qwen3-0.6B": ("Qwen3-1.7B", "Qwen3-8B"),
    "Gemma-3-1B": ("Gemma-3-4B",),
    "Llama-3.2-1B": ("Llama-3.1-8B",),
    "Qwen3-1.7B": ("Qwen3-4B", "Qwen3-8B"),
    "SmolLM3-3B": ("Qwen3-8B",),
}
"""Student -> teachers"""

TRAININGS = {
    "AdamW": ("all", "adamw"),
    "8-bit AdamW": ("all", "adamw8bit"),
    "Adafactor": ("all", "adafactor"),
    "LoRA 16": ("adapter", "adamw"),
    "LoRA 16, 4 bits": ("adapter over nf4", "adamw"),
}
"""What is trained, and by which optimizer"""
TEACHERS = ("live", "4 bits", "spread", "cached")


@functools.cache
def model(name: str):
    """A model on the meta device."""
    import torch
    import transformers

    kind, values, _ = MODELS[name]
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values))


@contextlib.contextmanager
def card() -> Iterator[None]:
    """Plans made inside are those of the card."""
    from sar_kd.preflight import dry_run, memory_plan, memory_tracker
    from sar_kd.runtime import environment
    from sar_kd.runtime.precision import Precision

    class Plain(Precision):
        """Half products as a GPU makes them, without float32 copies of their inputs."""

        def __init__(self, *args):
            super().__init__(*args)
            self.emulates_float16 = False

    libraries = memory_plan._LIBRARIES["cuda"]
    adapted = functools.cache(lambda student, config, dtype: memory_tracker.with_adapter(student, config, dtype))
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (environment, "free_memory", lambda device: int(CARD) - libraries),
            (environment, "resident_memory", lambda: 0),
            (memory_plan, "_LIBRARIES", {"cpu": libraries}),
            (dry_run, "Precision", Plain),
            (dry_run, "with_adapter", adapted),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def plan_of(student: str, teacher: str, block_size: int, trained: str, how: str):
    """The plan of a run with AdamW. trained: of `TRAININGS`; how: of `TEACHERS`"""
    import torch

    from sar_kd.config.presets import MODES
    from sar_kd.config.runs import Config
    from sar_kd.models.memory_saving import layers_of
    from sar_kd.preflight.memory_plan import plan

    options = {
        "per_device_batch_size": 1, "grad_accum_steps": 8, "block_size": block_size, "gradient_checkpointing": True,
        "device": "cpu", "model_dtype": "float16", "lora_rank": 0 if trained == "all" else 16,
        "lora_quantization": "nf4" if trained == "adapter over nf4" else "off",
    }  # fmt: skip
    if how == "4 bits":
        options["teacher_quantization"] = "nf4"
    elif how == "cached":
        options["teacher_cache"] = "folder"
    elif how == "spread":  # room for what is outside the layers
        whole = model(teacher)
        in_layers = sum(p.numel() for layer in layers_of(whole) for p in layer.parameters())
        rest = 2 * (sum(p.numel() for p in whole.parameters()) - in_layers)
        options |= {"teacher_device_map": "auto", "teacher_max_memory": [f"cpu={math.ceil(rest / 1e6)}MB"]}
    config = Config.from_options({**MODES["balanced"], **options}, "balanced")
    models = {"teacher": model(teacher), "student": model(student)}
    return plan(config, models, torch.device("cpu"), torch.float16)


def with_optimizer(planned, student: str, optimizer: str):
    """A plan with AdamW as one with another optimizer: its state, and what an update holds for a moment."""
    import dataclasses

    from sar_kd.models.optimizer_state import state_bytes, update_bytes
    from sar_kd.preflight.dry_run import Phase

    weights = list(model(student).parameters())
    more = sum(state_bytes(weight, optimizer) - state_bytes(weight, "adamw") for weight in weights)
    moment = {"update": update_bytes(weights, optimizer)}
    phases = [
        Phase(name, {**sizes, "optimizer": sizes["optimizer"] + more + moment.get(name, 0)})
        for name, sizes in ((phase.name, phase.bytes) for phase in planned.phases)
    ]
    return dataclasses.replace(planned, phases=phases)


def rows_of(student: str, trainings: Collection[str]) -> list[dict]:
    """The runs of a student. trainings: of `TRAININGS`"""
    rows, plans = [], functools.cache(plan_of)
    for teacher in PAIRS[student]:
        for block_size in BLOCKS:
            for how in TEACHERS:
                for training in trainings:
                    trained, optimizer = TRAININGS[training]
                    found = plans(student, teacher, block_size, trained, how)
                    found = found if optimizer == "adamw" else with_optimizer(found, student, optimizer)
                    row = {"student": student, "teacher": teacher, "block_size": block_size, "training": training}
                    row |= {"how": how, "gib": round(found.needed / 2**30, 2), "verdict": found.verdict}
                    rows.append(row | {"peak": found.peak.name})
    return rows


def lines_of(rows: list[dict]) -> list[str]:
    """The table: GiB with a block of 512 tokens and of 1024; in bold what fits with both."""
    found = {(r["student"], r["teacher"], r["training"], r["how"], r["block_size"]): r for r in rows}
    lines = [f"| student | teacher | trained | {' | '.join(TEACHERS)} |", "|---|---|---|" + "---:|" * len(TEACHERS)]
    for student, teachers in PAIRS.items():
        for teacher in teachers:
            for training in TRAININGS:
                cells = []
                for how in TEACHERS:
                    both = [found.get((student, teacher, training, how, block_size)) for block_size in BLOCKS]
                    text = " / ".join(f"{row['gib']:.1f}" if row else "?" for row in both)
                    fits = all(row and row["verdict"] == "fits" for row in both)
                    cells.append(f"**{text}**" if fits else text)
                lines.append(f"| {student} | {teacher} | {training} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--students", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--trainings", nargs="+", default=list(TRAININGS), choices=list(TRAININGS))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    with card():
        for student in options.students:
            others = [row for row in rows if row["student"] != student or row["training"] not in options.trainings]
            rows = others + rows_of(student, options.trainings)
            options.output.write_text(json.dumps({"card_gib": 14.7, "rows": rows}, indent=1) + "\n")
            print(f"{student}: planned", flush=True)
    print("\n".join(lines_of(rows)))


if __name__ == "__main__":
    main()
