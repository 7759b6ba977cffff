"""Boundaries and chunks of two tokenizations, against a walk byte by byte; and pairs of tokenizers."""

import json
import time

import numpy as np
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from sar_kd.alignment.byte_alignment import find_boundaries, find_chunks
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.token_table import build_token_table, same_tokenizer, start_and_end
from sar_kd.tokenization.tokenizer_pair import TokenizerPair, UnfitTokenizer

KINDS = ("byte", "sp", "dummy_prefix")
PAIRS = [(student, teacher) for student in KINDS for teacher in KINDS if student != teacher]
FUZZ_PIECES = (
    "the", "token", "Teacher", "1969", " 12.5", "n't", "(x)", "\n", "\r\n", "\n\n", " ", "  ", "    ", "\t", "\x00",
    "\u00e9", "e\u0301", "\u0301", "\u65e5\u672c", "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627", "\u200f", "\u00a0", "\u2581", "\u0120", "\ue000",
    "\U00100000", "</s>", "<0x41>",
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(FUZZ_PIECES), max_size=15).map("".join),
    st.lists(st.sampled_from(FUZZ_PIECES), max_size=15).map(" ".join),
)
MAX_MICROSECONDS = 1.0
"""To align a token of either side, on one core."""


@pytest.fixture(scope="module")
def tokenizers(byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer):
    return dict(zip(KINDS, (byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer), strict=True))


@pytest.fixture(scope="module")
def pairs(tokenizers):
    return {(s, t): _pair(tokenizers[s], tokenizers[t]) for s, t in PAIRS}


def _pair(student, teacher, **options) -> TokenizerPair:
    return TokenizerPair(student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher), **options)


def _edited(tokenizer, edit):
    """The tokenizer with its definition changed by `edit`."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    edit(definition)
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)), clean_up_tokenization_spaces=False, **special
    )


def _with_normalizer(tokenizer, *extra: dict):
    def edit(definition):
        own = [definition["normalizer"]] if definition["normalizer"] else []
        definition["normalizer"] = {"type": "Sequence", "normalizers": [*extra, *own]}

    return _edited(tokenizer, edit)


# Tokens of a text


def _token_ends(total: int):
    """Ends of tokens over `total` bytes; equal neighbours are tokens without bytes."""
    return st.lists(st.integers(0, total), max_size=20).map(lambda ends: np.array([*sorted(ends), total]))


TWO_TOKENIZATIONS = st.integers(0, 25).flatmap(lambda total: st.tuples(_token_ends(total), _token_ends(total)))
"""Two tokenizations of the same bytes, with some tokens without bytes."""


def _spans(ends: np.ndarray) -> list[tuple[int, int]]:
    """First byte and end of each token."""
    return list(zip([0, *ends.tolist()], ends.tolist(), strict=False))


def _ends_of(pair: TokenizerPair, text: str) -> tuple[np.ndarray, np.ndarray, list[list[bytes]]]:
    """Where each token of `text` ends on both sides, without a space that only one side puts before it, and the
    bytes of each token.
    """
    text = pair.canonical(text)
    pieces_by_side = []
    for table, tokenizer in zip(pair.tables, (pair.student, pair.teacher), strict=True):
        pieces = [table.pieces[i] for i in encode(tokenizer, [text])[0]]
        if b"".join(pieces) != text.encode():
            assert b"".join(pieces) == b" " + text.encode()
            pieces[0] = pieces[0][1:]
        pieces_by_side.append(pieces)
    ends = [np.cumsum([len(piece) for piece in pieces], dtype=np.int64) for pieces in pieces_by_side]
    return *ends, pieces_by_side


# Boundaries


def _walk(student_ends: np.ndarray, teacher_ends: np.ndarray) -> list[tuple[int, int, int, int]]:
    """At each byte at which a token starts: the token that holds it on each side and the bytes of it before."""
    sides = [
        {byte: (token, byte - start) for token, (start, end) in enumerate(_spans(ends)) for byte in range(start, end)}
        for ends in (student_ends, teacher_ends)
    ]
    found = []
    for byte in sorted(sides[0]):
        (student, student_prefix_length), (teacher, teacher_prefix_length) = sides[0][byte], sides[1][byte]
        if 0 in (student_prefix_length, teacher_prefix_length):
            found.append((student, teacher, student_prefix_length, teacher_prefix_length))
    return found


def _boundaries(student_ends: np.ndarray, teacher_ends: np.ndarray) -> list[tuple[int, int, int, int]]:
    found = find_boundaries(student_ends, teacher_ends)
    arrays = found.student, found.teacher, found.student_prefix_length, found.teacher_prefix_length
    return list(zip(*(array.tolist() for array in arrays), strict=True))


@settings(max_examples=200, deadline=None)
@given(ends=TWO_TOKENIZATIONS)
@example(ends=(np.array([0, 0, 2, 2, 3, 3]), np.array([0, 1, 1, 3])))
@example(ends=(np.array([0]), np.array([0, 0])))
def test_boundaries_are_those_of_a_walk_over_the_bytes(ends):
    assert _boundaries(*ends) == _walk(*ends)


@pytest.mark.parametrize("names", PAIRS)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
@example(text="")
@example(text=" ")
@example(text="  lone spaces  ")
@example(text="\n")
def test_boundaries_of_any_text_are_those_of_a_walk_over_its_bytes(pairs, names, text):
    student_ends, teacher_ends, _ = _ends_of(pairs[names], text)
    assert _boundaries(student_ends, teacher_ends) == _walk(student_ends, teacher_ends)


@settings(max_examples=100, deadline=None)
@given(ends=TWO_TOKENIZATIONS)
def test_every_token_with_bytes_has_one_boundary_at_its_start_and_none_is_inside_both(ends):
    found = find_boundaries(*ends)
    for side, prefix_length, own in (
        (found.student, found.student_prefix_length, ends[0]),
        (found.teacher, found.teacher_prefix_length, ends[1]),
    ):
        assert side[prefix_length == 0].tolist() == [
            token for token, (start, end) in enumerate(_spans(own)) if end > start
        ]
    assert not (found.student_prefix_length * found.teacher_prefix_length).any()


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=20))
def test_equal_tokens_meet_one_to_one(lengths):
    ends = np.cumsum(lengths)
    assert _boundaries(ends, ends) == [(token, token, 0, 0) for token in range(len(ends))]


def test_boundaries_of_a_hand_example():
    # student ab|c|def, teacher a|bc|de|f: b is the second byte of ab, c of bc, f the third of def
    found = _boundaries(np.array([2, 3, 6]), np.array([1, 3, 5, 6]))
    assert found == [(0, 0, 0, 0), (0, 1, 1, 0), (1, 1, 0, 1), (2, 2, 0, 0), (2, 3, 2, 0)]


# Chunks


@settings(max_examples=200, deadline=None)
@given(ends=TWO_TOKENIZATIONS)
def test_chunks_end_where_a_token_ends_on_both_sides_and_nowhere_else(ends):
    common = {end for end in range(1, int(ends[0][-1]) + 1) if end in ends[0].tolist() and end in ends[1].tolist()}
    assert find_chunks(*ends).ends.tolist() == sorted(common)


@settings(max_examples=150, deadline=None)
@given(ends=TWO_TOKENIZATIONS)
def test_no_chunk_can_be_split(ends):
    for first, end in _spans(find_chunks(*ends).ends):
        for inner in range(first + 1, end):
            assert any(start < inner < stop for own in ends for start, stop in _spans(own))


@settings(max_examples=200, deadline=None)
@given(ends=TWO_TOKENIZATIONS)
def test_chunks_tile_the_text_and_every_token_with_bytes_lies_in_exactly_one(ends):
    chunks = find_chunks(*ends)
    bounds = _spans(chunks.ends)
    assert chunks.ends[-1:].tolist() == [ends[0][-1]] * bool(ends[0][-1])
    for members, own, sizes in zip((chunks.student, chunks.teacher), ends, chunks.sizes, strict=True):
        assert len(members) == len(own)
        assert (np.diff(members) >= 0).all()
        counts = [0] * len(bounds)
        for token, (start, end) in enumerate(_spans(own)):
            if end > start:
                holding = [c for c, (first, stop) in enumerate(bounds) if first <= start and end <= stop]
                assert holding == [members[token]]
                counts[members[token]] += 1
        assert sizes.tolist() == counts


@settings(max_examples=100, deadline=None)
@given(ends=TWO_TOKENIZATIONS)
def test_a_token_without_bytes_joins_the_chunk_that_follows_and_after_the_last_none(ends):
    chunks = find_chunks(*ends)
    for members, own in zip((chunks.student, chunks.teacher), ends, strict=True):
        for token, (start, end) in enumerate(_spans(own)):
            if start == end:
                assert members[token] == sum(end <= start for end in chunks.ends)


@pytest.mark.parametrize("names", PAIRS)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
@example(text="")
@example(text=" ")
@example(text="  lone spaces  ")
def test_both_sides_of_every_chunk_of_any_text_have_the_same_bytes(pairs, names, text):
    student_ends, teacher_ends, pieces_by_side = _ends_of(pairs[names], text)
    chunks = find_chunks(student_ends, teacher_ends)
    texts = []
    for members, pieces in zip((chunks.student, chunks.teacher), pieces_by_side, strict=True):
        texts.append([b""] * len(chunks.ends))
        for chunk, piece in zip(members.tolist(), pieces, strict=True):
            if piece:
                texts[-1][chunk] += piece
    assert texts[0] == texts[1]
    assert all(texts[0])
    assert b"".join(texts[0]) == pairs[names].canonical(text).encode()


@settings(max_examples=100, deadline=None)
@given(ends=TWO_TOKENIZATIONS)
def test_swapping_the_sides_swaps_the_alignment(ends):
    forth, back = find_chunks(*ends), find_chunks(*ends[::-1])
    assert forth.student.tolist() == back.teacher.tolist()
    assert forth.teacher.tolist() == back.student.tolist()
    assert forth.ends.tolist() == back.ends.tolist()
    assert forth.sizes.tolist() == back.sizes[::-1].tolist()
    assert (forth.strict.tolist(), forth.overlapping.tolist()) == (back.strict.tolist(), back.overlapping.tolist())
    assert _boundaries(*ends) == [(s, t, p, q) for t, s, q, p in _boundaries(*ends[::-1])]


@settings(max_examples=100, deadline=None)
@given(ends=TWO_TOKENIZATIONS)
def test_strict_chunks_hold_one_token_a_side_and_overlapping_ones_several_of_both(ends):
    chunks = find_chunks(*ends)
    for chunk, (first, stop) in enumerate(_spans(chunks.ends)):
        counts = [sum(first <= start < end <= stop for start, end in _spans(own)) for own in ends]
        assert chunks.strict[chunk] == (counts == [1, 1])
        assert chunks.overlapping[chunk] == (min(counts) > 1)


@settings(max_examples=100, deadline=None)
@given(ends=TWO_TOKENIZATIONS, seed=st.integers(0, 99))
def test_the_log_probabilities_of_the_chunks_add_up_to_those_of_the_text(ends, seed):
    chunks = find_chunks(*ends)
    for members, own in zip((chunks.student, chunks.teacher), ends, strict=True):
        log_probs = -np.random.default_rng(seed).exponential(size=len(own))
        sums = np.bincount(members, log_probs, minlength=len(chunks.ends))
        after = sum(log_probs[token] for token, (start, _) in enumerate(_spans(own)) if start == own[-1])
        assert sums[: len(chunks.ends)].sum() == pytest.approx(log_probs.sum() - after, rel=1e-12)


def test_chunks_of_a_hand_example():
    # student ab|c|def|g, teacher a|bc|def|g
    chunks = find_chunks(np.array([2, 3, 6, 7]), np.array([1, 3, 6, 7]))
    assert (chunks.student.tolist(), chunks.teacher.tolist()) == ([0, 0, 1, 2], [0, 0, 1, 2])
    assert chunks.ends.tolist() == [3, 6, 7]
    assert chunks.sizes.tolist() == [[2, 1, 1], [2, 1, 1]]
    assert chunks.strict.tolist() == [False, True, True]
    assert chunks.overlapping.tolist() == [True, False, False]


def test_aligning_takes_less_than_a_microsecond_a_token():
    draw = np.random.default_rng(0)
    student_ends = np.cumsum(draw.integers(1, 7, 100_000))
    teacher_ends = np.unique(np.append(draw.integers(1, student_ends[-1], 110_000), student_ends[-1]))
    size, seconds = len(student_ends) + len(teacher_ends), []
    for _ in range(5):
        start = time.process_time()
        find_boundaries(student_ends, teacher_ends)
        find_chunks(student_ends, teacher_ends)
        seconds.append(time.process_time() - start)
    print(f"boundaries and chunks: {min(seconds) / size * 1e6:.3f} us a token ({size} tokens of both sides)")
    assert min(seconds) / size < 2 * MAX_MICROSECONDS * 1e-6  # twice, for a machine that is busy or slow


# Pairs


def test_both_models_read_the_text_that_both_tokenizers_keep(byte_tokenizer, sp_tokenizer):
    pair = _pair(sp_tokenizer, _with_normalizer(byte_tokenizer, {"type": "NFC"}))
    assert pair.canonical("e\u0301\u2581x") == "\u00e9 x"


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_canonical_text_is_canonical_for_both(pairs, text):
    for pair in pairs.values():
        once = pair.canonical(text)
        assert pair.canonical(once) == once
        assert all(table.canonical(once) == once for table in pair.tables)


def test_text_is_read_as_it_is_where_the_tokenizers_are_equal(sp_tokenizer):
    assert _pair(sp_tokenizer, sp_tokenizer).canonical("e\u0301\u2581x") == "e\u0301\u2581x"


def test_equal_tokenizers_have_no_tables_unless_aligned(byte_tokenizer, sp_tokenizer):
    plain, aligned = _pair(byte_tokenizer, byte_tokenizer), _pair(byte_tokenizer, byte_tokenizer, aligns=True)
    assert plain.equal
    assert plain.tables is None
    assert aligned.equal
    assert aligned.tables[0] == aligned.tables[1] == build_token_table(byte_tokenizer, len(byte_tokenizer))
    assert not _pair(byte_tokenizer, sp_tokenizer).equal


def test_each_side_has_the_table_of_its_own_head(byte_tokenizer, sp_tokenizer):
    pair = TokenizerPair(sp_tokenizer, byte_tokenizer, student_vocab_size=1000, teacher_vocab_size=2000)
    assert [len(table.pieces) for table in pair.tables] == [1000, 2000]
    assert (pair.student_start, pair.student_end) == start_and_end(sp_tokenizer)
    assert (pair.teacher_start, pair.teacher_end) == start_and_end(byte_tokenizer)
    assert (pair.student_start, pair.student_end) != (pair.teacher_start, pair.teacher_end)


def test_tokenizers_of_one_vocabulary_that_cut_differently_are_not_equal(byte_tokenizer):
    lowering = _with_normalizer(byte_tokenizer, {"type": "Lowercase"})
    assert lowering.get_vocab() == byte_tokenizer.get_vocab()
    assert not same_tokenizer(byte_tokenizer, lowering)
    assert same_tokenizer(byte_tokenizer, _edited(byte_tokenizer, lambda definition: None))


@pytest.fixture(scope="module")
def llama_tokenizer(dummy_prefix_tokenizer):
    """Llama 2's tokenizer as transformers 5 builds it from a checkpoint: no dummy space before a leading space."""
    model = json.loads(dummy_prefix_tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return transformers.LlamaTokenizer(vocab=model["vocab"], merges=merges, legacy=False)


def test_a_llama_tokenizer_of_transformers_keeps_text(llama_tokenizer, byte_tokenizer):
    texts = ["The teacher", " leading space", "  two", "\nline", "\u65e5\u672c"]
    pair = _pair(llama_tokenizer, byte_tokenizer)
    corpus = build_dataset([Document(text, text) for text in texts], pair, 64, 64)
    assert corpus.text.skipped_documents == []
    assert corpus.text.student.ends[-1] == corpus.text.teacher.ends[-1] == sum(len(text.encode()) + 1 for text in texts)


# Tokenizers that are refused


def _lower_casing_wordpiece():
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "[SEP]", "hello", "world", "##s", "a", "b"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")


LOSSY = {
    "lower case": ({"type": "Lowercase"}, "'Hello world' becomes 'hello world'"),
    "strip": ({"type": "Strip", "strip_left": True, "strip_right": True}, "'Hello  world ' becomes 'Hello  world'"),
    "nfd": ({"type": "NFD"}, "becomes"),
}


@pytest.mark.parametrize("change", LOSSY)
@pytest.mark.parametrize("kind", ["byte", "sp"])
def test_a_tokenizer_that_changes_text_is_found_with_an_example(tokenizers, kind, change):
    normalizer, shown = LOSSY[change]
    tokenizer = _with_normalizer(tokenizers[kind], normalizer)
    assert shown in build_token_table(tokenizer, len(tokenizer)).change


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_pair_names_the_tokenizer_that_it_refuses(byte_tokenizer, side):
    lossy = _lower_casing_wordpiece()
    tokenizers = (lossy, byte_tokenizer) if side == "student" else (byte_tokenizer, lossy)
    with pytest.raises(UnfitTokenizer, match=f"the {side}'s tokenizer is a WordPiece .* bytes are unknown") as refusal:
        _pair(*tokenizers)
    assert refusal.value.whose == side
    assert refusal.value.reason.startswith("is a WordPiece")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_pair_names_the_tokenizer_without_an_end_of_text_token(byte_tokenizer, side):
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    tokenizers = (bare, byte_tokenizer) if side == "student" else (byte_tokenizer, bare)
    with pytest.raises(UnfitTokenizer, match=f"the {side}'s tokenizer has no end-of-text token"):
        _pair(*tokenizers)


def test_equal_tokenizers_need_no_bytes_unless_they_are_aligned():
    assert _pair(_lower_casing_wordpiece(), _lower_casing_wordpiece()).equal
    with pytest.raises(UnfitTokenizer, match="is a WordPiece"):
        _pair(_lower_casing_wordpiece(), _lower_casing_wordpiece(), aligns=True)
