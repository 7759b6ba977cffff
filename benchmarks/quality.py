"""What distillation is worth on the embedded pair: bits per byte by variant, several seeds, same steps, same text.

    python benchmarks/quality.py                      # the tables of the README
    python benchmarks/quality.py --variants ce kd --seeds 0 1 2

Every run is one call of `train_sar_kd_stable.py` in a process of its own with one thread, as many at a time as
`--jobs`. The table goes to the terminal, the figures to `benchmarks/results/quality.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRECISE = ("--mode", "precise")
FP16 = ("--model_dtype", "float16")
CLAMPED = ("--logit_clamp_style", "normalized", "--loss_clamp_style", "scale")
LITERAL = ("--logit_clamp_style", "raw", "--loss_clamp_style", "hard", "--force")
VARIANTS = {
    "ce": ("cross-entropy only, precise", (*PRECISE, "--alpha_kd", "0", "--alpha_ce", "1")),
    "kd": ("distilled, precise", PRECISE),
    "kd_fp16": ("... in float16", (*PRECISE, *FP16)),
    "kd_clamps": ("... with the ±5 and 6 clamps as they are by default", (*PRECISE, *CLAMPED)),
    "kd_literal": ("... with the clamps to the letter (raw, hard)", (*PRECISE, *LITERAL)),
    "kd_clip": ("... clipped at 0.5, skipped above 2.0", (*PRECISE, "--max_grad_norm", "0.5", "--skip_rule", "storm")),
    "balanced": ("distilled, balanced, float16", ("--mode", "balanced", *FP16)),
    "balanced_ce": ("... without the teacher (--alpha_kd 0)", ("--mode", "balanced", *FP16, "--alpha_kd", "0")),
    "ultra": ("distilled, ultra-conservative, float16", ("--mode", "ultra-conservative", *FP16)),
    "ultra_ce": ("... without the teacher (--alpha_kd 0)", ("--mode", "ultra-conservative", *FP16, "--alpha_kd", "0")),
}


def measure(variant: str, seed: int, steps: int, extra: tuple[str, ...]) -> dict:
    """The summary of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train_sar_kd_stable.py"), *VARIANTS[variant][1], *extra]
        command += [
            "--train_steps",
            str(steps),
            "--eval_steps",
            "100",
            "--seed",
            str(seed),
            "--output_dir",
            f"{folder}/run",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\nexit {done.returncode}: {done.stderr or done.stdout}")
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    bits, seconds = summary["val_bits_per_byte_final"], summary["wall_seconds"]
    print(f"{variant}, seed {seed}: {bits:.4f} bits per byte, {seconds:.0f} s", file=sys.stderr)
    return summary


def table(results: dict[str, list[dict]], seeds: list[int]) -> str:
    """Markdown, one row a variant: bits per byte by seed, mean, and the success rate."""
    header = ["run", *(f"seed {seed}" for seed in seeds), "mean", "applied"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for variant, summaries in results.items():
        bits = [summary["val_bits_per_byte_final"] for summary in summaries]
        applied = statistics.mean(summary["success_rate"] for summary in summaries)
        cells = [f"{value:.4f}" for value in (*bits, statistics.mean(bits))]
        lines.append("| " + " | ".join([VARIANTS[variant][0], *cells, f"{applied:.1%}"]) + " |")
    first = next(iter(results.values()))[0]
    start, teacher = first["val_bits_per_byte_start"], first["teacher_val_bits_per_byte"]
    lines.append(f"\nStudent at the start {start:.4f}, teacher {teacher:.4f}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train_steps", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--flags", default="", help="further flags for every run, in one string")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    options = parser.parse_args()
    work = [(variant, seed) for variant in options.variants for seed in options.seeds]
    extra = tuple(options.flags.split())
    with ThreadPoolExecutor(options.jobs) as pool:
        summaries = list(pool.map(lambda item: measure(*item, options.train_steps, extra), work))
    results: dict[str, list[dict]] = {}
    for (variant, _), summary in zip(work, summaries, strict=True):
        results.setdefault(variant, []).append(summary)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps({"train_steps": options.train_steps, "seeds": options.seeds, "runs": results}, indent=1)
    )
    print(table(results, options.seeds))


if __name__ == "__main__":
    main()
