"""What distillation is worth on the embedded pair: bits per byte by variant, several seeds, same steps, same text.

    python benchmarks/quality.py                      # the tables of docs/quality.md
    python benchmarks/quality.py --variants ce kd --seeds 0 1 2

Every run is one call of `train_sar_kd_stable.py` in its own process with one thread, as many at a time as
`--jobs`. The table goes to the terminal, the numbers to `benchmarks/results/quality.json`.
"""

from __future__ import annotations

import argparse
import statistics

from runs import Results, Run, add_flags, table

PRECISE = ("--mode", "precise")
FP16 = ("--model_dtype", "float16")
CLAMPED = ("--logit_clamp_style", "normalized", "--loss_clamp_style", "scale")
LITERAL = ("--logit_clamp_style", "raw", "--loss_clamp_style", "hard", "--force")
VARIANTS = {
    "ce": ("cross-entropy only, precise", (*PRECISE, "--alpha_kd", "0", "--alpha_ce", "1")),
    "kd": ("distilled, precise", PRECISE),
    "kd_fp16": ("... in float16", (*PRECISE, *FP16)),
    "kd_clamps": ("... with the ±5 and 6 clamps as they are by default", (*PRECISE, *CLAMPED)),
    "kd_literal": ("... with the clamps in literal form (raw, hard)", (*PRECISE, *LITERAL)),
    "kd_clip": ("... clipped at 0.5, skipped above 2.0", (*PRECISE, "--max_grad_norm", "0.5", "--skip_rule", "fixed")),
    "balanced": ("distilled, balanced, float16", ("--mode", "balanced", *FP16)),
    "balanced_ce": ("... without the teacher (--alpha_kd 0)", ("--mode", "balanced", *FP16, "--alpha_kd", "0")),
    "ultra": ("distilled, ultra-conservative, float16", ("--mode", "ultra-conservative", *FP16)),
    "ultra_ce": ("... without the teacher (--alpha_kd 0)", ("--mode", "ultra-conservative", *FP16, "--alpha_kd", "0")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add_flags(parser, "quality.json")
    options = parser.parse_args()
    shared = ("--train_steps", str(options.train_steps), "--eval_steps", "100", "--routing", "native")
    shared += tuple(options.flags.split())  # what routing is worth is in benchmarks/sar.py
    grid = {
        variant: [Run((*VARIANTS[variant][1], *shared, "--seed", str(seed))) for seed in options.seeds]
        for variant in options.variants
    }
    results = Results(options.output, options.fresh)
    every = [run for runs in grid.values() for run in runs]
    failed = results.make(every, options.jobs)
    rows = []
    for variant, runs in grid.items():
        if summaries := results.summaries(runs):
            applied = statistics.mean(summary["success_rate"] for summary in summaries)
            rows.append((VARIANTS[variant][0], summaries, [f"{applied:.1%}"]))
    if rows:
        first = rows[0][1][0]
        start, teacher = first["val_bits_per_byte_start"], first["teacher_val_bits_per_byte"]
        print(table(rows, options.seeds, ["applied"]))
        print(f"\nStudent at the start {start:.4f}, teacher {teacher:.4f}. {results.age_note(every)}")
    if failed:
        raise SystemExit("Failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
