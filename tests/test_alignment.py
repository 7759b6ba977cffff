"""Bytes of tokens, cover of one tokenisation by another, and the map between vocabularies, against brute force."""

import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from sar_kd.alignment import TokenizerPair, VocabularyProjection, cover
from sar_kd.data import Batch, Corpus
from sar_kd.documents import Document
from sar_kd.losses import forward_kl, teacher_probs
from sar_kd.tokens import TokenTable, build_token_table, encode, same_tokenizer, start_and_end

KINDS = ("byte", "sp", "dummy_prefix")
PAIRS = [(student, teacher) for student in KINDS for teacher in KINDS if student != teacher]
WORDS = (
    "the",
    "token",
    "Teacher",
    "1969",
    " 12.5",
    "n't",
    "(x)",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "é",
    "日本",
    "😀",
    "</s>",
    "\u2581",
)
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet=" \n\tabcdeht.,1é\u0301日😀\u2581<s>", max_size=40),
    st.lists(st.sampled_from(WORDS), max_size=25).map("".join),
    st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join),
)


@pytest.fixture(scope="module")
def tokenizers(byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer):
    return dict(zip(KINDS, (byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer), strict=True))


@pytest.fixture(scope="module")
def tables(tokenizers):
    return {kind: build_token_table(tokenizer, len(tokenizer)) for kind, tokenizer in tokenizers.items()}


@pytest.fixture(scope="module")
def pairs(tokenizers):
    return {(s, t): _pair(tokenizers[s], tokenizers[t]) for s, t in PAIRS}


def _pair(student, teacher, **options) -> TokenizerPair:
    return TokenizerPair(student, teacher, student_rows=len(student), teacher_rows=len(teacher), **options)


def _read(table: TokenTable, ids: list[int]) -> bytes:
    return b"".join(table.pieces[i] for i in ids)


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


def _byte_bpe(*merges: str):
    """A byte-level BPE with these merges only, each a token spelled in two halves: 'th|e'."""
    cuts = [tuple(merge.split("|")) for merge in merges]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    strings = ["<end>", *alphabet, *(a + b for a, b in cuts)]
    tokenizer = Tokenizer(models.BPE({string: i for i, string in enumerate(strings)}, cuts))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


# The bytes of a text's tokens


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_the_pieces_of_any_canonical_text_are_its_bytes(tokenizers, tables, kind, text):
    table = tables[kind]
    text = table.canonical(text)
    (ids,) = encode(tokenizers[kind], [text])
    prefix = b" " if table.dummy_prefix and text else b""
    assert _read(table, ids) == prefix + text.encode()


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_has_a_token_of_its_own(tables, kind):
    assert {piece for piece in tables[kind].pieces if len(piece) == 1} == {bytes([byte]) for byte in range(256)}


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_rows_without_a_token_have_no_bytes(tokenizers, kind):
    tokenizer = tokenizers[kind]
    table = build_token_table(tokenizer, len(tokenizer) + 7)
    assert len(table.pieces) == len(table.strings) == len(tokenizer) + 7
    assert table.pieces[len(tokenizer) :] == [b""] * 7
    assert all(table.pieces[i] == b"" for i in tokenizer.all_special_ids)
    assert table.lengths.tolist() == [len(piece) for piece in table.pieces]


@pytest.mark.parametrize(("kind", "dummy"), [("byte", False), ("sp", False), ("dummy_prefix", True)])
def test_a_dummy_prefix_is_recognised(tables, kind, dummy):
    assert tables[kind].dummy_prefix == dummy


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_looks_like_a_special_token_stays_text(tokenizers, tables, kind):
    text = "a </s><s> b <unk> <|endoftext|><0x41>"
    (ids,) = encode(tokenizers[kind], [text])
    assert not set(ids) & set(tokenizers[kind].all_special_ids)
    assert _read(tables[kind], ids).decode().strip() == text


def test_an_added_token_that_is_not_special_spells_its_text(byte_tokenizer):
    def add(definition):
        like = definition["added_tokens"][0]
        definition["added_tokens"].append({**like, "id": len(byte_tokenizer), "content": "<think>", "special": False})

    tokenizer = _edited(byte_tokenizer, add)
    table = build_token_table(tokenizer, len(tokenizer))
    (ids,) = encode(tokenizer, ["so <think> on"])
    assert len(byte_tokenizer) in ids
    assert _read(table, ids) == b"so <think> on"


def test_the_look_alike_of_a_space_is_read_as_one_where_the_tokenizer_cannot_tell(tables):
    text = "a\u2581b"
    assert {kind: table.canonical(text) for kind, table in tables.items()} == {
        "byte": text,
        "sp": "a b",
        "dummy_prefix": "a b",
    }


def test_a_tokenizer_that_composes_characters_reads_composed_text(byte_tokenizer):
    tokenizer = _with_normalizer(byte_tokenizer, {"type": "NFC"})
    table = build_token_table(tokenizer, len(tokenizer))
    text = table.canonical("e\u0301 \u212b")
    assert text == "\u00e9 \u00c5"
    assert _read(table, encode(tokenizer, [text])[0]) == text.encode()


def test_both_models_read_the_text_that_both_tokenizers_keep(byte_tokenizer, sp_tokenizer):
    pair = _pair(sp_tokenizer, _with_normalizer(byte_tokenizer, {"type": "NFC"}))
    assert pair.canonical("e\u0301\u2581x") == "\u00e9 x"


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_canonical_text_is_canonical(pairs, text):
    for pair in pairs.values():
        once = pair.canonical(text)
        assert pair.canonical(once) == once


def test_the_start_token_is_the_end_token_where_there_is_none():
    assert start_and_end(_byte_bpe()) == (0, 0)


# Tokenizers that are refused


def _lower_casing_wordpiece():
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "[SEP]", "hello", "world", "##s", "a", "b"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")


def test_a_wordpiece_tokenizer_is_refused_with_the_reason():
    tokenizer = _lower_casing_wordpiece()
    with pytest.raises(ValueError, match=r"is a WordPiece tokenizer .* bytes are unknown"):
        build_token_table(tokenizer, len(tokenizer))


LOSSY = {
    "lower case": ({"type": "Lowercase"}, "'Hello world' becomes 'hello world'"),
    "strip": ({"type": "Strip", "strip_left": True, "strip_right": True}, "'Hello  world ' becomes 'Hello  world'"),
    "nfkc": ({"type": "NFKC"}, "becomes"),
    "nfd": ({"type": "NFD"}, "becomes"),
}


@pytest.mark.parametrize("change", LOSSY)
@pytest.mark.parametrize("kind", ["byte", "sp"])
def test_a_tokenizer_that_changes_text_is_refused_with_an_example(tokenizers, kind, change):
    normalizer, example = LOSSY[change]
    tokenizer = _with_normalizer(tokenizers[kind], normalizer)
    with pytest.raises(ValueError, match="does not keep text as it is") as refusal:
        build_token_table(tokenizer, len(tokenizer))
    assert example in str(refusal.value)


def test_a_tokenizer_that_collapses_spaces_is_refused_with_an_example(sp_tokenizer):
    spaces = json.loads(normalizers.Replace(Regex(" {2,}"), " ").__getstate__())
    tokenizer = _with_normalizer(sp_tokenizer, spaces)
    with pytest.raises(ValueError, match="'Hello  world ' becomes 'Hello world '"):
        build_token_table(tokenizer, len(tokenizer))


def test_a_tokenizer_with_unknown_characters_is_refused_with_an_example(sp_tokenizer):
    def without_byte_fallback(definition):
        definition["model"]["byte_fallback"] = False

    with pytest.raises(ValueError, match=r"does not keep text as it is: .* becomes "):
        build_token_table(_edited(sp_tokenizer, without_byte_fallback), len(sp_tokenizer))


def test_a_tokenizer_without_an_end_of_text_token_is_refused(byte_tokenizer):
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no end-of-text token"):
        build_token_table(bare, len(bare))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_pair_names_the_tokenizer_that_it_refuses(byte_tokenizer, side):
    lossy = _lower_casing_wordpiece()
    tokenizers = (lossy, byte_tokenizer) if side == "student" else (byte_tokenizer, lossy)
    with pytest.raises(ValueError, match=f"the {side}'s tokenizer is a WordPiece"):
        _pair(*tokenizers)


def test_a_lossy_tokenizer_is_welcome_where_both_are_the_same():
    pair = _pair(_lower_casing_wordpiece(), _lower_casing_wordpiece())
    assert pair.equal
    assert pair.projection is None


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
    corpus = Corpus([Document(text, text) for text in texts], pair, 64, 64)
    assert corpus.text.left_out == []
    assert corpus.text.student.ends[-1] == corpus.text.teacher.ends[-1] == sum(len(text.encode()) + 1 for text in texts)


# Cover


def _tokenisation(total: int):
    """Ends of tokens over `total` bytes; equal neighbours are tokens without bytes."""
    return st.lists(st.integers(0, total), max_size=25).map(lambda cuts: np.array([*sorted(cuts), total]))


@settings(max_examples=300, deadline=None)
@given(ends=st.integers(1, 30).flatmap(lambda total: st.tuples(_tokenisation(total), _tokenisation(total))))
def test_cover_is_a_search_byte_by_byte(ends):
    student_ends, teacher_ends = ends
    owner, first_byte = {}, {}
    for token, end in enumerate(teacher_ends.tolist()):
        first_byte[token] = teacher_ends[token - 1] if token else 0
        owner |= dict.fromkeys(range(first_byte[token], end), token)
    wanted = []
    for token, end in enumerate(student_ends.tolist()):
        own_bytes = range(student_ends[token - 1] if token else 0, end)
        if own_bytes and {owner[byte] for byte in own_bytes} == {owner[own_bytes[0]]}:
            wanted.append((token, owner[own_bytes[0]], own_bytes[0] - first_byte[owner[own_bytes[0]]]))
    found = cover(student_ends, teacher_ends)
    assert list(zip(found.student, found.teacher, found.emitted, strict=True)) == wanted


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=20))
def test_equal_ends_cover_each_other_one_to_one(lengths):
    ends = np.cumsum(lengths)
    found = cover(ends, ends)
    every = list(range(len(ends)))
    assert (found.student.tolist(), found.teacher.tolist(), found.emitted.tolist()) == (every, every, [0] * len(ends))


def test_a_student_token_that_outlasts_the_teachers_is_left_out():
    found = cover(np.array([2, 5, 6]), np.array([1, 3, 6]))
    assert (found.student.tolist(), found.teacher.tolist(), found.emitted.tolist()) == ([2], [2], [2])


# The map between vocabularies


def _phi(projection_of: TokenizerPair, remainder: bytes) -> int:
    """The student's token for what is left of a teacher's token, found the slow way; -1 if there is none."""
    table, tokenizer = projection_of.tables[0], projection_of.student
    byte_token = [string.startswith("<0x") for string in table.strings]
    beginnings = [u for u, piece in enumerate(table.pieces) if piece and remainder.startswith(piece)]
    if not beginnings:
        return -1
    longest = max(beginnings, key=lambda u: (len(table.pieces[u]), not byte_token[u], u))
    if table.pieces[longest] == remainder:
        return longest
    anchor, skipped = ("\n", b" \n") if table.dummy_prefix else ("", b"")
    try:
        text = anchor + remainder.decode()
    except UnicodeDecodeError:
        return longest
    if table.canonical(text) != text:
        return longest
    read = b""
    for token in encode(tokenizer, [text])[0]:
        if read == skipped and table.pieces[token]:
            return token if token in beginnings else longest
        read += table.pieces[token]
    return longest


def _expected_extensions(pair: TokenizerPair, prefix: bytes) -> list[tuple[int, int]]:
    pieces = pair.tables[1].pieces
    longer = [v for v, piece in enumerate(pieces) if piece.startswith(prefix) and len(piece) > len(prefix)]
    return [(v, u) for v in longer if (u := _phi(pair, pieces[v][len(prefix) :])) >= 0]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_inside_lists_every_teacher_token_that_extends_the_emitted_bytes(pairs, student, teacher):
    pair = pairs[student, teacher]
    pieces = pair.tables[1].pieces
    places = [(v, n) for v, piece in enumerate(pieces) for n in range(1, len(piece)) if len(piece) <= 4 or v % 5 == 0]
    places = [places[i] for i in np.random.default_rng(0).choice(len(places), 60)]
    found = pair.projection.inside(*np.array(places).T)
    rows = found[0].tolist()
    assert rows == sorted(rows)
    expected = {}
    for row, (token, emitted) in enumerate(places):
        prefix = pieces[token][:emitted]
        expected.setdefault(prefix, _expected_extensions(pair, prefix))
        entries = [(v, u) for r, v, u in zip(*found, strict=True) if r == row]
        assert sorted(entries) == expected[prefix]


def test_inside_of_no_rows_is_empty(pairs):
    nothing = np.zeros(0, dtype=np.int64)
    assert [part.tolist() for part in pairs["sp", "byte"].projection.inside(nothing, nothing)] == [[], [], []]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_destination_begins_the_bytes_it_stands_for(pairs, student, teacher):
    pair = pairs[student, teacher]
    student_table, teacher_table = pair.tables
    for column, destination in zip(pair.projection.columns, pair.projection.destinations, strict=True):
        wanted, given_piece = teacher_table.pieces[column], student_table.pieces[destination]
        assert wanted.startswith(given_piece)
        assert bool(wanted) == bool(given_piece)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_teacher_token_with_bytes_takes_part_and_special_tokens_meet(pairs, student, teacher):
    pair = pairs[student, teacher]
    phi = dict(zip(pair.projection.columns.tolist(), pair.projection.destinations.tolist(), strict=True))
    assert {v for v, piece in enumerate(pair.tables[1].pieces) if piece} <= set(phi)
    assert phi[pair.teacher_end] == pair.student_end
    if pair.teacher_start != pair.teacher_end:
        assert phi[pair.teacher_start] == pair.student_start
    assert pair.projection.columns.tolist() == sorted(phi)


def test_phi_is_the_students_own_cut_and_not_the_longest_token():
    # Merged in this order, "abcd" is cut into ab|cd, although the vocabulary holds abc as well.
    student = _byte_bpe("a|b", "c|d", "ab|c")
    teacher = _byte_bpe("a|b", "c|d", "ab|cd", "x|abcd")
    assert [student.convert_ids_to_tokens(i) for i in encode(student, ["abcd"])[0]] == ["ab", "cd"]
    pair = _pair(student, teacher)
    whole, inside = teacher.convert_tokens_to_ids(["abcd", "xabcd"])
    _, columns, destinations = pair.projection.inside(np.array([inside]), np.array([1]))
    phi = dict(zip(columns.tolist(), destinations.tolist(), strict=True))
    assert student.convert_ids_to_tokens(phi[inside]) == "ab"
    opened = dict(zip(pair.projection.columns.tolist(), pair.projection.destinations.tolist(), strict=True))
    assert student.convert_ids_to_tokens(opened[whole]) == "ab"


def test_phi_is_the_longest_token_where_the_bytes_are_no_text():
    first, second, third, _ = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\U0001f600")[0][0]
    two, three = first + second, first + second + third
    student, teacher = _byte_bpe(f"{first}|{second}"), _byte_bpe(f"{first}|{second}", f"{two}|{third}", f"x|{three}")
    pair = _pair(student, teacher)
    broken = teacher.convert_tokens_to_ids("x" + three)
    _, columns, destinations = pair.projection.inside(np.array([broken]), np.array([1]))
    phi = dict(zip(columns.tolist(), destinations.tolist(), strict=True))
    assert student.convert_ids_to_tokens(phi[broken]) == two


# Rows carried across


def _one_block(pair: TokenizerPair, *texts: str) -> tuple[Corpus, Batch]:
    corpus = Corpus([Document(str(i), text) for i, text in enumerate(texts)], pair, 4096, 4096)
    assert len(corpus) == 1
    return corpus, corpus.batch([0])


def _teacher_logits(batch: Batch, pair: TokenizerPair) -> Tensor:
    """Rows for the batch's teacher rows from a random model."""
    every = torch.randn(batch.teacher.input_ids.numel(), len(pair.tables[1].pieces)) * 3
    return every[batch.teacher_rows]


def test_hand_example_of_a_long_teacher_token_and_a_student_of_bytes():
    teacher, student = _byte_bpe("t|h", "th|e", "t|o"), _byte_bpe()
    pair = _pair(student, teacher)
    _, batch = _one_block(pair, "the")
    logits = torch.full((len(batch.kd_rows), len(teacher)), -30.0)
    th, the, to = teacher.convert_tokens_to_ids(["th", "the", "to"])
    logits[:, [th, the, to]] = torch.tensor([0.2, 0.5, 0.3]).log()
    probs, _ = teacher_probs(logits, len(student), projection=batch.projection)
    by_row = dict(zip(batch.kd_rows.tolist(), probs, strict=True))
    t, h, e, o = student.convert_tokens_to_ids(["t", "h", "e", "o"])
    assert by_row[0][t].item() == pytest.approx(1.0)
    assert by_row[1][[h, o]].tolist() == pytest.approx([0.7, 0.3])
    assert by_row[2][e].item() == pytest.approx(1.0)


def test_hand_example_of_a_teacher_of_digits_and_a_student_of_numbers():
    student, teacher = _byte_bpe("1|2"), _byte_bpe()
    pair = _pair(student, teacher)
    _, batch = _one_block(pair, "a12b")
    # a and b and the end are covered; 12 outlasts the teacher's 1.
    assert sorted(batch.kd_rows.tolist()) == [0, 2, 3]
    probs, _ = teacher_probs(_teacher_logits(batch, pair), len(student), projection=batch.projection)
    assert torch.equal(probs[:, student.convert_tokens_to_ids("12")], torch.zeros(3))
    assert (probs[:, student.convert_tokens_to_ids("1")] > 0).all()


def _expected_rows(pair: TokenizerPair, text: str, logits: Tensor, temperature: float) -> dict[int, Tensor]:
    """Target distributions by student row, from the definition; `logits` has one row per teacher token."""
    sides = []
    for table, tokenizer in zip(pair.tables, (pair.student, pair.teacher), strict=True):
        pieces = [table.pieces[i] for i in encode(tokenizer, [text])[0]]
        assert b"".join(pieces) == text.encode()
        sides.append([*pieces, b"END"])
    starts, at = [], 0
    for piece in sides[1]:
        starts.append(at)
        at += len(piece)
    rows, begin = {}, 0
    for row, piece in enumerate(sides[0]):
        token = max(t for t, start in enumerate(starts) if start <= begin)
        emitted = sides[1][token][: begin - starts[token]]
        if begin + len(piece) <= starts[token] + len(sides[1][token]):
            if emitted:
                entries = _expected_extensions(pair, emitted)
            else:
                entries = list(zip(pair.projection.columns, pair.projection.destinations, strict=True))
            weights = {v: float(logits[token, v].double() / temperature) for v, _ in entries}
            total = sum(np.exp(weight) for weight in weights.values())
            rows[row] = torch.zeros(len(pair.tables[0].pieces), dtype=torch.float64)
            for v, u in entries:
                rows[row][u] += np.exp(weights[v]) / total
        begin += len(piece)
    return rows


@pytest.mark.parametrize(("student", "teacher"), [("sp", "byte"), ("byte", "sp")])
@pytest.mark.parametrize(
    "text", ["The teacher's tokens: 1969, and 3.14", "def add(a):\n    return caf\u00e9 \u65e5\u672c"]
)
def test_a_batch_carries_every_row_as_the_definition_says(pairs, student, teacher, text):
    pair = pairs[student, teacher]
    _, batch = _one_block(pair, text)
    every = torch.randn(batch.teacher.input_ids.numel(), len(pair.tables[1].pieces)) * 3
    probs, _ = teacher_probs(every[batch.teacher_rows], len(pair.tables[0].pieces), 2.0, projection=batch.projection)
    wanted = _expected_rows(pair, text, every, 2.0)
    assert sorted(batch.kd_rows.tolist()) == sorted(wanted)
    for row, given_probs in zip(batch.kd_rows.tolist(), probs, strict=True):
        torch.testing.assert_close(given_probs.double(), wanted[row], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_target_row_is_a_distribution_over_what_the_teacher_can_say(pairs, corpus_texts, student, teacher):
    pair = pairs[student, teacher]
    _, batch = _one_block(pair, *corpus_texts)
    probs, dropped = teacher_probs(
        _teacher_logits(batch, pair), len(pair.tables[0].pieces), 1.5, projection=batch.projection
    )
    assert 0 < batch.projection.num_open < len(probs)
    torch.testing.assert_close(probs.sum(1), torch.ones(len(probs)))
    said = np.unique([*pair.projection.destinations, *batch.projection.inside_destinations])
    unsaid = np.setdiff1d(np.arange(probs.shape[1]), said)
    assert len(unsaid)
    assert torch.equal(probs[:, unsaid], torch.zeros(len(probs), len(unsaid)))
    assert dropped == 0


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_the_true_student_token_is_possible_at_every_row_that_speaks(pairs, corpus_texts, student, teacher):
    pair = pairs[student, teacher]
    _, batch = _one_block(pair, *corpus_texts)
    probs, _ = teacher_probs(_teacher_logits(batch, pair), len(pair.tables[0].pieces), projection=batch.projection)
    possible = probs.gather(1, batch.student.targets[batch.kd_rows][:, None]) > 0
    # A tokenizer's cut depends on what follows, which the teacher's token does not tell: rarely, it differs.
    assert possible.float().mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_maps_every_id_to_itself(tokenizers, kind):
    pair = _pair(tokenizers[kind], tokenizers[kind], projects=True)
    every = np.arange(len(tokenizers[kind]))
    assert np.array_equal(pair.projection.columns, every)
    assert np.array_equal(pair.projection.destinations, every)


@pytest.mark.parametrize("kind", KINDS)
def test_the_projection_of_equal_tokenizers_is_the_token_level_loss(tokenizers, corpus_texts, kind):
    tokenizer = tokenizers[kind]
    _, plain = _one_block(_pair(tokenizer, tokenizer), *corpus_texts)
    pair = _pair(tokenizer, tokenizer, projects=True)
    _, batch = _one_block(pair, *corpus_texts)
    assert sorted(batch.kd_rows.tolist()) == plain.kd_rows.tolist()
    size = len(tokenizer)
    teacher_logits = torch.randn(plain.teacher.input_ids.numel(), size) * 3
    student_logits = torch.randn(len(plain.student.targets), size) * 3
    losses, grads = [], []
    for one in (plain, batch):
        leaf = student_logits.clone().requires_grad_()
        targets, _ = teacher_probs(teacher_logits[one.teacher_rows], size, 2.0, projection=one.projection)
        loss, _ = forward_kl(leaf[one.kd_rows], targets, 2.0)
        (loss / len(plain.kd_rows)).backward()
        losses.append(loss.detach() / len(plain.kd_rows))
        grads.append(leaf.grad)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-6)


def test_equal_tokenizers_take_the_token_level_path_unless_asked(byte_tokenizer, sp_tokenizer):
    assert _pair(byte_tokenizer, byte_tokenizer).projection is None
    assert isinstance(_pair(byte_tokenizer, byte_tokenizer, projects=True).projection, VocabularyProjection)
    assert isinstance(_pair(byte_tokenizer, sp_tokenizer).projection, VocabularyProjection)


# Dummy prefixes


@pytest.mark.parametrize(
    ("student", "teacher", "speaks"),
    [
        ("dummy_prefix", "byte", False),
        ("byte", "dummy_prefix", False),
        ("dummy_prefix", "sp", False),
        ("sp", "dummy_prefix", False),
        ("sp", "byte", True),
    ],
)
def test_a_document_opened_by_one_dummy_space_only_is_left_out_at_its_first_token(pairs, student, teacher, speaks):
    corpus, batch = _one_block(pairs[student, teacher], "In the end", "In the end")
    first_of_second = int(np.flatnonzero(corpus.text.student.ids == corpus.pair.student_end)[0]) + 1
    spoken = set(batch.kd_rows.tolist())
    assert (0 in spoken) == speaks
    assert (first_of_second in spoken) == speaks
    assert {first_of_second - 1, len(batch.student.targets) - 1} <= spoken  # the ends of the documents


def test_a_document_opened_by_two_dummy_spaces_keeps_its_first_token(dummy_prefix_tokenizer):
    _, batch = _one_block(_pair(dummy_prefix_tokenizer, dummy_prefix_tokenizer, projects=True), "In the end")
    assert 0 in batch.kd_rows


def test_a_token_that_is_a_dummy_space_alone_has_no_teacher_row(pairs):
    corpus, batch = _one_block(pairs["dummy_prefix", "byte"], "\nIn the end")
    assert corpus.text.student.ends[0] == 0
    assert 0 not in batch.kd_rows
    assert 1 in batch.kd_rows
