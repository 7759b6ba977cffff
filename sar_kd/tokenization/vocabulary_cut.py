"""Fewer tokens for a tokenizer: which of them are kept, and its definition rewritten for these.

The definition is what the `tokenizers` library writes as tokenizer.json. Kept tokens keep their order. A text whose
tokens are all kept has the same tokens as before: a BPE token is kept with every token that is formed on the way to it,
and merges keep their order, so the first possible merge is still the one that was made; a Unigram token keeps its
score, so the best of all segmentations is the best of fewer.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from sar_kd.errors import UsageError
from sar_kd.tokenization.backends import METASPACE, encode, read_vocabulary, special_tokens
from sar_kd.tokenization.token_table import PROBES, fuzz_texts

_KINDS = ("BPE", "Unigram")


class CuttableVocabulary:
    """The tokens of a Rust tokenizer, BPE or Unigram, and its definition."""

    def __init__(self, title: str, tokenizer: Any):
        """Raises: UsageError, which begins with the title, for a tokenizer of another kind"""
        self.title, self.tokenizer = title, tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise self._refused(f"is a {type(tokenizer).__name__} without a tokenizer.json")
        self._definition = json.loads(backend.to_str())
        self._model = self._definition["model"]
        kind = self._model["type"]
        if kind not in _KINDS:
            raise self._refused(f"is a {kind} tokenizer; only {' and '.join(_KINDS)} can be cut")
        if self._model.get("continuing_subword_prefix") or self._model.get("end_of_word_suffix"):
            raise self._refused("is a BPE that marks the parts of a word, which cannot be cut here")
        try:
            vocabulary = read_vocabulary(tokenizer)
        except ValueError as error:
            raise self._refused(str(error)) from None
        self._strings, self._pieces = vocabulary.strings, vocabulary.pieces

    def _refused(self, reason: str) -> UsageError:
        return UsageError(f"{self.title}: its tokenizer {reason}; leave out --vocab_size")

    def required(self, named: Collection[int]) -> set[int]:
        """The ids that stay in any case: single bytes, special and added tokens, those of the definition, `named` ones;
        each with the tokens that it is formed from. Without a token for each byte, every single character too.
        """
        names = special_tokens(self.tokenizer) | {METASPACE, self._model.get("unk_token")}
        single = {index for index, piece in self._pieces.items() if len(piece) == 1}
        if len({self._pieces[index] for index in single}) < 256:
            single |= {index for index, string in self._strings.items() if len(string) == 1}
        found = single | {*named} | {token["id"] for token in self._definition["added_tokens"]}
        for part, key in self._places(self._definition):
            found |= {*part[key]} if isinstance(part[key], list) else {part[key]}
        found |= {index for index, string in self._strings.items() if string in names}
        return {part for index in found for part in self._formed_from(index)}

    def require_room(self, required: Collection[int], num_rows: int, size: int) -> int:
        """How many required ids have one of the logit's `num_rows`. Raises: UsageError if they are more than `size`"""
        num_required = sum(index < num_rows for index in required)
        if num_required > size:
            raise UsageError(
                f"--vocab_size {size}: {num_required:,} tokens stay in any case (bytes, special and added tokens); "
                "keep more"
            )
        return num_required

    def choose(self, usage: np.ndarray, required: Collection[int], size: int) -> list[int]:
        """The ids to keep, ascending: `size` that have a logit, as far as there are so many, and required ones without.

        First the required ones, then those that a text uses most, then those that it uses with other case or without
        the space before, then those of the lowest ids; each with the tokens that it is formed from.

        usage: int64 [V], how often each id occurs in the text

        Raises: UsageError if there is no room for the required ones
        """
        kept, room = {*required}, size - self.require_room(required, len(usage), size)
        for index in np.lexsort((-self._usage_of_words(usage), -usage)).tolist():
            if not room:
                break
            if index in kept or index not in self._strings:
                continue
            new = self._formed_from(index) - kept
            if len(new) <= room:
                kept |= new
                room -= len(new)
        return sorted(kept)

    def _usage_of_words(self, usage: np.ndarray) -> np.ndarray:
        """int64 [V]: how often the text uses a token with these letters, whatever their case and the spaces around."""
        words = [self._pieces.get(index, b"").decode("utf-8", "replace").strip().lower() for index in range(len(usage))]
        counts = Counter[str]()
        for index in np.flatnonzero(usage).tolist():
            counts[words[index]] += int(usage[index])
        return np.array([counts[word] for word in words])

    def _formed_from(self, index: int) -> set[int]:
        """The token and, of BPE, every token that is formed on the way to it."""
        token = self._strings.get(index)
        if self._model["type"] != "BPE" or token is None or token not in self._model["vocab"]:
            return {index}
        symbols, formed = [*token], {*token}
        while len(symbols) > 1:
            rank, first = min((self._ranks.get(pair, math.inf), at) for at, pair in enumerate(pairwise(symbols)))
            if rank == math.inf:  # text never becomes it by merges
                return {index}
            symbols[first : first + 2] = ["".join(symbols[first : first + 2])]
            formed.add(symbols[first])
        return {index} | {self._model["vocab"][string] for string in formed}

    @cached_property
    def _ranks(self) -> Mapping[tuple[str, str], int]:
        """Both parts of each merge -> its place: the first possible one is made."""
        return {(left, right): rank for rank, (left, right) in enumerate(self._model["merges"])}

    def keep(self, kept: Sequence[int]) -> Any:
        """A tokenizer with these tokens alone, ascending, numbered from 0."""
        new = {old: index for index, old in enumerate(kept)}
        definition = copy.deepcopy({key: value for key, value in self._definition.items() if key != "model"})
        definition["model"] = {**self._model, **self._kept_model(new)}
        for token in definition["added_tokens"]:
            token["id"] = new[token["id"]]
        for part, key in self._places(definition):
            values = part[key]
            part[key] = [new[old] for old in values] if isinstance(values, list) else new[values]
        tokenizer = copy.copy(self.tokenizer)
        tokenizer._tokenizer = type(self.tokenizer.backend_tokenizer).from_str(json.dumps(definition))
        return tokenizer

    def _kept_model(self, new: Mapping[int, int]) -> dict[str, Any]:
        old = self._model["vocab"]
        if self._model["type"] == "Unigram":
            return {"vocab": [entry for index, entry in enumerate(old) if index in new]}
        vocab = {string: new[index] for string, index in old.items() if index in new}
        merges = [[a, b] for a, b in self._model["merges"] if a in vocab and b in vocab and a + b in vocab]
        return {"vocab": vocab, "merges": merges}

    @staticmethod
    def _places(definition: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        """Where a definition has ids outside its vocabulary: (dict or list, key of an id or of a list of ids)."""
        if definition["padding"]:
            yield definition["padding"], "pad_id"
        if definition["model"].get("unk_id") is not None:
            yield definition["model"], "unk_id"
        first = definition["post_processor"] or {}
        for processor in first.get("processors", [first]):
            for token in (processor.get("special_tokens") or {}).values():
                yield token, "ids"
            for name in ("sep", "cls"):
                if name in processor:  # [token, id]
                    yield processor[name], 1

    def check(self, kept: Sequence[int], written: Any) -> None:
        """Compare a tokenizer that was loaded again with what was kept, and the bytes of texts built to break it.

        Raises: UsageError naming the first difference
        """
        expected = {self._strings[old]: index for index, old in enumerate(kept) if old in self._strings}
        if (found := written.get_vocab()) != expected:
            number = len(found.items() ^ expected.items())
            raise self._refused(f"has other tokens than were kept once it is loaded again ({number} differ)")
        texts = [*PROBES, *fuzz_texts()]
        pieces = read_vocabulary(written).pieces
        for text, old, new in zip(texts, encode(self.tokenizer, texts), encode(written, texts), strict=True):
            before, after = b"".join([self._pieces[i] for i in old]), b"".join([pieces[i] for i in new])
            if before != after:
                raise self._refused(f"cannot spell {text[:40]!r} any more with fewer tokens")
