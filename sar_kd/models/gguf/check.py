"""Is a GGUF file the model that it was made from? Its logits, and its tokens of a sample text, beside the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from sar_kd.errors import UsageError
from sar_kd.models.gguf.export import LIBRARY, llama_library
from sar_kd.models.gguf.tokens import cut_as_llama
from sar_kd.models.model_files import find_model
from sar_kd.models.pretrained import load_model
from sar_kd.runtime.environment import is_installed
from sar_kd.tokenization.backends import encode

LIMITS = {"float32": 1e-3, "float16": 1e-2, "q8_0": 1e-1, "q4_k_m": 4e-1}
"""Largest relative error of the logits, by `--quantize`"""

SAMPLE = """The quick brown fox didn't jump over 13 lazy dogs; it's 3.14159 or 1,000,000 times FASTER than they'd think.
    def area(radius):  # four spaces
        return 3.14 * radius ** 2

\tTabs, "quotes", na\u00efve caf\u00e9s, \u00dcber-Stra\u00dfe, \u041f\u0440\u0438\u0432\u0435\u0442, \u4f60\u597d,
\u0645\u0631\u062d\u0628\u0627, \U0001f642 and https://example.org/a?b=c&d=%20.


Spaces   in a row, and a last word"""
"""Words, numbers, code, scripts, and what tokenizers treat each in their own way"""

_MAX_TOKENS = 160


class GgufCheck(NamedTuple):
    """What the comparison has found."""

    error: float | None
    """|z' - z| / |z| over all positions, each position's logits less their mean; None where it could not be loaded"""
    num_positions: int
    same_top: float
    """Share of the positions with the same likeliest token"""
    reader: str
    """What has cut the sample text; '' where nothing here could as llama.cpp does"""
    reason: str
    """Why the logits were not compared; '' where they were"""

    def line(self, kind: str) -> str:
        """For people. kind: a value of `--quantize`"""
        logits = (
            f"logits differ by {self.error:.2%} (limit {LIMITS[kind]:.1%}), the likeliest token is the same at "
            f"{self.same_top:.0%} of {self.num_positions} positions"
            if self.error is not None
            else f"logits not compared, {self.reason}"
        )
        tokens = (
            f"it cuts the sample text into the same tokens, by {self.reader}"
            if self.reader
            else "its tokens not compared, which needs `pip install llama-cpp-python`"
        )
        return f"{'Checked' if self.error is not None and self.reader else 'Warning'}: {logits}; {tokens}"


def check_gguf(path: Path, name: str, kind: str, model: Any, tokenizer: Any) -> GgufCheck:
    """Compare a GGUF file with the model, in float32, that it was made from.

    name: that the file is to have; kind: a value of `--quantize`

    Raises: UsageError naming the file and the difference, where the logits differ by more than `LIMITS` or a token does
    """
    (ids,) = encode(tokenizer, [SAMPLE])
    reader = _check_tokens(path, name, tokenizer, list(map(int, ids)))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _MAX_TOKENS
    batch = torch.tensor(ids[: min(_MAX_TOKENS, context)], dtype=torch.int64)[None]
    with torch.no_grad():
        try:
            read, _ = load_model(find_model("output", str(path)), torch.float32, False)
            logits = read.eval()(input_ids=batch, use_cache=False).logits
        except UsageError as error:  # a kind of model that transformers reads from no GGUF file, or not rightly
            if not is_installed(LIBRARY):
                return GgufCheck(None, 0, 0.0, reader, f"as transformers cannot read the file: {error}")
            logits = _logits_by_llama(path, batch)
        own, other = map(_centred, (model(input_ids=batch, use_cache=False).logits, logits))
    vocab_size = min(own.shape[1], other.shape[1])  # a converter may drop ids that are no token
    if vocab_size < len(tokenizer):
        raise UsageError(f"--gguf: {name} has {vocab_size:,} tokens, and the tokenizer {len(tokenizer):,}")
    own, other = own[:, :vocab_size], other[:, :vocab_size]
    relative_error = ((other - own).norm() / own.norm()).item()
    if not relative_error <= LIMITS[kind]:
        raise UsageError(
            f"--gguf: the logits of {name} differ from the student's by {relative_error:.2%}, and the limit of {kind} "
            f"is {LIMITS[kind]:.1%}; the file was not kept"
        )
    same_top = (own.argmax(1) == other.argmax(1)).double().mean().item()
    return GgufCheck(relative_error, len(own), same_top, reader, "")


def _centred(logits: torch.Tensor) -> torch.Tensor:
    """Of one sequence, float64 [T, V]: a constant added to all logits of a position changes no probability."""
    logits = logits[0].double()
    finite = logits.masked_fill(logits.isinf(), 0.0)  # a token that is masked
    return finite - finite.mean(1, keepdim=True)


def _check_tokens(path: Path, name: str, tokenizer: Any, expected: list[int]) -> str:
    """Who has read the file's tokens, see `GgufCheck.reader`. Raises: UsageError where they differ"""
    found: list[int] | None
    if is_installed(LIBRARY):
        found, reader = _tokens_by_llama(path), "llama.cpp"
    else:
        found, reader = cut_as_llama(path, SAMPLE), "its entries, as llama.cpp reads them"
    if found is None:
        return ""
    if found != expected:
        pairs = zip([*found, None], [*expected, None], strict=False)
        first = next(i for i, (one, other) in enumerate(pairs) if one != other)
        near = tokenizer.decode(expected[max(0, first - 3) : first + 3])
        raise UsageError(
            f"--gguf: {name}, by {reader}, cuts text otherwise than the student's tokenizer: near {near!r} into "
            f"{found[first : first + 4]}, not {expected[first : first + 4]}; llama.cpp cannot use this "
            "tokenizer, so the file was not kept"
        )
    return reader


def _tokens_by_llama(path: Path) -> list[int]:
    model = llama_library([]).Llama(str(path), verbose=False, vocab_only=True)
    return list(model.tokenize(SAMPLE.encode(), add_bos=False, special=False))


def _logits_by_llama(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """float32 [1, T, V]"""
    model = llama_library([]).Llama(str(path), verbose=False, n_ctx=ids.shape[1], logits_all=True)
    model.eval(ids[0].tolist())
    return torch.tensor(model.scores[: ids.shape[1]])[None]
