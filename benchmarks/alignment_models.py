"""The inputs of `benchmarks/alignment.py`: models with tokenizers of several kinds, English text, Python source.

    python benchmarks/alignment_models.py                    # all of it, below benchmarks/models
    python benchmarks/alignment_models.py --only student_low english

Everything is made from the installed interpreter and the embedded teacher, seeded; what exists already is not made
again. The models are trained on the `teacher` split of the embedded text, as the embedded pair does:

    teacher_byte1024    the embedded teacher's backbone with a byte-level BPE of 1024 tokens, trained further
    teacher_python      the embedded teacher, trained further on Python source
    student_byte1024    the embedded student's architecture, byte-level BPE of 1024 tokens
    student_byte2048    the same with the embedded teacher's own tokenizer
    student_low         the same with a space at the END of a word, so that few tokens are the teacher's
    english, python     `*_train.jsonl` and `*_validation.jsonl`, from the transfer and the validation split
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sar_kd import embedded  # noqa: E402
from sar_kd.commands import build_embedded  # noqa: E402
from sar_kd.evaluation.perplexity import evaluate  # noqa: E402
from sar_kd.runtime.precision import Precision  # noqa: E402

MODELS = ROOT / "benchmarks" / "models"
TEACHER_STEPS, STUDENT_STEPS, PYTHON_STEPS = 800, 200, 400
SEED = 0
SIZES = {"transfer": 600_000, "validation": 60_000}
"""Most bytes of English and of Python source in each split."""


# ------------------------------------------------------------------------------------------------ tokenizers, models


def space_last_bpe(texts: list[str], vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """SentencePiece's kind with the space, as U+2581, at the end of a word: its tokens straddle GPT-2's kind."""
    return build_embedded.sentencepiece_bpe(texts, vocab_size, pre_tokenizers.Split("\u2581", "merged_with_previous"))


def student_model(tokenizer) -> nn.Module:
    """The embedded student's architecture, new, for this tokenizer."""
    config = build_embedded.student_model().config
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(SEED)
    return transformers.LlamaForCausalLM(config)


def teacher_model(tokenizer) -> nn.Module:
    """The embedded teacher with embeddings for this tokenizer: of each token, the mean of its old pieces'."""
    old_tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.TEACHER_DIR)
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded.TEACHER_DIR, dtype=torch.float32)
    old, old_vocab = model.get_input_embeddings().weight.detach().clone(), old_tokenizer.get_vocab()
    rows = torch.empty(len(tokenizer), old.shape[1])
    for token, index in tokenizer.get_vocab().items():
        pieces = [old_vocab[token]] if token in old_vocab else _pieces(old_tokenizer, token)
        rows[index] = old[pieces].mean(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(rows)
    return model


def _pieces(tokenizer, token: str) -> list[int]:
    """Ids of the pieces that the tokenizer's model cuts a token of another byte-level vocabulary into."""
    return [piece.id for piece in tokenizer.backend_tokenizer.model.tokenize(token)]


def make_model(name: str, folder: Path) -> None:
    """Train one model and write it, its tokenizer and its figures to `folder`."""
    started = time.monotonic()
    texts, transfer, validation = embedded.read_text("teacher", "transfer", "validation")
    make_tokenizer, new_model, steps, noise = KINDS[name]
    tokenizer = make_tokenizer(list(texts.values()))
    if name in SOURCES:
        texts, transfer, validation = (SOURCES[name](split) for split in ("teacher", "transfer", "validation"))
    model = new_model(tokenizer)
    build_embedded.pretrain(model, build_embedded.dataset_of(tokenizer, texts), steps, noise, SEED, name)
    figures = {"steps": steps, "parameters": sum(parameter.numel() for parameter in model.parameters())}
    for split, held_out_texts in (("transfer", transfer), ("validation", validation)):
        held_out = build_embedded.dataset_of(tokenizer, held_out_texts)
        batches = held_out.token_batches("student", build_embedded.BATCH_SIZE)
        score = evaluate(model, batches, held_out.text.num_bytes, Precision(torch.device("cpu"), torch.float32, 1.0))
        figures[f"{split}_bits_per_byte"] = score.bits_per_byte
    figures["seconds"] = time.monotonic() - started
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{name}: {json.dumps(figures)}")


def _teacher_tokenizer(_texts: list[str]):
    return transformers.AutoTokenizer.from_pretrained(embedded.TEACHER_DIR)


KINDS = {
    "student_byte1024": (lambda texts: build_embedded.byte_level_bpe(texts, 1024), student_model, STUDENT_STEPS, 0.0),
    "student_byte2048": (_teacher_tokenizer, student_model, STUDENT_STEPS, 0.0),
    "student_low": (lambda texts: space_last_bpe(texts, 1024), student_model, STUDENT_STEPS, 0.0),
    "teacher_byte1024": (
        lambda texts: build_embedded.byte_level_bpe(texts, 1024),
        teacher_model,
        TEACHER_STEPS,
        build_embedded.INPUT_NOISE,
    ),
    "teacher_python": (_teacher_tokenizer, teacher_model, PYTHON_STEPS, build_embedded.INPUT_NOISE),
}  # fmt: skip
"""How each model's tokenizer and body are made, its steps and its input noise."""


# -------------------------------------------------------------------------------------------------------------- texts


def english(split: str) -> dict[str, str]:
    """The embedded text's paragraphs of plain sentences: no prompt, no indentation, few characters but letters."""
    (texts,) = embedded.read_text(split)
    prose = {}
    for name, text in texts.items():
        kept = [paragraph for paragraph in re.split(r"\n\s*\n", text) if _is_prose(paragraph)]
        if kept:
            prose[name] = "\n\n".join(kept)
    return prose


def _is_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character in " \n,.'" for character in paragraph)
    lines = paragraph.split("\n")
    indented = any(line.startswith("  ") for line in lines[1:])
    return not indented and ">>>" not in paragraph and "::=" not in paragraph and letters >= 0.94 * len(paragraph)


def python(split: str) -> dict[str, str]:
    """The standard library's top-level functions and classes as written, without docstrings, by document name."""
    found = {}
    for module, source in embedded.read_modules():
        for name, code in _definitions(ast.parse(source), source.decode().split("\n")):
            if embedded.split_of(f"{module}:{name}") == split:
                found[f"{module}:{name}"] = code
    return found


def _definitions(tree: ast.Module, lines: list[str]) -> Iterator[tuple[str, str]]:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for top in tree.body:
        if isinstance(top, kinds):
            kept = {number: lines[number - 1] for number in range(_first_line(top), top.end_lineno + 1)}
            for node in ast.walk(top):
                if isinstance(node, kinds) and ast.get_docstring(node) is not None:
                    _drop_docstring(node, kept)
            yield top.name, "\n".join(kept[number] for number in sorted(kept))


def _first_line(node) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _drop_docstring(node, kept: dict[int, str]) -> None:
    statement = node.body[0]
    if kept[statement.lineno][: statement.col_offset].strip():
        return  # on the line of its `def`
    for number in range(statement.lineno, statement.end_lineno + 1):
        del kept[number]
    if len(node.body) == 1:
        kept[statement.lineno] = " " * statement.col_offset + "pass"


def make_text(name: str, folder: Path) -> None:
    """Write one kind of text as `NAME_train.jsonl` and `NAME_validation.jsonl`: whole documents up to `SIZES`."""
    for split, limit in SIZES.items():
        texts = TEXTS[name](split)
        chosen, size = [], 0
        for document in sorted(texts, key=lambda document: hashlib.sha256(document.encode()).digest()[8:]):
            length = len(texts[document].encode())
            if size + length <= limit:
                chosen.append(document)
                size += length
        lines = [json.dumps({"name": document, "text": texts[document]}) for document in sorted(chosen)]
        path = folder / f"{name}_{'train' if split == 'transfer' else split}.jsonl"
        path.write_text("\n".join(lines) + "\n")
        print(f"{path.name}: {len(chosen)} documents, {size / 1e3:.0f} kB")


TEXTS = {"english": english, "python": python}
SOURCES = {"teacher_python": python}
"""What a model is trained on where it is not the embedded text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[*TEXTS, *KINDS], default=[*TEXTS, *KINDS])
    parser.add_argument("--output", type=Path, default=MODELS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        if name in TEXTS and not (options.output / f"{name}_validation.jsonl").is_file():
            make_text(name, options.output)
        if name in KINDS and not (options.output / name / "figures.json").is_file():
            make_model(name, options.output / name)


if __name__ == "__main__":
    main()
