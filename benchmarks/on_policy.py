"""On-policy against off-policy distillation: unit conversion, the embedded pair, fine-tuned before.

    python benchmarks/on_policy.py

Teacher and student are fine-tuned once, the student shortly. From there every run has the same number of steps, prompts
and seeds; only text, divergence and routing differ. Each is one call of `train_sar_kd_stable.py` in its own
process with one thread. Accuracy and answer rate are of the student at the end, on questions that no run has seen.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from runs import ROOT, Results, Run, add_flags, spread_of, table

sys.path.insert(0, str(ROOT))

from sar_kd.embedded import TEACHER_DIR

MODELS = Path("benchmarks/models/on_policy")  # from the repository's root, where runs are made
FINE_TUNED = {
    "teacher": ("--student_model", str(TEACHER_DIR), "--learning_rate", "1e-3", "--train_steps", "1500"),
    "student": ("--train_steps", "2000"),
}
ON, HALF = ("--on_policy_fraction", "1"), ("--on_policy_fraction", "0.5")
FORWARD, REVERSE, JSD = (("--kd_direction", direction) for direction in ("forward", "reverse", "jsd"))
SAR = ("--routing", "sar")
VARIANTS = {
    "ce": ("cross-entropy only", ("--alpha_kd", "0", "--alpha_ce", "1")),
    "off_forward": ("off-policy, forward KL", FORWARD),
    "on_reverse": ("on-policy, reverse KL", (*ON, *REVERSE)),
    "half_jsd": ("half on-policy, JSD 0.5", (*HALF, *JSD)),
    "off_forward_sar": ("off-policy, forward KL, sar", (*FORWARD, *SAR)),
    "on_reverse_sar": ("on-policy, reverse KL, sar", (*ON, *REVERSE, *SAR)),
    "half_jsd_sar": ("half on-policy, JSD 0.5, sar", (*HALF, *JSD, *SAR)),
}


def fine_tune(name: str, flags: tuple[str, ...] = ()) -> None:
    """Fine-tune the teacher or a student on the questions, below `MODELS`, unless that was done before."""
    folder = MODELS / name
    if not (ROOT / folder / "student" / "config.json").is_file():
        print(f"fine-tuning: {name} ...", file=sys.stderr, flush=True)
        flags = (*FINE_TUNED.get(name, FINE_TUNED["student"]), *flags, "--output_dir", str(folder), "--overwrite")
        command = [sys.executable, "-m", "sar_kd", "sft", "--task", "units", *flags]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add_flags(parser, "on_policy.json")
    parser.set_defaults(train_steps=300)
    options = parser.parse_args()
    for name in FINE_TUNED:
        fine_tune(name)
    steps = str(options.train_steps)
    shared = ("--task", "units", "--task_teacher_steps", "0", "--skip_baseline", "--mode", "precise")
    shared += ("--alpha_kd", "1", "--alpha_ce", "0", "--student_lr", "5e-4", "--warmup_steps", "20")
    shared += ("--teacher_model", str(MODELS / "teacher/student"), "--student_model", str(MODELS / "student/student"))
    shared += ("--train_steps", steps, "--eval_steps", steps, "--log_steps", steps, "--save_steps", steps)
    shared += ("--max_new_tokens", "48", *options.flags.split())
    grid = {
        variant: [Run((*shared, *VARIANTS[variant][1], "--seed", str(seed))) for seed in options.seeds]
        for variant in options.variants
    }
    results = Results(options.output, options.fresh)
    every = [run for of_seed in zip(*grid.values(), strict=True) for run in of_seed]  # a seed at a time
    failed = results.make(every, options.jobs)
    rows, first = [], None
    for variant, runs in grid.items():
        if summaries := results.summaries(runs):
            first = first or summaries[0]
            rows.append((VARIANTS[variant][0], summaries, _cells(summaries)))
    if first:
        columns = ["accuracy", "sd", "answer rate", "tokens", "sampling", "wall"]
        print(table(rows, options.seeds, columns))
        scores = first["benchmark_result"]
        print(
            f"\nBits per byte, of the answers; accuracy and answer rate: means over the seeds. At the start "
            f"{first['val_bits_per_byte_start']:.4f}, accuracy {scores['student_start']['accuracy']:.3f}; teacher "
            f"{first['teacher_val_bits_per_byte']:.4f}, {scores['teacher']['accuracy']:.3f}. {results.age_note(every)}"
        )
    if failed:
        raise SystemExit("Failed:\n" + "\n".join(failed))


def _cells(summaries: list[dict]) -> list[str]:
    scores = [summary["benchmark_result"]["student_end"] for summary in summaries]
    accuracies = [score["accuracy"] for score in scores]
    tokens = statistics.mean(s["tokens"] for s in summaries)
    sampling = statistics.mean(s.get("on_policy", {}).get("sampling_seconds", 0.0) for s in summaries)
    return [
        f"{statistics.mean(accuracies):.3f}",
        f"{spread_of(accuracies):.3f}",
        f"{statistics.mean(score['answer_rate'] for score in scores):.3f}",
        f"{tokens / 1000:.0f} k",
        f"{sampling:.0f} s" if sampling else "",
        f"{statistics.mean(s['wall_seconds'] for s in summaries):.0f} s",
    ]


if __name__ == "__main__":
    main()
