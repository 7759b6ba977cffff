"""Words of a held-out text: each is cut alike by both tokenizers, and the losses of all of them make the text's."""

import itertools
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from sar_kd.data import words
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Conversation, Document, Message
from sar_kd.data.words import FEWEST, find_words
from sar_kd.tokenization.token_stream import Block, Blocks
from sar_kd.tokenization.token_table import build_token_table
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

KINDS = ("byte", "sp", "dummy_prefix")
PAIRS = [(student, teacher) for student in KINDS for teacher in KINDS]
WORD = re.compile(r"[\w\u0300-\u036f\u0590-\u1fff]+(?:['\u2019]\w+)*")


@pytest.fixture(scope="module")
def pairs(byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer):
    tokenizers = dict(zip(KINDS, (byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer), strict=True))
    return {
        (s, t): TokenizerPair(
            tokenizers[s], tokenizers[t], student_vocab_size=len(tokenizers[s]), teacher_vocab_size=len(tokenizers[t])
        )
        for s, t in PAIRS
    }


@pytest.fixture(scope="module")
def documents(corpus_texts):
    return [Document(f"text {i}", text) for i, text in enumerate(corpus_texts * 2)]


def _dataset(documents, pair, show=pytest.fail):
    dataset = build_dataset(documents, pair, 24, 40)
    dataset.words = find_words(dataset.text, pair, show)
    return dataset


def _sums(dataset, which):
    """Each token's loss is its number in the stream plus 1, summed by group in float64 as an evaluation does."""
    sums = np.zeros(dataset.num_groups)
    for block in dataset.blocks:
        tokens = np.arange(getattr(block, f"{which}_start"), getattr(block, f"{which}_end"))
        tokens = tokens[np.asarray(getattr(dataset.text, which).is_target)[tokens]]
        for groups in dataset.groups_of_targets(which, [block]):
            np.add.at(sums, groups, tokens + 1.0)
    return sums


def _reference(dataset, pair):
    """Counts, and for each model the loss of each word, token by token: bytes are spelled from the tokens, and a cut is
    where a piece of text begins and both models begin a token.
    """
    tokens = {}
    for which in ("student", "teacher"):
        stream, tokenizer = getattr(dataset.text, which), getattr(pair, which)
        table, at, found = build_token_table(tokenizer, len(tokenizer)), 0, []
        for i, token in enumerate(stream.ids):
            piece = table.pieces[token][int(stream.has_dummy[i]) :]
            size = 1 if token == getattr(pair, f"{which}_end") and stream.is_target[i] else len(piece)
            found.append((at, at + size, i, piece if size == len(piece) else b"\xff"))
            at += size
        tokens[which] = found
    spelled = b"".join(piece for *_, piece in tokens["student"])
    ends = [{end for _, end, *_ in found} for found in tokens.values()]
    kinds = []
    for char in spelled.decode("utf-8", "surrogateescape"):
        kind = "space" if char.isspace() else "word" if WORD.fullmatch(char) else "other"
        kind = "end" if char == "\udcff" else "han" if "\u3040" <= char <= "\u9fff" else kind
        kinds += [(kind, i) for i in range(len(char.encode("utf-8", "surrogateescape")))]
    cuts = [0]
    for at in range(1, len(spelled) + 1):
        if at == len(spelled):
            is_start = True
        else:
            kind, inside = kinds[at]
            is_start = not inside and (kind != kinds[at - 1][0] or kind in ("han", "end"))
            text = spelled[max(0, at - 9) : at + 9]
            if is_start and (b"'" in text or "\u2019".encode() in text):  # may stand inside a word
                line = spelled.decode("utf-8", "surrogateescape")
                places = [len(line[: m.start()].encode("utf-8", "surrogateescape")) for m in WORD.finditer(line)]
                lasts = [len(line[: m.end()].encode("utf-8", "surrogateescape")) for m in WORD.finditer(line)]
                is_start = not any(a < at < b for a, b in zip(places, lasts, strict=True))
        if is_start and all(at in side for side in ends):
            cuts.append(at)
    counts, sums = Counter(), {which: defaultdict(float) for which in tokens}
    for first, last in itertools.pairwise(cuts):
        text = spelled[first:last].decode("utf-8", "surrogateescape")
        name = text.strip() or text.encode("unicode_escape").decode().replace(" ", "\u2423")
        name = name.replace("\udcff", "(end of text)")
        # A token without bytes, a space that the tokenizer put there, belongs to what follows.
        inside = {which: [i for a, _, i, _ in found if first <= a < last] for which, found in tokens.items()}
        if any(dataset.text.student.is_target[i] for i in inside["student"]):
            counts[name] += 1
            for which, numbers in inside.items():
                sums[which][name] += sum(i + 1.0 for i in numbers if getattr(dataset.text, which).is_target[i])
    return counts, sums


@pytest.mark.parametrize("names", PAIRS)
def test_every_token_is_in_one_word_that_both_tokenizers_cut_alike(pairs, documents, names):
    dataset = _dataset(documents, pairs[names])
    counts, sums = _reference(dataset, pairs[names])
    found = dataset.words
    kept = {name: count for name, count in counts.items() if count >= FEWEST}
    assert dict(zip(found.names, found.counts.tolist(), strict=True)) == kept
    assert len(kept) > 40
    assert {"the", "(end of text)"} <= kept.keys()
    num_documents = len(dataset.text.names)
    for which in ("student", "teacher"):
        values = _sums(dataset, which)
        wanted = [sums[which][name] for name in found.names]
        assert values[num_documents:-1].tolist() == wanted
        assert values[num_documents:].sum() == values[:num_documents].sum()


def test_a_token_that_holds_two_words_makes_them_one_for_both_models(pairs):
    pair = pairs["byte", "sp"]
    stream = _dataset([Document("a", "the cat, the dog. " * 4)], pair).words
    assert {"the", "cat", ",", "dog"} <= set(stream.names)
    text = build_dataset([Document("a", "the cat, the dog. " * 4)], pair, 200, 200).text
    joined = np.asarray(text.teacher.ends)
    cat = len("the cat")
    object.__setattr__(text.teacher, "ends", np.where(joined == cat, cat + 1, joined))  # its last letter and the comma
    names = find_words(text, pair, pytest.fail)
    assert names.counts[names.names.index("cat")] == 3  # and "cat," once, which is too rare


def test_questions_are_no_words_and_what_is_in_no_block_is_left_out(pairs):
    pair = pairs["byte", "sp"]
    talk = Conversation("t", (Message("user", "why why", False), Message("assistant", "so so", True)), False)
    dataset = build_dataset([Document("a", "once more " * 3), *[talk] * 3], pair, 200, 200)
    found = find_words(dataset.text, pair, pytest.fail)
    assert (found.counts[found.names.index("so")], "why" in found.names) == (6, False)
    (block,) = (b for b in dataset.blocks if b.student_start <= 1)
    ends = np.asarray(dataset.text.student.ends), np.asarray(dataset.text.teacher.ends)
    cut = len("once more ")  # at most up to here
    first, last = (int(np.searchsorted(side, cut, side="right")) for side in ends)
    object.__setattr__(dataset.text, "skipped_ranges", Blocks.of([Block(block.student_start, first, 0, last)]))
    assert "once" not in find_words(dataset.text, pair, pytest.fail).names


def test_of_a_large_text_the_beginning_is_read_and_the_most_frequent_words_are_kept(pairs, documents, monkeypatch):
    pair = pairs["byte", "sp"]
    whole = find_words(build_dataset(documents, pair, 24, 40).text, pair, pytest.fail)
    monkeypatch.setattr(words, "_MAX_BYTES", 1500)
    monkeypatch.setattr(words, "_MAX_WORDS", 5)
    dataset = _dataset(documents, pair)
    assert len(dataset.words.names) == 5
    assert 1400 < dataset.words.num_bytes <= 1500 < whole.num_bytes
    assert sorted(dataset.words.counts, reverse=True) == dataset.words.counts.tolist()
    for which in ("student", "teacher"):
        values, count = _sums(dataset, which), len(dataset.text.names)
        assert values[count:].sum() == values[:count].sum()
        (batch, *_) = dataset.token_batches(which, 1000)
        assert (batch.groups[1][-50:] == dataset.num_groups - 1).all()
        assert torch.bincount(batch.groups[1])[count : count + 5].min() > 0


def test_equal_tokenizers_without_known_bytes_have_no_words_and_a_line_says_so(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "[UNK]": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]")
    pair = TokenizerPair(tokenizer, tokenizer, student_vocab_size=4, teacher_vocab_size=4)
    lines = []
    assert _dataset([Document("a", "a b a b a b")], pair, lines.append).words is None
    assert len(lines) == 1
    assert "No losses by word: the tokenizer is a WordLevel tokenizer" in lines[0]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" word ", "word"),
        ("  \n", "\u2423\u2423\\n"),
        ("\u200b", "U+200B"),
        ("a\u202eb", "aU+202Eb"),
        ("\u200d", "U+200D"),
        ("\U0001f469\u200d\U0001f4bb", "\U0001f469\u200d\U0001f4bb"),
        ("\udcff", "(end of text)"),
    ],
)
def test_a_word_is_shown_with_all_its_characters(text, name):
    assert words._name(text) == name
