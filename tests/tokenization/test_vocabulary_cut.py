"""A tokenizer with fewer tokens: the same bytes, and the same tokens where all of them are kept."""

import json
from collections import Counter

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import UnigramTrainer, WordPieceTrainer

from sar_kd.errors import UsageError
from sar_kd.tokenization.token_table import PROBES, fuzz_texts
from sar_kd.tokenization.vocabulary_cut import CuttableVocabulary

KINDS = ("byte_tokenizer", "sp_tokenizer", "dummy_prefix_tokenizer", "superword_tokenizer", "unigram")
TEXTS = (*PROBES, *fuzz_texts()[:500])


@pytest.fixture(scope="session")
def unigram(corpus_texts):
    """SentencePiece's Unigram: scores, a token for each byte behind them, a start token, a token that was added."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="never")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = UnigramTrainer(vocab_size=600, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(corpus_texts, trainer)
    definition = json.loads(tokenizer.to_str())
    definition["model"]["byte_fallback"] = True
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens(["<think>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, clean_up_tokenization_spaces=False)


@pytest.fixture
def whole(request):
    return request.getfixturevalue(request.param)


def _usage(tokenizer, texts):
    counts = Counter(i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"])
    return np.array([counts[i] for i in range(len(tokenizer))])


def _cut(tokenizer, texts, more):
    """The tokenizer with so many tokens beyond those that stay in any case, and the ids of before."""
    vocabulary = CuttableVocabulary("it", tokenizer)
    required = vocabulary.required(set())
    kept = vocabulary.choose(_usage(tokenizer, texts), required, len(required) + more)
    small = vocabulary.keep(kept)
    vocabulary.check(kept, small)
    assert len(small) == len(kept) == len(required) + more < len(tokenizer)
    return small, kept


def _tokens(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("whole", KINDS, indirect=True)
def test_every_text_is_decoded_as_before(whole, corpus_texts):
    small, _ = _cut(whole, corpus_texts[:8], 40)
    for text in (*TEXTS, *corpus_texts):
        if "<0x" in text:  # which a Unigram model takes for its byte; half a character spoils the bytes beside it
            continue
        before, after = (each.decode(each(text, add_special_tokens=False)["input_ids"]) for each in (whole, small))
        assert after == before


@pytest.mark.parametrize("whole", KINDS, indirect=True)
def test_a_text_whose_tokens_are_all_kept_has_the_same_tokens(whole, corpus_texts):
    small, _ = _cut(whole, corpus_texts[:8], 80)
    kept, count = small.get_vocab().keys(), 0
    words = {word for text in corpus_texts for word in (*text.split(), *(f" {word}" for word in text.split()))}
    for text in (*TEXTS, *corpus_texts, *sorted(words)):
        tokens = _tokens(whole, text)
        if kept >= {*tokens}:
            assert _tokens(small, text) == tokens, text
            count += len(tokens) < len(text)
    assert count > 30  # whose tokens are not bytes and characters alone


@pytest.mark.parametrize("whole", KINDS[:4], indirect=True)
def test_every_kept_token_is_still_formed(whole, corpus_texts):
    """Of itself alone the model makes a token, where it did so before. The model without what stands before it."""
    small, _ = _cut(whole, corpus_texts[-12:], 60)
    before, after = (each.backend_tokenizer.model for each in (whole, small))
    formed = [string for string in small.get_vocab() if [token.value for token in before.tokenize(string)] == [string]]
    assert sum(len(string) > 1 for string in formed) > 50
    for string in formed:
        assert [token.value for token in after.tokenize(string)] == [string]


def test_merges_keep_their_order(sp_tokenizer, corpus_texts):
    small, _ = _cut(sp_tokenizer, corpus_texts[:8], 40)
    before, after = (json.loads(each.backend_tokenizer.to_str())["model"] for each in (sp_tokenizer, small))
    vocab = after["vocab"]
    assert after["merges"] == [[a, b] for a, b in before["merges"] if {a, b, a + b} <= vocab.keys()]
    assert 0 < len(after["merges"]) < len(before["merges"])


def test_scores_are_kept(unigram, corpus_texts):
    small, kept = _cut(unigram, corpus_texts[:8], 40)
    before, after = (json.loads(each.backend_tokenizer.to_str())["model"] for each in (unigram, small))
    size = len(after["vocab"])
    assert after["vocab"] == [before["vocab"][old] for old in kept[:size]]
    assert after["vocab"][after["unk_id"]][0] == "<unk>"


def test_special_and_added_tokens_stay_with_new_ids(unigram, corpus_texts):
    small, kept = _cut(unigram, corpus_texts[:8], 40)
    assert small.convert_ids_to_tokens(small("a<think>")["input_ids"])[-1] == "<think>"
    assert small.convert_tokens_to_ids("<think>") == len(kept) - 1 < len(unigram) - 1
    assert small("a")["input_ids"][0] == small.bos_token_id  # by the post-processor
    assert {"<unk>", "<s>", "</s>", "<0x00>", "<0xFF>", "\u2581"} <= small.get_vocab().keys()


@pytest.mark.parametrize("kind", ["template", "roberta"])
def test_tokens_that_the_definition_puts_around_a_text_stay(byte_tokenizer, corpus_texts, kind):
    """Also those that are not marked as special."""
    definition = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    own = Tokenizer.from_str(json.dumps(definition))
    first, last = (own.id_to_token(own.get_vocab_size() - place) for place in (2, 1))
    ids = own.token_to_id(first), own.token_to_id(last)
    own.post_processor = (
        processors.TemplateProcessing(
            f"{first}:0 $A:0 {last}:0", special_tokens=list(zip((first, last), ids, strict=True))
        )
        if kind == "template"
        else processors.RobertaProcessing((last, ids[1]), (first, ids[0]), add_prefix_space=False)
    )
    end = "<|endoftext|>"
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=own, bos_token=end, eos_token=end)
    small, _ = _cut(whole, corpus_texts[:8], 40)
    tokens = small.convert_ids_to_tokens(small("a")["input_ids"])
    assert (tokens[0], tokens[-1]) == (first, last)
    assert small.convert_tokens_to_ids(last) < ids[1]
    assert _tokens(small, last) == _tokens(whole, last)


def test_the_tokens_that_the_text_uses_most_are_kept_then_their_other_forms_then_the_first_ones(byte_tokenizer):
    vocabulary = CuttableVocabulary("it", byte_tokenizer)
    required, usage = vocabulary.required(set()), np.zeros(len(byte_tokenizer), np.int64)
    assert len(required) == 257  # bytes and the end of a text
    ids, size = byte_tokenizer.get_vocab(), len(byte_tokenizer)
    parents = {a + b: {a, b} for a, b in json.loads(byte_tokenizer.backend_tokenizer.to_str())["model"]["merges"]}

    def closed(*strings):
        found, queue = set(), [*strings]
        while queue:
            found.add(queue[-1])
            queue.extend(parents.get(queue.pop(), ()))
        return {ids[string] for string in found} - required

    words = Counter(string.strip("\u0120").lower() for string in ids)
    less = next(string for string in ids if string.isalpha() and f"\u0120{string}" in ids and words[string] == 2)
    most, other = next(string for string in ids if string[0] == "\u0120" and words[string[1:]] == 1), f"\u0120{less}"
    usage[ids[most]], usage[ids[less]] = 9, 5
    one, both, forms = closed(most), closed(most, less), closed(most, less, other)
    assert one < both < forms

    def choose(count):
        return {*vocabulary.choose(usage, required, 257 + count)} - required

    assert choose(len(one)) == one
    assert choose(len(both)) == both
    assert choose(len(forms)) == forms
    rest = [index for index in range(size) if index not in required | forms]
    assert choose(len(forms) + 3) - forms == {
        *rest[:3]
    }  # whose parents are among them, as merges build on earlier ones
    with pytest.raises(UsageError, match=r"--vocab_size 256: 257 tokens stay in any case \(bytes, special and added"):
        vocabulary.choose(usage, required, 256)


def test_every_character_stays_where_bytes_have_no_tokens(corpus_texts):
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace("\u2581", prepend_scheme="never")
    trainer = UnigramTrainer(vocab_size=600, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(corpus_texts, trainer)
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    small, _ = _cut(whole, corpus_texts[:8], 20)
    assert {string for string in whole.get_vocab() if len(string) == 1} <= small.get_vocab().keys()


def test_other_kinds_are_named(corpus_texts):
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.train_from_iterator(corpus_texts, WordPieceTrainer(vocab_size=300, show_progress=False))
    marked = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    for tokenizer, message in (
        (words, "it: its tokenizer is a WordPiece tokenizer; only BPE and Unigram can be cut; leave out --vocab_size"),
        (marked, "it: its tokenizer is a BPE that marks the parts of a word"),
    ):
        with pytest.raises(UsageError, match=message):
            CuttableVocabulary("it", transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    with pytest.raises(UsageError, match=r"it: its tokenizer is a ByT5Tokenizer without a tokenizer\.json"):
        CuttableVocabulary("it", transformers.ByT5Tokenizer())


def test_a_tokenizer_that_is_another_one_once_loaded_is_named(byte_tokenizer, sp_tokenizer, corpus_texts):
    small, kept = _cut(byte_tokenizer, corpus_texts[:8], 40)
    vocabulary = CuttableVocabulary("it", byte_tokenizer)
    with pytest.raises(UsageError, match=r"it: its tokenizer has other tokens than were kept .* \(1 differ\)"):
        vocabulary.check(kept[:-1], small)
    definition = json.loads(small.backend_tokenizer.to_str())
    definition["normalizer"] = {"type": "Lowercase"}
    lower = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(definition)))
    with pytest.raises(UsageError, match="it: its tokenizer cannot spell 'Hello world' any more with fewer tokens"):
        vocabulary.check(kept, lower)


def test_a_token_that_the_config_names_stays_with_those_that_it_is_formed_from(byte_tokenizer):
    """It is formed by merges, and stands in a text as before."""
    vocabulary = CuttableVocabulary("it", byte_tokenizer)
    merges = json.loads(byte_tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    named = byte_tokenizer.convert_tokens_to_ids(max(map("".join, merges), key=len))
    text = byte_tokenizer.decode([named])
    required = vocabulary.required({named})
    small = vocabulary.keep(vocabulary.choose(np.zeros(len(byte_tokenizer), np.int64), required, len(required)))
    assert len(byte_tokenizer.tokenize(text)) == 1
    assert small.tokenize(text) == byte_tokenizer.tokenize(text)


def test_an_id_without_a_string_and_a_token_without_letters_stay(byte_tokenizer):
    definition = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    ids = [*definition["model"]["vocab"].values(), *(token["id"] for token in definition["added_tokens"])]
    empty, unknown = max(ids) + 1, max(ids) + 5
    definition["model"]["vocab"][""] = empty
    tokenizer, end = Tokenizer.from_str(json.dumps(definition)), "<|endoftext|>"
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)
    assert {empty, unknown} <= CuttableVocabulary("it", own).required({empty, unknown})
