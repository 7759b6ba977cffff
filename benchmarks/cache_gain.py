"""What a teacher cache keeps of the live teacher's gain, by what it keeps of each distribution (`sar-kd cache --keep`).

    python benchmarks/cache_gain.py
    python benchmarks/cache_gain.py --pairs different --keep topk mixed --seeds 0
    python benchmarks/cache_gain.py --pairs real            # after real_models.py --prepare

Bits per byte after 200 steps, `--mode precise`, of cross-entropy alone, of each cache and of the live teacher, and the
share of the gain from the first to the last that a cache keeps. The pairs: `different`, the embedded one, whose
tokenizers differ; `equal`, the embedded teacher with a student of its tokenizer, a Llama of 2 layers from a seed; and
`real`, SmolLM2 with its cut copy as `real_models.py` trains them (60 steps, equal tokenizers). The caches are built
once, in `benchmarks/models/cache_gain`. Runs are made by `runs.py`, each in its own process with one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import real_models
from paired import Shape, make_model

from runs import ROOT, Results, Run, add_flags, bits_of, table
from sar_kd import embedded

FOLDER = Path("benchmarks/models/cache_gain")  # from the repository's root, where runs are made
PAIRS = ("different", "equal")
REAL = Path("benchmarks/models/real")
KEEP = {
    "topk": ("--keep", "topk"),
    "sampled": ("--keep", "sampled"),
    "mixed": ("--keep", "mixed"),
    "one": ("--keep", "mixed", "--temperatures", "1", "--teacher_top_k", "12"),
}
"""The caches, by name in `--keep` and the folder's"""
RATE = "4e-3"
"""Of the Llama: the one of `precise` on the embedded student"""


def flags_of(pair: str) -> list[str]:
    """The flags that name a pair and its text; a student that has to be made is made if it is missing."""
    if pair == "different":
        return []
    if pair == "real":
        return [*real_models.flags_of(REAL, "equal", "english", 256), "--model_dtype", "float32"]
    from transformers import AutoTokenizer

    folder = FOLDER / "student"
    if not (ROOT / folder / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(embedded.TEACHER_DIR)
        make_model(Shape(96, 2), len(tokenizer), tokenizer.eos_token_id).save_pretrained(ROOT / folder)
        tokenizer.save_pretrained(ROOT / folder)
    return ["--student_model", str(folder)]


def build(pair: str, keep: str, flags: list[str]) -> tuple[Path, float]:
    """A cache, built if it is missing, and its bytes a token."""
    folder = FOLDER / f"{pair}-{keep}"
    command = [sys.executable, "-m", "sar_kd", "cache", *flags, *KEEP[keep], "--teacher_cache", str(folder), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return folder, json.loads(done.stdout[done.stdout.index("\n{") :])["bytes_per_token"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", nargs="+", choices=(*PAIRS, "real"), default=PAIRS)
    parser.add_argument("--keep", nargs="+", choices=KEEP, default=list(KEEP))
    add_flags(parser, "cache_gain.json")
    parser.set_defaults(train_steps=None)
    options = parser.parse_args()
    results = Results(options.output, options.fresh)
    failed = []
    for pair in options.pairs:
        flags, steps = flags_of(pair), str(options.train_steps or (60 if pair == "real" else 200))
        common = ["--mode", "precise", "--routing", "native", *options.flags.split()]
        common += ["--train_steps", steps, "--eval_steps", steps]
        arms, sizes = {"cross-entropy only": ["--alpha_kd", "0", "--alpha_ce", "1"]}, {}
        for keep in options.keep:
            folder, sizes[keep] = build(pair, keep, flags)
            arms[keep] = ["--teacher_cache", str(folder)]
        arms["live teacher"] = []
        rate = {"different": [], "equal": ["--student_lr", RATE], "real": [*real_models.COMMON]}[pair]
        grid = {
            arm: [Run((*flags, *common, *rate, *more, "--seed", str(seed))) for seed in options.seeds]
            for arm, more in arms.items()
        }
        failed += results.make([run for of_seed in zip(*grid.values(), strict=True) for run in of_seed], options.jobs)
        found = {arm: summaries for arm, runs in grid.items() if (summaries := results.summaries(runs))}
        if {"cross-entropy only", "live teacher"} <= found.keys():
            alone, live = (bits_of(found[arm]) for arm in ("cross-entropy only", "live teacher"))
            rows = []
            for arm, summaries in found.items():
                gains = [(a - b) / (a - c) for a, b, c in zip(alone, bits_of(summaries), live, strict=True)]
                size = f"{sizes[arm]:.0f}" if arm in sizes else ""
                rows.append((arm, summaries, [size, f"{statistics.mean(gains):.0%}"]))
            print(f"Tokenizers: {pair}\n\n{table(rows, options.seeds, ['bytes a token', 'gain kept'])}\n", flush=True)
    if failed:
        raise SystemExit("Failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
