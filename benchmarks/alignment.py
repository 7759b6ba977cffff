"""Distillation across tokenizers: the embedded pair's bits per byte by alignment, several seeds, same steps, same text.

    python benchmarks/alignment.py

Blocks of text end where both tokenizers end a token, so every run has the same blocks, cross-entropy alone too. Every
run is its own process with one thread, `--jobs` at a time; the table goes to the terminal, the numbers to
`benchmarks/results/alignment.json`; runs that are in the file are not repeated. Real models, other text and TRL's GOLD
are in `real_models.py`.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from runs import ROOT, Results, Run, add_flags, bits_of, table

sys.path.insert(0, str(ROOT))

from sar_kd.config.command_line import parse
from sar_kd.config.presets import STABLE
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.sources import load_documents
from sar_kd.evaluation.tokenizer_coverage import measure_coverage
from sar_kd.models.loading import load_tokenizers

# About 850 bytes in a block.
COMMON = ("--mode", "precise", "--student_lr", "4e-3", "--block_size", "344")
VARIANTS = {
    "ce": ("cross-entropy only", ("--alpha_kd", "0", "--alpha_ce", "1")),
    "strict": ("`strict`", ("--alignment", "strict")),
    "alm": ("`alm`", ("--alignment", "alm")),
    "auto": ("`auto` (`projection`)", ("--alignment", "auto")),
    "uld": ("`uld`", ("--alignment", "uld")),
    "hidden": ("`hidden`", ("--alignment", "hidden")),
}
"""`projection` is left out: where the tokenizers differ, it is what `auto` takes."""


def run_of(variant: str, seed: int, options: argparse.Namespace) -> Run:
    """The command of one run."""
    steps = str(options.train_steps)
    length = ("--train_steps", steps, "--eval_steps", steps, "--save_steps", steps)
    return Run((*COMMON, *VARIANTS[variant][1], *length, *options.flags.split(), "--seed", str(seed)))


def strict_coverage() -> float:
    """Share of the student's tokens, on the training text, that are one token of the teacher's, of the same bytes."""
    config = parse(STABLE, [*COMMON, "--output_dir", "unused"])
    size = config.data.block_size
    return measure_coverage(
        build_dataset(load_documents(config.data)[0], load_tokenizers(config.models), size, 8 * size)
    ).strict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--report", action="store_true", help="only the table of what --output has")
    add_flags(parser, "alignment.json")
    parser.set_defaults(train_steps=300)
    options = parser.parse_args()
    grid = {variant: [run_of(variant, seed, options) for seed in options.seeds] for variant in VARIANTS}
    results = Results(options.output, options.fresh)
    of_seeds = zip(*(grid[variant] for variant in options.variants), strict=True)
    chosen = [run for of_seed in of_seeds for run in of_seed]
    failed = [] if options.report else results.make(chosen, options.jobs)
    rows, ce = [], results.summaries(grid["ce"])
    for variant, runs in grid.items():
        if summaries := results.summaries(runs):
            cells = ["", ""]
            if ce and variant != "ce":
                gains = [base - own for base, own in zip(bits_of(ce), bits_of(summaries), strict=True)]
                cells = [f"{statistics.mean(gains):+.4f}", f"{min(gains):+.4f}"]
            rows.append((VARIANTS[variant][0], summaries, cells))
    if rows:
        first, note = rows[0][1][0], results.age_note(run for runs in grid.values() for run in runs)
        print(table(rows, options.seeds, ["gain", "least gain"]))
        print(
            f"\nStudent at the start {first['val_bits_per_byte_start']:.4f}, teacher "
            f"{first['teacher_val_bits_per_byte']:.4f}. {strict_coverage():.1%} of the student's tokens are one token "
            f"of the teacher's. {note}"
        )
    if failed:
        raise SystemExit("Failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
