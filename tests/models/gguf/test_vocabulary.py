"""A tokenizer as llama.cpp needs it: SentencePiece scores, pre-tokenizer names, and its algorithm in Python."""

import json

import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer, pre_tokenizers

from sar_kd import embedded
from sar_kd.models.gguf.check import SAMPLE
from sar_kd.models.gguf.tokens import cut_by_scores
from sar_kd.models.gguf.vocabulary import PRE_TOKENIZERS, pre_tokenizer_name, puts_space_first, sentencepiece_model


def _definition(tokenizer) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _processor(definition: dict, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(definition, vocab_size))


def test_a_sentencepiece_model_of_the_merges_cuts_text_as_the_tokenizer_does(dummy_prefix_tokenizer, corpus_texts):
    definition = _definition(dummy_prefix_tokenizer)
    assert puts_space_first(definition)
    processor = _processor(definition, len(dummy_prefix_tokenizer) + 3)
    assert processor.vocab_size() == len(dummy_prefix_tokenizer) + 3
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    scores = [processor.get_score(i) for i in range(processor.vocab_size())]
    for text in [*corpus_texts, SAMPLE]:
        expected = dummy_prefix_tokenizer.encode(text, add_special_tokens=False)
        assert cut_by_scores(text, pieces, scores, [], puts_space=True) == expected
        assert processor.encode(text) == expected
    assert [processor.is_byte(i) for i in range(3, 259)] == [True] * 256
    assert processor.is_unused(len(dummy_prefix_tokenizer) + 1)


def test_a_pre_tokenizer_that_llama_cpp_has_not_shows_in_the_cut():
    """The embedded student's splits runs of spaces before the merges, which a SentencePiece vocabulary cannot."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.STUDENT_DIR)
    definition = _definition(tokenizer)
    assert not puts_space_first(definition)
    processor = _processor(definition, len(tokenizer))
    words, runs = "Return the largest item.", "x\n    def"
    assert processor.encode(words) == tokenizer.encode(words, add_special_tokens=False)
    assert processor.encode(runs) != tokenizer.encode(runs, add_special_tokens=False)


def test_added_tokens_are_found_before_the_merges_the_longest_first():
    tokens, scores = ["a", "b", "ab", "\u2581", "<x>", "<x>b"], [-9.0, -9.0, 0.0, -9.0, 0.0, 0.0]
    assert cut_by_scores("ab<x>b<x>a", tokens, scores, ["<x>", "<x>b"], puts_space=False) == [2, 5, 4, 0]
    assert cut_by_scores("ab", tokens, scores, [], puts_space=True) == [3, 2]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_pre_tokenizer_is_known_by_its_definition(name):
    """Read through the library and back, as a saved tokenizer is."""
    part, ignores_merges = PRE_TOKENIZERS[name]
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": [], "ignore_merges": ignores_merges}
    definition = {"version": "1.0", "added_tokens": [], "pre_tokenizer": part, "model": model}
    definition |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    saved = json.loads(Tokenizer.from_str(json.dumps(definition)).to_str())
    assert pre_tokenizer_name(saved) == name


def test_other_pre_tokenizers_have_no_name(byte_tokenizer, superword_tokenizer):
    definition = _definition(byte_tokenizer)
    assert pre_tokenizer_name(definition) == "gpt-2"
    assert pre_tokenizer_name(_definition(superword_tokenizer)) == ""
    definition["model"]["ignore_merges"] = True
    assert pre_tokenizer_name(definition) == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", ["ab", "\u0120123", "!\n", "'s"]),
        ("smollm", ["ab", "\u0120", "1", "2", "3", "!\n", "'s"]),
        ("llama-bpe", ["ab", "\u0120", "123", "!\u010a", "'s"]),
        ("qwen2", ["ab", "\u0120", "1", "2", "3", "!\u010a", "'s"]),
    ],
)
def test_the_pre_tokenizers_split_as_their_families_do(name, expected):
    tokenizer = Tokenizer.from_str(json.dumps({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": PRE_TOKENIZERS[name][0],
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder")),
    }))  # fmt: skip
    assert isinstance(tokenizer.pre_tokenizer, (pre_tokenizers.Sequence, pre_tokenizers.ByteLevel))
    found = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("ab 123!\n's")]
    if name in ("gpt-2", "smollm"):  # there the line end is a piece of its own
        expected = [part for each in expected for part in (["!", "\u010a"] if each == "!\n" else [each])]
    assert found == expected
