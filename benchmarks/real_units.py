"""SmolLM2-135M-Instruct learns to answer questions about units, by LoRA and in its own chat template.

    python benchmarks/real_models.py --prepare      # once: the model
    python benchmarks/real_units.py

Rank 4, alpha 16, all linear layers, rate 2e-4. Every dtype is a run of `sar-kd sft --task units` below `--runs`: one
that was interrupted goes on from its last checkpoint, a finished one is not repeated. Loss and gradient norm (before
clipping) are means of the first and of the last 20 steps. Accuracy and answer rate are of 500 questions that are not in
the training text, before and after, the latter of the student as it is saved. The table goes to the terminal, the
numbers to `benchmarks/results/real_units.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENDS = 20
"""Steps whose mean stands for the beginning and for the end"""


def command_of(dtype: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """The run's command, from the repository's root."""
    return [
        sys.executable, "-m", "sar_kd", "sft", "--task", "units", "--student_model", str(options.model),
        "--lora_rank", "4", "--lora_alpha", "16", "--learning_rate", "2e-4", "--model_dtype", dtype,
        "--train_steps", str(options.train_steps), "--per_device_batch_size", str(options.batch_size),
        "--eval_steps", str(options.train_steps), "--save_strategy", "steps", "--save_steps", "50",
        "--log_steps", "20", "--seed", str(options.seed), "--output_dir", str(folder),
        "--resume" if has_checkpoint(folder) else "--overwrite",
    ]  # fmt: skip


def has_checkpoint(folder: Path) -> bool:
    return (folder / "checkpoint" / "latest").is_file()


def is_finished(folder: Path) -> bool:
    path = folder / "summary.json"
    return path.is_file() and json.loads(path.read_text())["status"] == "finished"


def figures_of(folder: Path) -> dict:
    """What the table shows of a finished run, and what it was run with."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["event"] == "step"]
    summary = json.loads((folder / "summary.json").read_text())
    ends = {"start": steps[:ENDS], "end": steps[-ENDS:]}
    return {
        "steps": len(steps),
        "applied": sum(step["applied"] for step in steps),
        "target_tokens": sum(step["num_target_tokens"] for step in steps),
        **{
            f"{name}_{when}": statistics.mean(step[name] for step in part)
            for name in ("loss", "grad_norm")
            for when, part in ends.items()
        },
        "benchmark_result": summary["benchmark_result"],
        "wall_seconds": summary["wall_seconds"],
    }


def table(runs: dict[str, dict]) -> str:
    lines = [
        "| | steps, applied | loss, start and end | gradient norm | accuracy before | answer rate | accuracy after "
        "| answer rate | minutes |",
        "|---|" + "---:|" * 8,
    ]
    for name, run in runs.items():
        before, after = (run["benchmark_result"][key] for key in ("student_start", "student"))
        cells = [
            f"{run['steps']}, {run['applied']}",
            *(f"{run[f'{key}_start']:.2f} to {run[f'{key}_end']:.2f}" for key in ("loss", "grad_norm")),
            *(f"{scores[key]:.3f}" for scores in (before, after) for key in ("accuracy", "answer_rate")),
            f"{run['wall_seconds'] / 60:.0f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "benchmarks" / "models" / "real" / "smollm2")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"], choices=("float32", "float16"))
    parser.add_argument("--train_steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=4, help="examples a step, of about 65 tokens each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "real_units", help="folder of the run folders")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "real_units.json")
    options = parser.parse_args()
    content = json.loads(options.output.read_text()) if options.output.is_file() else {}
    for dtype in options.dtypes:
        name = f"{dtype}, {options.train_steps} steps of {options.batch_size}, seed {options.seed}"
        folder = options.runs.absolute() / name.replace(", ", "-").replace(" ", "-")
        if not is_finished(folder):
            code = subprocess.run(command_of(dtype, folder, options), cwd=ROOT, check=False).returncode
            if code or not is_finished(folder):
                hint = "; the same command goes on" if has_checkpoint(folder) else ""
                raise SystemExit(f"{name}: exit {code}{hint}")
        content[name] = figures_of(folder)
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content))


if __name__ == "__main__":
    main()
