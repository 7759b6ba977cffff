"""Distillation across tokenizers: bits per byte by alignment, several seeds, same steps, same text.

    python benchmarks/alignment_models.py             # once: the models and texts below benchmarks/models
    python benchmarks/alignment.py                    # the tables of the README
    python benchmarks/alignment.py --groups coarser finer --variants ce auto --seeds 0

A group is a teacher, a student and a text; `ceiling_*` are pairs with equal tokenizers, whose gain over cross-entropy
alone is the measure of the other groups' gains. Cross-entropy alone is run for each group, because the blocks
of text end where both tokenizers end a token and so depend on the pair. `gold` is TRL's loss (`gold.py`), at several
weights; it needs `--trl_python`, an interpreter that has `trl` beside this package's requirements, and is skipped
where there is none. Every run is its own process with one thread, `--jobs` at a time; the tables go to the terminal,
the numbers to `benchmarks/results/alignment.json`; runs that are in the file are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from typing import NamedTuple

from runs import ROOT, Results, Run, add_flags, bits_of, table

sys.path.insert(0, str(ROOT))

from sar_kd.config.command_line import parse
from sar_kd.config.presets import STABLE
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.sources import load_documents
from sar_kd.evaluation.tokenizer_coverage import measure_coverage
from sar_kd.models.loading import load_tokenizers

MODELS = "benchmarks/models"
EMBEDDED = "embedded"
COMMON = ("--mode", "precise", "--student_lr", "4e-3")
GOLD = "benchmarks/gold.py"

VARIANTS = {
    "ce": ("cross-entropy only", ("--alpha_kd", "0", "--alpha_ce", "1")),
    "kd": ("full KL, equal tokenizers", ()),
    "strict": ("strict", ("--alignment", "strict")),
    "projection": ("projection", ("--alignment", "projection")),
    "alm": ("alm", ("--alignment", "alm")),
    "auto": ("auto", ("--alignment", "auto")),
    "uld": ("uld", ("--alignment", "uld")),
    "hidden": ("hidden", ("--alignment", "hidden")),
    "gold": ("TRL's GOLD, weight 0.6", ("--alpha_kd", "0.6")),
    "gold_2.4": ("... weight 2.4", ("--alpha_kd", "2.4")),
    "gold_9.6": ("... weight 9.6", ("--alpha_kd", "9.6")),
    "gold_bayesian": ("... merged as `bayesian`, weight 0.6", ("--alpha_kd", "0.6", "--gold_merge", "bayesian")),
    "gold_bayesian_2.4": ("... merged as `bayesian`, weight 2.4", ("--alpha_kd", "2.4", "--gold_merge", "bayesian")),
    "gold_bayesian_9.6": ("... merged as `bayesian`, weight 9.6", ("--alpha_kd", "9.6", "--gold_merge", "bayesian")),
}
GOLDS = tuple(variant for variant in VARIANTS if variant.startswith("gold"))
LOSSES = ("ce", "strict", "alm", "auto", "uld", "hidden")
"""`projection` is left out: where the tokenizers differ, it is what `auto` takes."""
BLOCK_SIZES = {"student_byte2048": 256}
BLOCK_SIZE = 344
"""Tokens in a block: about 850 bytes for every student, so that all read the same text in a step."""


class Group(NamedTuple):
    """What a table is about; models below `MODELS` unless embedded, the embedded text unless `text` names another."""

    teacher: str
    student: str
    variants: tuple[str, ...]
    ceiling: str = ""
    text: str = ""


GROUPS = {
    "coarser": Group(EMBEDDED, "student_byte1024", (*LOSSES, *GOLDS), "ceiling_coarser"),
    "finer": Group("teacher_byte1024", "student_byte2048", (*LOSSES, *GOLDS), "ceiling_finer"),
    "ceiling_coarser": Group(EMBEDDED, "student_byte2048", ("ce", "kd")),
    "ceiling_finer": Group("teacher_byte1024", "student_byte1024", ("ce", "kd")),
    "low": Group(EMBEDDED, "student_low", LOSSES, "ceiling_coarser"),
    "sentencepiece": Group(EMBEDDED, EMBEDDED, LOSSES, "ceiling_coarser"),
    "english": Group(EMBEDDED, "student_byte1024", ("ce", "auto"), text="english"),
    "python_other_teacher": Group(EMBEDDED, "student_byte1024", ("ce", "auto"), text="python"),
    "english_sentencepiece": Group(EMBEDDED, EMBEDDED, ("ce", "auto"), text="english"),
    "python": Group("teacher_python", "student_byte1024", ("ce", "auto"), text="python"),
    "python_sentencepiece": Group("teacher_python", EMBEDDED, ("ce", "auto"), text="python"),
}


def run_of(group: Group, variant: str, seed: int, options: argparse.Namespace) -> Run:
    """The command of one run."""
    flags = [*COMMON, "--block_size", str(BLOCK_SIZES.get(group.student, BLOCK_SIZE))]
    for side, name in (("teacher", group.teacher), ("student", group.student)):
        flags += [] if name == EMBEDDED else [f"--{side}_model", f"{MODELS}/{name}"]
    for split in ("train", "validation") if group.text else ():
        flags += [f"--{split}_file", f"{MODELS}/{group.text}_{split}.jsonl"]
    steps = str(options.train_steps)
    flags += [*VARIANTS[variant][1], "--train_steps", steps, "--eval_steps", steps, "--save_steps", steps]
    flags += [*options.flags.split(), "--seed", str(seed)]
    return Run(tuple(flags), GOLD, options.trl_python) if variant in GOLDS else Run(tuple(flags))


def strict_coverage(group: Group) -> float:
    """Share of the student's tokens, on the training text, that are one token of the teacher's, of the same bytes."""
    flags = run_of(group, "ce", 0, argparse.Namespace(train_steps=1, flags="")).flags
    config = parse(STABLE, [*flags, "--output_dir", "unused"])
    size = config.data.block_size
    return measure_coverage(
        build_dataset(load_documents(config.data)[0], load_tokenizers(config.models), size, 8 * size)
    ).strict


def gain(own: list[dict], ce: list[dict]) -> list[float]:
    """Bits per byte better than cross-entropy alone, by seed."""
    return [base - value for base, value in zip(bits_of(ce), bits_of(own), strict=True)]


def report(name: str, grid: dict[str, dict[str, list[Run]]], results: Results, seeds: list[int]) -> str:
    """A group's table, with what is above it and below it."""
    group, found = GROUPS[name], {}
    for variant, runs in grid[name].items():
        if summaries := results.summaries(runs):
            found[variant] = summaries
    if not found:
        return ""
    ceiling = _ceiling_gain(group, grid, results)
    rows = []
    for variant, summaries in found.items():
        gains = gain(summaries, found["ce"]) if "ce" in found and variant != "ce" else None
        cells = [f"{statistics.mean(gains):+.4f}", f"{min(gains):+.4f}"] if gains else ["", ""]
        if ceiling:
            cells.append(f"{statistics.mean(gains) / ceiling:.0%}" if gains else "")
        rows.append((VARIANTS[variant][0], summaries, cells))
    first = next(iter(found.values()))[0]
    start, teacher = first["val_bits_per_byte_start"], first["teacher_val_bits_per_byte"]
    coverage = results.content.get("strict_coverage", {}).get(name)
    facts = [f"Student at the start {start:.4f}, teacher {teacher:.4f}."]
    facts += [f"Strict coverage {coverage:.1%}."] if coverage is not None else []
    facts += [f"Gain with equal tokenizers (`{group.ceiling}`) {ceiling:.4f}."] if ceiling else []
    facts += [results.age_note(run for runs in grid[name].values() for run in runs)]
    columns = ["gain", "least gain", *(["of the ceiling's"] if ceiling else [])]
    title = f"### {name}: {group.teacher} to {group.student}, {group.text or 'embedded'} text"
    return f"{title}\n\n{table(rows, seeds, columns)}\n\n{' '.join(facts).strip()}\n"


def _ceiling_gain(group: Group, grid: dict[str, dict[str, list[Run]]], results: Results) -> float:
    """Mean gain of full KL with this group's teacher and equal tokenizers; 0 where it was not measured."""
    runs = grid.get(group.ceiling, {})
    ce, kd = (results.summaries(runs[variant]) if variant in runs else None for variant in ("ce", "kd"))
    return statistics.mean(gain(kd, ce)) if ce and kd else 0.0


def has_trl(python: str) -> bool:
    """Whether this interpreter can import TRL's GOLD."""
    probe = "import os; os.environ['TRL_EXPERIMENTAL_SILENCE'] = '1'; import trl.experimental.gold"
    return subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--trl_python", default=sys.executable, help="interpreter with trl, for the gold runs")
    parser.add_argument("--report", action="store_true", help="only the tables of what --output has")
    add_flags(parser, "alignment.json")
    options = parser.parse_args()
    # Tables of the chosen groups; a ceiling is read for them even where it is not among the groups to run.
    grid = {
        name: {v: [run_of(group, v, seed, options) for seed in options.seeds] for v in group.variants}
        for name, group in GROUPS.items()
    }
    chosen = [variant for variant in options.variants if variant not in GOLDS]
    golds = [variant for variant in options.variants if variant in GOLDS]
    if golds and not options.report and has_trl(options.trl_python):
        chosen += golds
    elif golds and not options.report:
        print(f"{', '.join(golds)}: skipped, {options.trl_python} has no trl (see --trl_python)", file=sys.stderr)
    results = Results(options.output, options.fresh)
    failed = []
    if not options.report:
        work = [run for name in options.groups for v in grid[name] if v in chosen for run in grid[name][v]]
        failed = results.make(sorted(work, key=lambda run: run.flags[-1]), options.jobs)
        coverage = results.content.setdefault("strict_coverage", {})
        coverage |= {name: strict_coverage(GROUPS[name]) for name in options.groups if name not in coverage}
        results.save()
    for name in options.groups:
        if text := report(name, grid, results, options.seeds):
            print(text)
    if failed:
        raise SystemExit("Failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
