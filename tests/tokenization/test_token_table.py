"""Bytes of every kind of tokenizer that transformers loads, against what the tokenizer was made from."""

import gc
import io
import json
import pickle
import re
import unicodedata
import weakref

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers.convert_slow_tokenizer import bytes_to_unicode, import_protobuf

from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.token_table import (
    CONTENT,
    END,
    PADDED,
    PROBES,
    SPECIAL,
    UNKNOWN,
    TokenTable,
    build_token_table,
    check_vocab_size,
    fingerprint,
    fuzz_texts,
    same_tokenizer,
    start_and_end,
)

SPACE = "\u2581"
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
LOOK_ALIKES = "a </s><s> b <unk> <|endoftext|><|im_end|> [INST]<0x41>"
WORDS = ("the", " ", "  ", "12345", "\r\n", "</s>", "<think>", "na\u00efve", "e\u0301")
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet=" \n\r\tabcdeht.,123é\u0301\u0308日😀\u2581\u0120\u200d\x00\u00a0<s>|", max_size=40),
    st.lists(
        st.sampled_from(["the", " ", "  ", "12345", "\r\n", "</s>", "<think>", "naïve", "e\u0301"]), max_size=20
    ).map("".join),
)


# Tokenizers of every kind


def _wrapped(tokenizer: Tokenizer, **special):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )


def _llama3(texts, normalizer=None):
    """Byte-level BPE with `ignore_merges`, digits in threes, a non-special added token and two ends of text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>"])
    tokenizer.add_tokens(["<think>"])
    return _wrapped(tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def _model_of(tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _unigram(byte_fallback=True, normalizer=None):
    """T5's kind: Unigram pieces after Metaspace, with one token per byte for text that the pieces lack."""
    words = [SPACE, "the", SPACE + "the", "e", "t", "h", "s", "a", SPACE + "a", "\u65e5", "H", "l", "o", "w", "r", "d"]
    strings = ["<unk>", "</s>", "<pad>", *BYTE_TOKENS, *words]
    scores = [0.0] * 3 + [-12.0] * 256 + [-float(i) - 1 for i in range(len(words))]
    vocab = list(zip(strings, scores, strict=True))
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(SPACE)])
    if normalizer:
        tokenizer.normalizer = normalizer
    return _wrapped(tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


class _SlowBytePieces(transformers.PreTrainedTokenizer):
    """GPT-2's kind written in Python: one token per byte, spelled in the byte-level alphabet."""

    def __init__(self):
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {c: byte for byte, c in self.byte_encoder.items()}
        self._ids = {c: 255 - byte for c, byte in self.byte_decoder.items()}
        super().__init__(eos_token="<|endoftext|>")

    @property
    def vocab_size(self):
        return 256

    def get_vocab(self):
        return self._ids | self.added_tokens_encoder

    def _tokenize(self, text):
        return [self.byte_encoder[byte] for byte in text.encode()]

    def _convert_token_to_id(self, token):
        return self._ids[token]

    def _convert_id_to_token(self, index):
        return self.byte_encoder[255 - index]


TIKTOKEN_WORDS = [b"th", b"the", b" the", b"\xe6\x97", b"12", b"\xf0\x9f"]
TIKTOKEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def _tiktoken_ranks() -> dict[bytes, int]:
    return {bytes([255 - i]): i for i in range(256)} | {word: 256 + i for i, word in enumerate(TIKTOKEN_WORDS)}


def _qwen1(shift: int = 0, composes: bool = True):
    """The first Qwen's kind: a slow tokenizer around a tiktoken encoding, whose vocabulary is spelled in bytes."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = _tiktoken_ranks()
    special = {name: 300 + i for i, name in enumerate(TIKTOKEN_SPECIAL)}  # a gap before them

    class QwenLike(transformers.PreTrainedTokenizer):
        def __init__(self):
            self.tokenizer = tiktoken.Encoding(
                "tiny",
                pat_str=r"\p{N}{1,2}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+",
                mergeable_ranks=ranks,
                special_tokens=special,
            )
            super().__init__()

        def __len__(self):
            return self.tokenizer.n_vocab

        @property
        def vocab_size(self):
            return self.tokenizer.n_vocab

        def get_vocab(self):
            return dict(ranks)

        def tokenize(self, text, **kwargs):
            text = unicodedata.normalize("NFC", text) if composes else text
            ids = self.tokenizer.encode(text, allowed_special="all", disallowed_special=())
            return [self.tokenizer.decode_single_token_bytes(i) for i in ids]

        def convert_tokens_to_ids(self, tokens):
            if isinstance(tokens, (bytes, str)):
                return self.tokenizer.encode_single_token(tokens) + shift
            return [self.convert_tokens_to_ids(token) for token in tokens]

    return QwenLike()


def _sentencepiece_file(directory, texts, **options):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    settings_ = {
        "model_type": "bpe",
        "vocab_size": 700,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **(settings_ | options))
    path = directory / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def _slow_sentencepiece(path, **options):
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.SentencePieceBackend(vocab_file=str(path), **special, **options)


KINDS = (
    "gpt2",
    "llama 3",
    "qwen 2",
    "llama 2 legacy",
    "llama 2",
    "gemma",
    "unigram",
    "byt5",
    "slow byte-level",
    "qwen 1",
    "sentencepiece legacy",
    "sentencepiece",
)
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def make(corpus_texts, byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer, tmp_path_factory):
    """make(kind): the tokenizer of that kind, the same object each time."""
    byte_vocab, byte_merges = _model_of(byte_tokenizer)
    sp_vocab, sp_merges = _model_of(sp_tokenizer)
    gemma_vocab = {{"<s>": "<bos>", "</s>": "<eos>"}.get(string, string): i for string, i in sp_vocab.items()}
    makers = {
        "gpt2": lambda: transformers.GPT2Tokenizer(vocab=byte_vocab, merges=byte_merges),
        "llama 3": lambda: _llama3(corpus_texts),
        "qwen 2": lambda: transformers.Qwen2Tokenizer(vocab=byte_vocab, merges=byte_merges),
        "llama 2 legacy": lambda: dummy_prefix_tokenizer,
        "llama 2": lambda: transformers.LlamaTokenizer(vocab=sp_vocab, merges=sp_merges),
        "gemma": lambda: transformers.GemmaTokenizer(vocab=gemma_vocab, merges=sp_merges),
        "unigram": _unigram,
        "byt5": transformers.ByT5Tokenizer,
        "slow byte-level": _SlowBytePieces,
        "qwen 1": _qwen1,
        "sentencepiece legacy": lambda: _slow_sentencepiece(
            _sentencepiece_file(tmp_path_factory.mktemp("sp"), corpus_texts), legacy=True
        ),
        "sentencepiece": lambda: _slow_sentencepiece(
            _sentencepiece_file(tmp_path_factory.mktemp("sp"), corpus_texts, add_dummy_prefix=False), legacy=False
        ),
    }
    made = {}

    def of(kind: str):
        if kind not in made:
            made[kind] = makers[kind]()
        return made[kind]

    return of


def _table(tokenizer) -> TokenTable:
    return build_token_table(tokenizer, len(tokenizer))


def _read(table: TokenTable, ids: list[int]) -> bytes:
    return b"".join(table.pieces[i] for i in ids)


# Bytes


@EVERY_KIND
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_the_pieces_of_any_canonical_text_are_its_bytes(make, kind, text):
    table = _table(make(kind))
    text = table.canonical(text)
    (ids,) = encode(make(kind), [text])
    assert _read(table, ids) in ({text.encode(), b" " + text.encode()} if table.dummy_prefix else {text.encode()})


@EVERY_KIND
@settings(max_examples=50, deadline=None)
@given(text=TEXTS)
def test_canonical_text_is_canonical(make, kind, text):
    table = _table(make(kind))
    once = table.canonical(text)
    assert table.canonical(once) == once


@EVERY_KIND
def test_plain_text_is_cut_as_the_tokenizer_itself_cuts_it(make, kind):
    tokenizer = make(kind)
    texts = ["Hello world", " the  teacher's 12345 words\n", "na\u00efve caf\u00e9 \u65e5\u672c"]
    own = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert encode(tokenizer, texts) == own


@EVERY_KIND
def test_many_texts_are_encoded_as_each_alone(make, kind):
    texts = list(PROBES)
    assert encode(make(kind), texts) == [encode(make(kind), [text])[0] for text in texts]


@EVERY_KIND
def test_text_that_looks_like_a_special_token_stays_text(make, kind):
    tokenizer, table = make(kind), _table(make(kind))
    (ids,) = encode(tokenizer, [LOOK_ALIKES])
    assert set(table.kinds[ids]) == {CONTENT}
    assert _read(table, ids).decode().strip() == LOOK_ALIKES


@EVERY_KIND
def test_every_byte_has_a_token_of_its_own(make, kind):
    assert {piece for piece in _table(make(kind)).pieces if len(piece) == 1} >= {bytes([b]) for b in range(0x80, 256)}


@pytest.mark.parametrize(
    ("kind", "string", "piece"),
    [
        ("gpt2", "\u0120the", b" the"),
        ("gpt2", "\u00c3", b"\xc3"),
        ("gpt2", "\u010a", b"\n"),
        ("llama 3", "<think>", b"<think>"),
        ("llama 2", SPACE + "the", b" the"),
        ("llama 2", "<0xE6>", b"\xe6"),
        ("gemma", SPACE, b" "),
        ("unigram", "\u65e5", "\u65e5".encode()),
        ("byt5", "A", b"A"),
        ("byt5", "\u00e6", b"\xe6"),
        ("slow byte-level", "\u0120", b" "),
        ("qwen 1", "\\xe6\\x97", b"\xe6\x97"),
        ("sentencepiece", SPACE + "the", b" the"),
        ("sentencepiece", "<0xE6>", b"\xe6"),
    ],
)
def test_a_spelling_stands_for_its_bytes(make, kind, string, piece):
    table = _table(make(kind))
    assert table.pieces[table.strings.index(string)] == piece


def test_byt5_bytes_start_at_id_3():
    assert _table(transformers.ByT5Tokenizer()).pieces[3:259] == [bytes([byte]) for byte in range(256)]


def test_tiktoken_bytes_are_its_ranks_and_gaps_are_rows_without_a_token(make):
    table = _table(make("qwen 1"))
    ranks = _tiktoken_ranks()
    assert table.pieces[: len(ranks)] == sorted(ranks, key=ranks.get)
    assert set(table.kinds[len(ranks) : 300]) == {PADDED}
    assert table.strings[300:] == list(TIKTOKEN_SPECIAL)


@pytest.mark.parametrize(
    ("kind", "dummy_prefix", "nfc", "metaspace"),
    [
        ("gpt2", False, False, False),
        ("llama 3", False, False, False),
        ("qwen 2", False, True, False),
        ("llama 2 legacy", True, False, True),
        ("llama 2", True, False, True),
        ("gemma", False, False, True),
        ("unigram", True, False, True),
        ("byt5", False, False, False),
        ("qwen 1", False, True, False),
        ("sentencepiece legacy", True, False, True),
        ("sentencepiece", False, False, True),
    ],
)
def test_what_a_tokenizer_does_to_text_is_recognised(make, kind, dummy_prefix, nfc, metaspace):
    table = _table(make(kind))
    assert (table.dummy_prefix, table.nfc, table.metaspace) == (dummy_prefix, nfc, metaspace)
    assert table.canonical("e\u0301" + SPACE) == ("\u00e9" if nfc else "e\u0301") + (" " if metaspace else SPACE)


def test_a_tiktoken_tokenizer_that_does_not_compose_reads_text_as_it_is():
    assert _table(_qwen1(composes=False)).canonical("e\u0301") == "e\u0301"


def test_an_ordinary_piece_and_a_byte_token_may_share_their_bytes(make):
    table = _table(make("llama 2"))
    assert table.pieces[table.strings.index("a")] == table.pieces[table.strings.index("<0x61>")] == b"a"


EVERY_TWIN = ("llama 2", "gemma", "unigram", "sentencepiece", "gpt2", "byt5", "llama 3")


@pytest.mark.parametrize("kind", EVERY_TWIN)
def test_of_tokens_that_share_their_bytes_all_but_the_written_one_are_known(make, kind, corpus_texts):
    table, twins = _table(make(kind)), {}
    for index, piece in enumerate(table.pieces):
        if piece:
            twins.setdefault(piece, []).append(index)
    written = {
        i for ids in encode(make(kind), [table.canonical(text) for text in (*corpus_texts, *PROBES)]) for i in ids
    }
    groups = [ids for ids in twins.values() if len(ids) > 1]
    assert bool(groups) == (kind not in ("gpt2", "byt5", "llama 3"))
    for ids in groups:
        assert len(set(ids) - table.unwritten) == 1
        assert all(table.strings[i] in BYTE_TOKENS for i in table.unwritten.intersection(ids))
    assert not table.unwritten & written
    assert table.unwritten <= {i for ids in groups for i in ids}


def test_a_token_that_only_the_tokenizer_itself_shows_is_the_written_one(sp_tokenizer):
    """An added token is found before the vocabulary's own, however it is spelled and whatever its id."""
    tokenizer = Tokenizer.from_str(sp_tokenizer.backend_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken(" the", normalized=False)])
    table = _table(_wrapped(tokenizer, eos_token="</s>", unk_token="<unk>"))
    own, added = table.strings.index(SPACE + "the"), table.strings.index(" the")
    assert table.pieces[own] == table.pieces[added] == b" the"
    assert (own in table.unwritten, added in table.unwritten) == (True, False)


def test_a_table_as_written_has_no_bytes_for_what_is_never_written(make):
    table = _table(make("llama 2"))
    letter, byte = table.strings.index("a"), table.strings.index("<0x61>")
    as_written = table.as_written(table.end_ids)
    assert (as_written.pieces[letter], as_written.pieces[byte]) == (b"a", b"")
    assert table.as_written(table.end_ids, written=[byte]).pieces[byte] == b"a"
    table = _table(make("llama 3"))
    other = next(i for i in table.end_ids if i != table.end_id)
    assert (table.as_written([other]).end_id, table.as_written([other]).end_ids) == (other, (other,))
    assert table.as_written(table.end_ids).end_id == table.end_id


def test_a_tokenizer_without_a_dictionary_of_added_tokens_is_checked():
    class Wrapper:  # as transformers wraps mistral-common's
        all_special_tokens, bos_token_id, eos_token_id = ["<s>", "</s>"], 0, 1

        def __init__(self):
            self.special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>"}

        def added_tokens_decoder(self):
            raise NotImplementedError

        def get_vocab(self):
            return {"<s>": 0, "</s>": 1, "a": 2, "b": 3}

    check_vocab_size(Wrapper(), 4)
    with pytest.raises(ValueError, match="can turn text into 'b' "):
        check_vocab_size(Wrapper(), 3)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GemmaTokenizer", "TokenizersBackend"])
def test_a_user_defined_sentencepiece_piece_is_text_although_it_is_listed_as_special(name, corpus_texts, tmp_path):
    own = [",", "(", "\n\n", "<tag>"]
    _sentencepiece_file(tmp_path, corpus_texts, user_defined_symbols=own, control_symbols=["<turn>"])
    config = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")):
        table, text = _table(each), "f(a, b) <tag>\n\nx <turn> </s>,"
        (ids,) = encode(each, [text])
        assert table.dummy_bytes(ids, text) is not None, table.describe_change(ids, text)
        assert [piece for piece in each.convert_ids_to_tokens(ids) if piece in own] == ["(", ",", "<tag>", "\n\n", ","]
        assert {table.kinds[each.convert_tokens_to_ids(piece)] for piece in own} == {CONTENT}
        assert table.pieces[each.convert_tokens_to_ids("<turn>")] == b""
    with pytest.raises(ValueError, match="can turn text into"):
        check_vocab_size(tokenizer, tokenizer.convert_tokens_to_ids("<tag>"))


def test_an_added_run_of_spaces_is_spaces(sp_tokenizer):
    tokenizer = Tokenizer.from_str(sp_tokenizer.backend_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken(SPACE * 2, normalized=False), AddedToken("\n\n", normalized=False)])
    table = _table(_wrapped(tokenizer, eos_token="</s>", unk_token="<unk>"))
    assert [table.pieces[table.strings.index(string)] for string in (SPACE * 2, "\n\n")] == [b"  ", b"\n\n"]


def test_a_stop_token_that_its_definition_forgot_to_mark_stays_text(sp_tokenizer):
    tokenizer = Tokenizer.from_str(sp_tokenizer.backend_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, normalized=False)])  # as Phi-3's "</s>"
    tokenizer = _wrapped(tokenizer, eos_token="</s>", unk_token="<unk>")
    table = _table(tokenizer)
    (ids,) = encode(tokenizer, ["a<|end|>  b"])
    assert _read(table, ids) == b"a<|end|>  b"
    assert tokenizer.convert_tokens_to_ids("<|end|>") in table.end_ids


@pytest.mark.parametrize("kind", ["gpt2", "llama 2 legacy", "gemma", "unigram"])
def test_a_tokenizer_stays_as_it_is_given(make, kind, tmp_path):
    rust = Tokenizer.from_str(make(kind).backend_tokenizer.to_str())
    rust.add_tokens([AddedToken("<|end|>", rstrip=True, normalized=False)])  # not marked as special
    rust.enable_truncation(4)
    rust.enable_padding(length=4)
    names = make(kind).special_tokens_map
    tokenizer = _wrapped(rust, **{name: names[name] for name in ("eos_token", "unk_token") if name in names})
    tokenizer.save_pretrained(tmp_path / "before")
    _table(tokenizer), encode(tokenizer, ["some <|end|> text"]), fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path / "after")
    given, found = ({f.name: f.read_text() for f in (tmp_path / at).iterdir()} for at in ("before", "after"))
    assert found == given
    assert not tokenizer.added_tokens_decoder[tokenizer.convert_tokens_to_ids("<|end|>")].special


def test_truncation_and_padding_in_a_definition_do_not_touch_the_ids(byte_tokenizer):
    tokenizer = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    texts = ["a", "one two three four five six seven"]
    assert encode(_wrapped(tokenizer, eos_token="<|endoftext|>"), texts) == encode(byte_tokenizer, texts)


def test_the_fuzz_set_is_always_the_same_and_holds_what_breaks_tokenizers():
    texts = fuzz_texts()
    assert len(texts) == 2000
    assert texts is fuzz_texts()
    joined = "".join(texts)
    assert all(piece in joined for piece in (SPACE, "\u0120", "\x00", "\r\n", "\u00a0", "\u200d", "\u0301", "   "))
    assert not re.search("[\ud800-\udfff]", joined)
    assert re.search("[\u0590-\u05ff]", joined)
    assert re.search("[\ue000-\uf8ff]", joined)


# Kinds of ids


@EVERY_KIND
def test_rows_of_the_head_without_a_token_are_padded(make, kind):
    tokenizer = make(kind)
    table = build_token_table(tokenizer, len(tokenizer) + 7)
    rows = len(table.pieces)
    assert rows == len(table.strings) == len(table.kinds) == len(tokenizer) + 7
    assert table.kinds.dtype == np.uint8
    assert table.kinds[-7:].tolist() == [PADDED] * 7
    assert table.pieces[-7:] == [b""] * 7
    assert table.strings[-7:] == [""] * 7


@EVERY_KIND
def test_exactly_the_tokens_of_text_have_bytes(make, kind):
    table = _table(make(kind))
    assert [bool(piece) for piece in table.pieces] == (table.kinds == CONTENT).tolist()


def test_ids_have_their_kinds(make):
    tokenizer = make("llama 2")
    table = build_token_table(tokenizer, len(tokenizer) + 1)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("a", "<s>", "</s>", "<unk>")]
    assert table.kinds[[*ids, -1]].tolist() == [CONTENT, SPECIAL, END, UNKNOWN, PADDED]


@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("gpt2", ["<|endoftext|>"]),
        ("llama 3", ["<|end_of_text|>", "<|eot_id|>"]),
        ("llama 2", ["</s>"]),
        ("gemma", ["<eos>"]),
        ("byt5", ["</s>"]),
        ("qwen 1", ["<|endoftext|>", "<|im_end|>"]),
        ("sentencepiece", ["</s>"]),
    ],
)
def test_the_ends_are_the_end_token_and_the_known_stop_tokens(make, kind, ends):
    table = _table(make(kind))
    assert [table.strings[i] for i in table.end_ids] == ends
    assert table.end_id in table.end_ids
    assert (table.kinds == END).nonzero()[0].tolist() == list(table.end_ids)


def test_a_stop_token_in_plain_text_vocabulary_ends_nothing(byte_tokenizer):
    tokenizer = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    vocab, merges = _model_of(byte_tokenizer)
    tokenizer.model = models.BPE({**vocab, "</s>": len(vocab)}, merges)
    table = _table(_wrapped(tokenizer, eos_token="<|endoftext|>"))
    assert table.pieces[len(vocab)] == b"</s>"
    assert len(vocab) not in table.end_ids


def test_further_ends_can_be_named_and_rows_without_a_token_are_none(make):
    tokenizer = make("llama 3")
    header = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    table = build_token_table(tokenizer, len(tokenizer) + 2, stop_ids=(header, len(tokenizer) + 1))
    assert set(table.end_ids) == {*_table(tokenizer).end_ids, header}
    assert table.kinds[header] == END


def test_a_tiktoken_tokenizer_without_named_ends_uses_its_end_of_text(make):
    assert start_and_end(make("qwen 1")) == (300, 300)


@EVERY_KIND
def test_the_start_is_the_tokenizers_own_or_the_end(make, kind):
    tokenizer = make(kind)
    start, end = start_and_end(tokenizer)
    assert start == (end if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    assert end == (300 if tokenizer.eos_token_id is None else tokenizer.eos_token_id)


# Ids above the model's


def _with_tokens(tokenizer, special=(), ordinary=(), **names):
    rust = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rust.add_special_tokens(list(special))
    rust.add_tokens(list(ordinary))
    own = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    return _wrapped(rust, **(own | names))


def test_special_tokens_above_the_models_vocabulary_are_left_out_of_the_table(sp_tokenizer):
    size = len(sp_tokenizer)
    tokenizer = _with_tokens(sp_tokenizer, ["<pad>", "<image>", "<|im_end|>"], pad_token="<pad>")
    table, own = build_token_table(tokenizer, size, stop_ids=(size + 2,)), _table(sp_tokenizer)
    assert len(tokenizer) == size + 3
    assert (table.pieces, table.strings, table.end_ids) == (own.pieces, own.strings, own.end_ids)
    assert table.kinds.tolist() == own.kinds.tolist()
    assert len(build_token_table(tokenizer, size + 3).pieces) == size + 3
    assert encode(tokenizer, ["a <image><pad>"]) == encode(sp_tokenizer, ["a <image><pad>"])


@pytest.mark.parametrize(
    "added", [{"ordinary": ["<think>", "</think>"]}, {"special": ["<a>"], "ordinary": ["<think>"]}]
)
def test_text_that_becomes_an_id_above_the_models_vocabulary_is_refused_with_the_token(sp_tokenizer, added):
    size, tokenizer = len(sp_tokenizer), _with_tokens(sp_tokenizer, **added)
    first = tokenizer.convert_tokens_to_ids("<think>")
    with pytest.raises(ValueError, match=rf"can turn text into '<think>' \(id {first}.*vocab_size is {size}\)"):
        build_token_table(tokenizer, size)
    build_token_table(tokenizer, len(tokenizer))


@pytest.mark.parametrize("name", ["start", "end"])
def test_a_start_or_an_end_above_the_models_vocabulary_is_refused(sp_tokenizer, name):
    tokenizer = _with_tokens(sp_tokenizer, ["<new>"], **{"bos_token" if name == "start" else "eos_token": "<new>"})
    with pytest.raises(ValueError, match=f"has id {len(sp_tokenizer)} as the {name} of a text"):
        check_vocab_size(tokenizer, len(sp_tokenizer))


# Comparing, keeping


@EVERY_KIND
def test_a_tokenizer_is_the_same_as_itself_only(make, kind):
    assert same_tokenizer(make(kind), make(kind))
    assert not same_tokenizer(make(kind), make("byt5" if kind != "byt5" else "gpt2"))


@EVERY_KIND
def test_a_table_survives_pickling(make, kind):
    table = _table(make(kind))
    copy = pickle.loads(pickle.dumps(table))
    assert copy == table
    assert copy.kinds.tolist() == table.kinds.tolist()
    assert copy.canonical("a" + SPACE) == table.canonical("a" + SPACE)


def test_a_table_is_built_once_for_each_head(make):
    tokenizer = make("gpt2")
    assert build_token_table(tokenizer, 700) is build_token_table(tokenizer, 700)
    assert build_token_table(tokenizer, 701) is not build_token_table(tokenizer, 700)


def test_a_token_added_later_is_in_the_table(corpus_texts):
    tokenizer = _llama3(corpus_texts)
    before = build_token_table(tokenizer, 700)
    tokenizer.add_tokens(["<more>"])
    after = build_token_table(tokenizer, 700)
    assert (b"<more>" in before.pieces, b"<more>" in after.pieces) == (False, True)


def test_cached_tables_do_not_keep_their_tokenizer_alive():
    tokenizer = _unigram()
    _table(tokenizer)
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


# Tokenizers that change text


def test_a_tokenizer_that_keeps_text_has_no_example(byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer):
    assert {_table(each).change for each in (byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer)} == {""}


def test_unknown_characters_are_a_change_with_an_example():
    assert _table(_unigram(byte_fallback=False)).change == "' leading' becomes ' lead'"


@pytest.mark.parametrize(
    "normalizer", [normalizers.NFKC(), normalizers.Sequence([normalizers.NFC(), normalizers.NFKC()])]
)
def test_a_normalizer_that_changes_text_is_found_with_an_example(corpus_texts, normalizer):
    for tokenizer in (_unigram(normalizer=normalizer), _llama3(corpus_texts, normalizer)):
        assert re.match(r"'\ufb01ligature .* becomes '.*fi", _table(tokenizer).change)


def test_a_change_that_only_the_random_texts_show_is_found_with_its_place(corpus_texts):
    tokenizer = _llama3(corpus_texts, normalizers.Replace("\U0001f3fd", ""))
    assert not any("\U0001f3fd" in probe for probe in PROBES)
    change = _table(tokenizer).change
    assert re.search(r"\U0001f3fd.* becomes ", change)
    assert len(change) < 220


def test_t5_with_its_split_at_white_space_changes_text():
    tokenizer = _unigram()
    rust = tokenizer.backend_tokenizer
    rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), rust.pre_tokenizer])
    assert _table(tokenizer).change == "'Hello  world ' becomes 'Hello world'"


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_a_sentencepiece_model_that_changes_text_is_found(tmp_path, corpus_texts, add_dummy_prefix):
    path = _sentencepiece_file(
        tmp_path, corpus_texts, normalization_rule_name="nmt_nfkc", add_dummy_prefix=add_dummy_prefix
    )
    assert " becomes " in _table(_slow_sentencepiece(path, legacy=True)).change


def test_a_sentencepiece_model_that_collapses_spaces_is_found(tmp_path, corpus_texts):
    path = _sentencepiece_file(tmp_path, corpus_texts, remove_extra_whitespaces=True)
    assert _table(_slow_sentencepiece(path, legacy=True)).change == "'Hello  world ' becomes 'Hello world'"


def test_a_sentencepiece_model_with_unknown_characters_is_found(tmp_path, corpus_texts):
    path = _sentencepiece_file(tmp_path, corpus_texts, byte_fallback=False)
    assert " becomes " in _table(_slow_sentencepiece(path, legacy=True)).change


def test_a_precompiled_normalizer_that_changes_text_is_found(tmp_path, corpus_texts):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    path = _sentencepiece_file(tmp_path, corpus_texts, normalization_rule_name="nmt_nfkc")
    proto = import_protobuf().ModelProto.FromString(
        sentencepiece.SentencePieceProcessor(model_file=str(path)).serialized_model_proto()
    )
    tokenizer = _unigram(normalizer=normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    assert " becomes " in _table(tokenizer).change


# Refusals


def test_ids_that_are_not_those_of_the_encoding_inside_are_refused():
    with pytest.raises(ValueError, match="does not encode text as the encoding inside it does"):
        _table(_qwen1(shift=1, composes=False))


class _Characters(transformers.PreTrainedTokenizer):
    """A slow tokenizer of its own making, whose ids have no known bytes."""

    def __init__(self):
        super().__init__(eos_token="</s>")

    @property
    def vocab_size(self):
        return 128

    def get_vocab(self):
        return {chr(i): i for i in range(128)} | self.added_tokens_encoder

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) % 128

    def _convert_id_to_token(self, index):
        return chr(index)


def test_a_slow_tokenizer_of_unknown_making_is_refused_by_name():
    with pytest.raises(ValueError, match="is a _Characters without a definition that its bytes can be read from"):
        _table(_Characters())


def test_a_slow_tokenizer_without_an_end_is_refused(make):
    tokenizer = transformers.ByT5Tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        _table(tokenizer)
