"""Time and memory of a step and of its data as they grow.

    python benchmarks/growth.py

Tokens a step (1 k to 16 k, one micro-batch of more and more blocks), vocabulary (2 k to 150 k entries in both LM heads)
and text (1 to 16 times as much). A step is timed in its parts, because each of them grows differently:

    forward   both models up to the hidden states: constant per token, whatever the vocabulary
    loss      logit tiles, their comparison, the gradients of states and head: constant per token and vocabulary entry
    backward  the student's layers, and the gradient of its embedding, which grows with the vocabulary
    update    unscale, norm, clip, AdamW: constant per parameter, once a step

"Spread" is the largest number over the smallest, minus 1; at most 10 % is expected. Memory is what a part adds at its
peak: `forward` an amount per token, `loss` the workspace (`--loss_workspace_mb`), the head's gradient and that of the
hidden states, whatever the number of positions and vocabulary entries; and what a whole step,
`training.step.train_step`, adds to weights and optimizer. Sizes take turns; medians.

Text: CPU seconds to tokenize and pack it (for both tokenizers of the embedded pair), to align the two tokenizers, and
to make aligned batches.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from paired import NEVER_SKIPS, Clock, Run, Shape, add_flags, device_of, make_pair, peak_bytes, take_turns, write

from sar_kd import embedded
from sar_kd.config.sections import ModelConfig
from sar_kd.data.batch import Batch
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.models.loading import load_tokenizers, vocab_size_of
from sar_kd.training.optimizer import parameters_of

PARTS = ("forward", "loss", "backward", "update")
BLOCK = 256
TEACHER, STUDENT = Shape(256, 4), Shape(128, 4)


def by_parts(run: Run, batch: Batch, meter: Callable[[Callable[[], object]], float]) -> dict[str, float]:
    """What a meter shows for each part of one step, on a batch that is on the device."""
    kept, count = {}, batch.num_target_tokens
    scale = run.precision.loss_scale / count

    def forward():
        kept["outputs"] = run.objective.forward_models(batch)

    def loss():
        kept["total"] = run.objective(batch, kept.pop("outputs"), scale).total

    def backward():
        run.precision.backward(kept.pop("total") / count)

    def update():
        run.precision.unscale_(run.optimizer)
        parameters = parameters_of(run.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        run.optimizer.step()
        run.precision._scaler.update(1024.0 if run.precision.dtype is torch.float16 else None)
        run.optimizer.zero_grad(set_to_none=True)

    return {part.__name__: meter(part) for part in (forward, loss, backward, update)}


def measure(runs: dict[int, Run], rounds: int, of_cpu: bool) -> list[dict]:
    """Seconds and bytes of each part, and bytes of a whole step, for runs of growing size, in turns."""
    found: dict[int, list[dict]] = {size: [] for size in runs}
    bytes_of: dict[int, dict] = {}

    def turn(size: int, number: int) -> float:
        run = runs[size]
        (batch,) = run.batches(number)
        device = run.precision.device
        batch = batch.to(device)
        found[size].append(by_parts(run, batch, Clock(device, of_cpu)))
        if number == rounds:
            bytes_of[size] = by_parts(run, batch, functools.partial(peak_bytes, device))
            bytes_of[size]["step"] = peak_bytes(device, lambda: run.step([batch]))
        return 0.0

    take_turns({str(size): functools.partial(turn, size) for size in runs}, rounds)
    rows = []
    for size, run in runs.items():
        (batch,), student = run.batches(0), run.models.student
        row = {"tokens": batch.student.input_ids.numel(), "entries": vocab_size_of(student), "bytes": bytes_of[size]}
        row["parameters"] = sum(parameter.numel() for parameter in student.parameters())
        rows.append(row | {part: statistics.median(each[part] for each in found[size][1:]) for part in PARTS})
    return rows


def spread(values: Sequence[float]) -> float:
    """The largest over the smallest, less 1."""
    return max(values) / min(values) - 1


def heading(first: str, *others: str) -> None:
    """Of a table."""
    print(f"\n| {first} | " + " | ".join(others) + " |\n|---|" + "---:|" * len(others))


def grow_tokens(folder: Path, options: argparse.Namespace, dtype: str) -> dict:
    """Blocks in a step."""
    flags = make_pair(folder, TEACHER, STUDENT, options.entries)
    runs: dict[int, Run] = {}
    for tokens in options.tokens:
        sizes = ["--per_device_batch_size", str(tokens // BLOCK), "--block_size", str(BLOCK)]
        runs[tokens] = _run([*flags, *sizes], options, dtype, runs)
    rows = measure(runs, options.rounds, options.cpu_time)
    for row in rows:
        for part in PARTS[:3]:
            row[f"{part}_us_a_token"] = 1e6 * row[part] / row["tokens"]
        row["forward_bytes_a_token"] = row["bytes"]["forward"] / row["tokens"]
    names = [*(f"{part}_us_a_token" for part in PARTS[:3]), "forward_bytes_a_token"]
    spreads = {name: spread([row[name] for row in rows]) for name in names}
    heading(
        f"{dtype}, vocabulary of {options.entries}: tokens a step",
        *("forward, us a token", "loss, us a token", "backward, us a token", "update, ms", "forward, bytes a token"),
        *("loss, MB", "step, MB"),
    )
    for row in rows:
        each = " | ".join(f"{row[f'{part}_us_a_token']:.1f}" for part in PARTS[:3])
        sizes = f"{row['bytes']['loss'] / 1e6:.0f} | {row['bytes']['step'] / 1e6:.0f}"
        print(f"| {row['tokens']:,} | {each} | {1e3 * row['update']:.1f} | {row[names[3]]:,.0f} | {sizes} |")
    shown = " | ".join(f"{spreads[name]:.1%}" for name in names[:3])
    print(f"| spread | {shown} | | {spreads[names[3]]:.1%} | | |", flush=True)
    return {"rows": rows, "spread": spreads}


def grow_vocabulary(folder: Path, options: argparse.Namespace, dtype: str) -> dict:
    """More vocabulary entries in both LM heads."""
    runs: dict[int, Run] = {}
    for entries in options.vocab_size:
        sizes = ["--per_device_batch_size", str(options.at_tokens // BLOCK), "--block_size", str(BLOCK)]
        flags = make_pair(folder / str(entries), TEACHER, STUDENT, entries, num_tokens=2048)
        runs[entries] = _run([*flags, *sizes], options, dtype, {})
    rows = measure(runs, options.rounds, options.cpu_time)
    for row in rows:
        row["forward_us_a_token"] = 1e6 * row["forward"] / row["tokens"]
        row["loss_ns_a_token_and_entry"] = 1e9 * row["loss"] / row["tokens"] / row["entries"]
        row["update_ns_a_parameter"] = 1e9 * row["update"] / row["parameters"]
    names = "forward_us_a_token", "loss_ns_a_token_and_entry", "update_ns_a_parameter"
    spreads = {name: spread([row[name] for row in rows]) for name in names}
    heading(
        f"{dtype}, {options.at_tokens} tokens: vocabulary",
        *("forward, us a token", "loss, ns a token and entry", "backward, ms", "update, ns a parameter"),
        *("loss, MB", "of which head's gradient", "step, MB"),
    )
    for row in rows:
        head = 4 * row["entries"] * STUDENT.width
        sizes = " | ".join(f"{size / 1e6:.0f}" for size in (row["bytes"]["loss"], head, row["bytes"]["step"]))
        print(
            f"| {row['entries']:,} | {row[names[0]]:.1f} | {row[names[1]]:.3f} | {1e3 * row['backward']:.0f} | "
            f"{row[names[2]]:.2f} | {sizes} |"
        )
    print(
        f"| spread | {spreads[names[0]]:.1%} | {spreads[names[1]]:.1%} | | {spreads[names[2]]:.1%} | | | |", flush=True
    )
    return {"rows": rows, "spread": spreads}


def _run(flags: list[str], options: argparse.Namespace, dtype: str, others: dict[int, Run]) -> Run:
    given = {"given": next(iter(others.values())).given} if others else {}
    more = ["--device", options.device, "--model_dtype", dtype, "--mode", "precise", "--student_lr", "1e-6"]
    return Run([*flags, *NEVER_SKIPS, *more, "--init_loss_scale", "1024"], **given)


def grow_text(options: argparse.Namespace) -> dict:
    """Tokenising, connecting and aligning a text that is there several times over."""
    (texts,) = embedded.read_text("transfer")
    whole = list(texts.values())[: options.documents]
    pair = load_tokenizers(ModelConfig())
    turns: dict[int, list[dict]] = {times: [] for times in options.times}

    def turn(times: int, number: int) -> float:
        documents = [Document(f"{copy} {i}", text) for copy in range(times) for i, text in enumerate(whole)]
        num_bytes = sum(len(document.text.encode()) for document in documents)
        marks = [time.process_time()]
        corpus = build_dataset(documents, pair, BLOCK, 8 * BLOCK)
        marks.append(time.process_time())
        corpus.batch([0])  # the first makes the maps of the whole text
        marks.append(time.process_time())
        made = [corpus.batch([int(i)]) for i in torch.linspace(0, len(corpus) - 1, options.batches)]
        marks.append(time.process_time())
        tokens = sum(batch.num_target_tokens for batch in made)
        spent = [after - before for before, after in itertools.pairwise(marks)]
        turns[times].append(
            {
                "bytes": num_bytes,
                "tokens_us_a_byte": 1e6 * spent[0] / num_bytes,
                "pairing_us_a_byte": 1e6 * spent[1] / num_bytes,
                "batches_us_a_token": 1e6 * spent[2] / tokens,
            }
        )
        return 0.0

    take_turns({str(times): functools.partial(turn, times) for times in options.times}, options.text_rounds)
    names = "tokens_us_a_byte", "pairing_us_a_byte", "batches_us_a_token"
    rows = []
    for times, found in turns.items():
        row = {"times": times, "bytes": found[0]["bytes"]}
        rows.append(row | {name: statistics.median(each[name] for each in found[1:]) for name in names})
    spreads = {name: spread([row[name] for row in rows]) for name in names}
    each = "tokens and blocks, us a byte", "connecting, us a byte", "aligned batches, us a token"
    heading("text, times", "KB", *each)
    for row in rows:
        figures = " | ".join(f"{row[name]:.3f}" for name in names)
        print(f"| {row['times']} | {row['bytes'] / 1e3:.0f} | {figures} |")
    print("| spread | | " + " | ".join(f"{spreads[name]:.1%}" for name in names) + " |", flush=True)
    return {"rows": rows, "spread": spreads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_flags(parser, "growth.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text_rounds", type=int, default=3)
    parser.add_argument("--model_dtype", nargs="+", default=["float32"])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384], help="a step")
    parser.add_argument("--entries", type=int, default=8192, help="of the vocabulary, while tokens grow")
    parser.add_argument("--vocab_size", type=int, nargs="*", default=[2048, 8192, 32000, 75000, 150000])
    parser.add_argument("--at_tokens", type=int, default=1024, help="a step, while the vocabulary grows")
    parser.add_argument("--times", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--documents", type=int, default=20, help="of the text that is there once")
    parser.add_argument("--batches", type=int, default=40, help="blocks to align")
    options = parser.parse_args()
    device_of(options)
    results: dict = {"rounds": options.rounds}
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in options.model_dtype:
            if options.tokens:
                results[f"tokens, {dtype}"] = grow_tokens(Path(scratch) / "tokens", options, dtype)
            if options.vocab_size:
                results[f"vocabulary, {dtype}"] = grow_vocabulary(Path(scratch) / "rows", options, dtype)
    if options.times:
        results["text"] = grow_text(options)
    write(options, results)


if __name__ == "__main__":
    main()
