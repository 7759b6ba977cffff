"""The teacher's routing on the embedded pair: student and teacher after training, by routing.

    python benchmarks/sar.py

Same steps, same text, same seeds; only the routing differs (ka sees half of the text, twice). Every run is one call of
`train_sar_kd_stable.py` in its own process with one thread. Blocks are short and only a part of the validation text is
used, so that the grid takes less than an hour on one core; numbers are comparable within this table only. The cost of a
step is in `benchmarks/sar_cost.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from runs import ROOT, Results, Run, add_flags, table

sys.path.insert(0, str(ROOT))

from sar_kd import embedded

TEXT = Path("benchmarks/models/sar_text")  # from the repository's root, where runs are made
KEPT = 8
"""One of so many validation documents is read."""

SAR = ("--routing", "sar")
ALL, OWN = ("--sar_routing", "all"), ("--sar_routing", "native")
TWO_STAGE, JOINT = ("--sar_schedule", "two_stage"), ("--sar_schedule", "joint")
NO_ANCHOR = ("--router_anchor", "0")
VARIANTS = {
    "ce": ("cross-entropy only", ("--routing", "native", "--alpha_kd", "0", "--alpha_ce", "1")),
    "native": ("plain KD (native)", ("--routing", "native")),
    "all": ("all", ("--routing", "all")),
    "ka": ("ka", ("--routing", "ka")),
    "two_stage": ("sar, two_stage, every expert", (*SAR, *ALL, *TWO_STAGE)),
    "joint": ("sar, joint, every expert", (*SAR, *ALL, *JOINT)),
    "two_stage_free": ("... two_stage without anchor", (*SAR, *ALL, *TWO_STAGE, *NO_ANCHOR)),
    "joint_free": ("... joint without anchor", (*SAR, *ALL, *JOINT, *NO_ANCHOR)),
    "two_stage_own": ("sar, two_stage, own routing", (*SAR, *OWN, *TWO_STAGE)),
    "joint_own": ("sar, joint, own routing", (*SAR, *OWN, *JOINT)),
    "joint_own_free": ("... joint without anchor", (*SAR, *OWN, *JOINT, *NO_ANCHOR)),
}


def write_text() -> tuple[str, ...]:
    """The embedded text as files; the flags that name them."""
    train, validation = embedded.read_text("transfer", "validation")
    kept = dict(list(validation.items())[::KEPT])
    (ROOT / TEXT).mkdir(parents=True, exist_ok=True)
    for name, texts in (("train", train), ("validation", kept)):
        lines = (json.dumps({"text": text}) + "\n" for text in texts.values())
        (ROOT / TEXT / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return "--train_file", str(TEXT / "train.jsonl"), "--validation_file", str(TEXT / "validation.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add_flags(parser, "sar.json")
    parser.set_defaults(train_steps=200)
    options = parser.parse_args()
    steps = str(options.train_steps)
    shared = ("--mode", "precise", "--per_device_batch_size", "4", "--block_size", "128", "--train_steps", steps)
    shared += ("--student_lr", "2e-3", "--warmup_steps", "10")
    shared += ("--eval_steps", steps, "--log_steps", steps, "--save_steps", steps)
    shared += (*write_text(), *options.flags.split())
    grid = {
        variant: [Run((*VARIANTS[variant][1], *shared, "--seed", str(seed))) for seed in options.seeds]
        for variant in options.variants
    }
    results = Results(options.output, options.fresh)
    every = [run for of_seed in zip(*grid.values(), strict=True) for run in of_seed]  # a seed at a time
    failed = results.make(every, options.jobs)
    rows, beside = [], {}
    for variant, runs in grid.items():
        if summaries := results.summaries(runs):
            rows.append((VARIANTS[variant][0], summaries, _cells(summaries)))
            beside[variant] = [summary["val_bits_per_byte_final"] for summary in summaries]
    if rows:
        print(table(rows, options.seeds, ["teacher, own", "teacher, used", "entropy", "moved", "alarms"]))
        first = rows[0][1][0]
        start, teacher = first["val_bits_per_byte_start"], first["teacher_val_bits_per_byte"]
        print(f"\nBits per byte. Student at the start {start:.4f}, teacher {teacher:.4f}. {results.age_note(every)}")
        for reference in ("native", "all"):
            if reference in beside:
                print(f"Gain over {reference}, by seed:")
                for variant, bits in beside.items():
                    gains = [a - b for a, b in zip(beside[reference], bits, strict=True)]
                    print(f"  {variant:<16}" + " ".join(f"{gain:+.4f}" for gain in gains))
    if failed:
        raise SystemExit("Failed:\n" + "\n".join(failed))


def _cells(summaries: list[dict]) -> list[str]:
    """The teacher's bits per byte at the end in its own and in the run's routing, entropy, distance, alarms."""

    def mean(values) -> str:
        values = list(values)
        return f"{statistics.mean(values):.4f}" if values else ""

    ends = [summary.get("router_final") or summary["router_start"] for summary in summaries]
    own, used = (
        mean(end[key] for end in ends if key in end)
        for key in ("teacher_val_bits_per_byte_native", "teacher_val_bits_per_byte_routed")
    )
    entropies = mean(end["router_entropy"] for end in ends if "router_entropy" in end)
    moved = mean(statistics.mean(end["router_change"].values()) for end in ends if "router_change" in end)
    alarms = sorted({alarm for summary in summaries for alarm in summary.get("router_alarms", ())})
    return [own, used or own, entropies, moved, ", ".join(alarms)]


if __name__ == "__main__":
    main()
