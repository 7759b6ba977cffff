"""Seconds and memory for each MB of text, as text grows.

    python benchmarks/input.py
    python benchmarks/input.py --sizes 2000 --shapes jsonl --pairs equal --limit_mb 1000

Each line of the table is its own process that does what a run does before its first step (documents, tokens, blocks,
the maps between the vocabularies) and then makes 200 batches; nothing is shared between them. Shapes: one line, a .txt
file of many lines, a .jsonl of many documents. Pairs: the embedded pair's tokenizers, or the student's own on both
sides.

Memory is counted in three ways. `anon` is the peak of RssAnon, sampled every 20 ms: the process's own memory, which
must not grow with the text. `rss` is getrusage's peak: it has the pages of mapped files too, which the system takes
back when it wants them. `start` is RssAnon once Python, torch and both tokenizers are loaded. With --limit_mb the
process may have no more than that (RLIMIT_DATA: heap, stacks and private memory, touched or not), or it fails.

Seconds are CPU seconds of all threads, so that a busy machine does not distort them; wall seconds stand beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RESULT = ROOT / "benchmarks" / "results" / "input.json"
BATCHES, BATCH_SIZE, BLOCK_SIZE = 200, 4, 256


def write_text(path: Path, num_bytes: int, shape: str) -> None:
    """Paragraphs of the embedded text, drawn at random and numbered."""
    from sar_kd import embedded

    (texts,) = embedded.read_text("transfer")
    paragraphs = [part for text in texts.values() for part in text.split("\n\n") if len(part) > 200]
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        number = written = 0
        while written < num_bytes:
            text = f"{draw.choice(paragraphs)} {number}"
            text = {"line": f"{' '.join(text.split())} ", "lines": f"{text}\n\n"}.get(shape) or json.dumps(
                {"text": text}
            )
            written += file.write(text if shape != "jsonl" else f"{text}\n")
            number += 1


class Meter(threading.Thread):
    """The peak of what this process holds in memory, beside what it does."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0.0
        self.start()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_mb())
            time.sleep(0.02)


def anonymous_mb() -> float:
    """RssAnon of this process."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1e3


def measure(path: str, pair_name: str, limit_mb: int) -> dict:
    """One row, in this process."""
    import transformers

    from sar_kd import embedded
    from sar_kd.config.sections import DataConfig
    from sar_kd.data.dataset import build_dataset
    from sar_kd.data.files.sources import load_documents
    from sar_kd.data.token_cache import TokenCache
    from sar_kd.tokenization.tokenizer_pair import TokenizerPair

    if limit_mb:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_mb * 10**6, limit_mb * 10**6))
    folders = embedded.STUDENT_DIR, embedded.STUDENT_DIR if pair_name == "equal" else embedded.TEACHER_DIR
    student, teacher = (transformers.AutoTokenizer.from_pretrained(str(folder)) for folder in folders)
    pair = TokenizerPair(student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher))
    row: dict = {"start_mb": anonymous_mb()}
    meter = Meter()

    @contextlib.contextmanager
    def stage(name: str):
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        row[f"{name}_s"], row[f"{name}_wall_s"] = time.process_time() - cpu, time.perf_counter() - wall
        print(f"  {name}: {row[f'{name}_s']:.1f} s, {row[f'{name}_wall_s']:.1f} s wall", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        cache = TokenCache(folder)
        with stage("load"):
            train, held_out = load_documents(DataConfig(train_file=(path,)))
        with stage("tokens"):
            corpus = build_dataset(train, pair, BLOCK_SIZE, 8 * BLOCK_SIZE, cache)
        build_dataset(held_out, pair, BLOCK_SIZE, 8 * BLOCK_SIZE, cache)
        with stage("maps"):
            corpus.micro_batches(0, BATCH_SIZE, 1, 0)
        with stage("batches"):
            for step in range(BATCHES):
                corpus.micro_batches(step, BATCH_SIZE, 1, 0)
        row["disk_mb"] = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1e6
        with stage("again"):
            build_dataset(train, pair, BLOCK_SIZE, 8 * BLOCK_SIZE, cache)
    row |= {"tokens": corpus.num_tokens, "blocks": len(corpus), "documents": len(corpus.text.names)}
    row |= {"anon_mb": meter.peak, "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64], help="MB")
    parser.add_argument("--shapes", nargs="+", default=["line", "lines", "jsonl"])
    parser.add_argument("--pairs", nargs="+", default=["equal", "different"])
    parser.add_argument("--limit_mb", type=int, default=0, help="what a process may hold; 0 for no limit")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="folder for text and tokens")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "PAIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.limit_mb)))
        return
    rows = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for shape in options.shapes:
        for size in options.sizes:
            with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
                path = Path(folder) / ("text.jsonl" if shape == "jsonl" else "text.txt")
                write_text(path, size * 10**6, shape)
                for pair in options.pairs:
                    command = [
                        sys.executable,
                        __file__,
                        "--measure",
                        str(path),
                        pair,
                        "--limit_mb",
                        str(options.limit_mb),
                    ]
                    print(f"{pair}, {shape}, {size} MB", file=sys.stderr, flush=True)
                    environment = os.environ | {"TMPDIR": options.scratch}
                    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
                    row = {"pair": pair, "shape": shape, "mb": path.stat().st_size / 1e6, "limit_mb": options.limit_mb}
                    rows[f"{pair} {shape} {size}"] = row | json.loads(found.stdout.splitlines()[-1])
                    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    print_table(rows)


def print_table(rows: dict[str, dict]) -> None:
    """The rows for a person to read."""
    print(
        f"{'pair, shape':<18}{'MB':>7}{'tokens':>13}{'s/MB':>7}{'batch ms':>9}{'again s':>8}{'disk/text':>10}", end=""
    )
    print(f"{'start MB':>9}{'anon MB':>8}{'rss MB':>7}")
    for row in rows.values():
        seconds = (row["load_s"] + row["tokens_s"]) / row["mb"]
        print(f"{row['pair'] + ', ' + row['shape']:<18}{row['mb']:>7,.0f}{row['tokens']:>13,}{seconds:>7.2f}", end="")
        print(
            f"{1e3 * row['batches_s'] / BATCHES:>9.1f}{row['again_s']:>8.1f}{row['disk_mb'] / row['mb']:>10.1f}", end=""
        )
        print(f"{row['start_mb']:>9.0f}{row['anon_mb']:>8.0f}{row['rss_mb']:>7.0f}")


if __name__ == "__main__":
    main()
