"""The classes that two vocabularies share, against dictionaries and loops over all tokens."""

import dataclasses
from collections import Counter, defaultdict
from itertools import product

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from sar_kd.alignment import vocabulary_map
from sar_kd.alignment.byte_alignment import find_boundaries
from sar_kd.alignment.vocabulary_map import ClassTable, VocabularyMap, same_token_map
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Conversation, Document, Message
from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.token_table import TokenTable, build_token_table
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from tests.helpers.vocabularies import TableTokenizer, encode_any, is_byte_token, token_table

pytestmark = pytest.mark.slow

KINDS = ("byte", "sp", "dummy_prefix")
BOTH_WAYS = [(coarse, fine) for coarse in KINDS for fine in KINDS if coarse != fine]
LETTERS = ("a", "b", "1", " ", "\n")
E_ACUTE = "\u00e9"  # b"\xc3\xa9"


# Vocabularies made by hand


@pytest.fixture(autouse=True, scope="module")
def _tables_can_be_encoded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary_map, "encode", encode_any)
        yield


WORDS = st.text("ab1 \n" + E_ACUTE, min_size=2, max_size=4) | st.sampled_from(("    ", "111", E_ACUTE, "aba", "ab"))


@st.composite
def tables(draw, dummy_prefix: bool | None = None) -> TokenTable:
    """A vocabulary with all of its letters: ordinary, as a byte token, or both."""
    strings = {"</s>", "<0xC3>", "<0xA9>", *draw(st.lists(WORDS, max_size=9))}
    for letter, kind in zip(LETTERS, draw(st.tuples(*[st.sampled_from(("word", "byte", "both"))] * 5)), strict=True):
        strings |= {letter} if kind != "byte" else set()
        strings |= {f"<0x{ord(letter):02X}>"} if kind != "word" else set()
    strings |= draw(st.sets(st.sampled_from(("<s>", "<pad>", "<mask>"))))
    order = draw(st.permutations(sorted(strings)))
    has_dummy = draw(st.booleans()) if dummy_prefix is None else dummy_prefix
    return token_table(order, "<s>" if "<s>" in strings else "</s>", has_dummy)


# The definition of a class, in dictionaries


def _segmentation(piece: bytes, fine: TokenTable, tokenizer) -> list[int]:
    """The fine tokens of a coarse token: the one with its bytes, else the finer tokenizer's own segmentation of it
    standing alone, else the longest matches.
    """
    ordinary_first = sorted(range(len(fine.pieces)), key=lambda u: is_byte_token(fine.strings[u]))
    spelling = [u for u in ordinary_first if fine.pieces[u] == piece]
    if spelling:
        return spelling[:1]
    greedy, rest = [], piece
    while rest:
        begins = [u for u in ordinary_first if fine.pieces[u] and rest.startswith(fine.pieces[u])]
        greedy.append(max(begins, key=lambda u: len(fine.pieces[u])))
        rest = rest[len(fine.pieces[greedy[-1]]) :]
    try:  # a tokenizer that puts a space before the text gets it after a newline
        text = (b"\n" * fine.dummy_prefix + piece).decode()
    except UnicodeDecodeError:
        return greedy
    if fine.canonical(text) != text:
        return greedy
    (ids,) = encode_any(tokenizer, [text])
    tails = [ids[first:] for first in range(len(ids))]
    return next((tail for tail in tails if b"".join(fine.pieces[u] for u in tail) == piece), greedy)


def _following(coarse: TokenTable, fine: TokenTable, tokenizer) -> dict[bytes, dict[int, int]]:
    """By prefix, the coarse tokens that are split after it, and the fine token that follows in each."""
    found = defaultdict(dict)
    for r, piece in enumerate(coarse.pieces):
        position = 0
        for part in _segmentation(piece, fine, tokenizer) if piece else ():
            found[piece[:position]][r] = part
            position += len(fine.pieces[part])
    return found


def _members(table: ClassTable) -> dict[int, tuple[frozenset, frozenset]]:
    """The tokens of each class: coarse ones, fine ones."""
    coarse, fine = defaultdict(set), defaultdict(set)
    for token, class_ in zip(table.coarse_tokens.tolist(), table.coarse_classes.tolist(), strict=True):
        coarse[class_].add(token)
    for token, class_ in zip(table.fine_tokens.tolist(), table.fine_classes.tolist(), strict=True):
        fine[class_].add(token)
    assert set(coarse) | set(fine) <= set(range(table.num_classes))
    return {n: (frozenset(coarse[n]), frozenset(fine[n])) for n in range(table.num_classes)}


def _expected(coarse: TokenTable, fine: TokenTable, following: dict, prefix: bytes, same=()) -> set:
    """The classes by definition, each as its coarse and its fine tokens; `same`: groups of fine tokens that the text
    merged into one class.
    """
    representative = {u: min(group) for group in same for u in group}
    begins = dict(following[prefix])
    rests = {}
    for r in sorted(begins, key=lambda r: not is_byte_token(coarse.strings[r])):
        piece = coarse.pieces[r]
        alike = [u for u, s in enumerate(fine.strings) if s == coarse.strings[r] and fine.pieces[u] == piece]
        if not prefix and alike and fine.pieces[begins[r]] == piece:  # paired by their spelling
            begins[r] = alike[0]
        rests[piece[len(prefix) :]] = begins[r]  # of twins the ordinary one
    takes_part = {u: u for u in begins.values()}
    own = {representative.get(u, u) for u in takes_part}
    for u, piece in enumerate(fine.pieces):
        is_twin = is_byte_token(fine.strings[u]) and fine.pieces.count(piece) > 1
        if representative.get(u, u) in own and u in representative:
            takes_part[u] = u
        elif u not in takes_part:
            starts = [piece[:end] for end in range(1, len(piece) + (not is_twin)) if piece[:end] in rests]
            if starts:
                takes_part[u] = rests[starts[-1]]
    if not prefix:
        pairs = {r: u for (r, s), (u, t) in product(enumerate(coarse.strings), enumerate(fine.strings)) if s == t and s}
        starts = [t.start_id if t.start_id != t.end_id else None for t in (coarse, fine)]
        pairs |= {starts[0]: starts[1]} if None not in starts else {}
        pairs |= {coarse.end_id: fine.end_id}
        for r, u in pairs.items():
            if (r == starts[0] and u == fine.end_id) or (r == coarse.end_id and u == starts[1]):
                continue
            if not coarse.pieces[r] and not fine.pieces[u]:
                begins[r] = takes_part[u] = u
    members = defaultdict(lambda: (set(), set()))
    for r, u in begins.items():
        members[representative.get(u, u)][0].add(r)
    for u, begin in takes_part.items():
        members[representative.get(begin, begin)][1].add(u)
    if prefix:  # the coarse token ends there
        ends = [r for r, piece in enumerate(coarse.pieces) if piece == prefix]
        members["end"] = ({min(ends, key=lambda r: is_byte_token(coarse.strings[r]))} if ends else set(), set())
    return {(frozenset(a), frozenset(b)) for a, b in members.values()}


def _prefixes(coarse: TokenTable) -> list[bytes]:
    return sorted({piece[:end] for piece in coarse.pieces for end in range(1, len(piece) + 1)})


@settings(max_examples=200, deadline=None)
@given(coarse=tables(), fine=tables(), from_right=st.booleans())
def test_classes_at_a_common_boundary_are_those_of_the_definition(coarse, fine, from_right):
    tokenizer = TableTokenizer(fine, from_right)
    found = _members(VocabularyMap(coarse, fine, tokenizer).at_common_boundary())
    assert set(found.values()) == _expected(coarse, fine, _following(coarse, fine, tokenizer), b"")
    assert len(set(found.values())) == len(found)


@settings(max_examples=150, deadline=None)
@given(coarse=tables(), fine=tables(), from_right=st.booleans())
def test_classes_after_every_prefix_are_those_of_the_definition(coarse, fine, from_right):
    tokenizer = TableTokenizer(fine, from_right)
    vocabulary_map, following = VocabularyMap(coarse, fine, tokenizer), _following(coarse, fine, tokenizer)
    for prefix in _prefixes(coarse):
        table = vocabulary_map.after_prefix(prefix)
        if prefix not in following:
            assert table is None
            continue
        found = _members(table)
        assert set(found.values()) == _expected(coarse, fine, following, prefix), prefix
        assert len(set(found.values())) == len(found)
        assert not found[table.num_classes - 1][1]  # the last is the token end, which no fine token begins
        assert table.can_end == bool(found[table.num_classes - 1][0]) == (prefix in coarse.pieces)
        assert table.prefix == prefix


def _every(vocabulary_map: VocabularyMap, coarse: TokenTable) -> list[tuple[bytes, ClassTable]]:
    after = [(prefix, vocabulary_map.after_prefix(prefix)) for prefix in _prefixes(coarse)]
    return [
        (b"", vocabulary_map.at_common_boundary()),
        *((prefix, table) for prefix, table in after if table),
    ]


@settings(max_examples=100, deadline=None)
@given(coarse=tables(), fine=tables(), from_right=st.booleans())
def test_every_class_but_a_token_end_has_tokens_on_both_sides_and_no_token_has_two(coarse, fine, from_right):
    for prefix, table in _every(VocabularyMap(coarse, fine, TableTokenizer(fine, from_right)), coarse):
        continuing = [n for n in range(table.num_classes) if not prefix or n < table.num_classes - 1]
        found = _members(table)
        assert len(table.representatives) == len(continuing)
        assert all(representative in found[n][1] for n, representative in enumerate(table.representatives.tolist()))
        assert continuing
        assert all(found[n][0] and found[n][1] for n in continuing)
        for tokens in (table.coarse_tokens, table.fine_tokens):
            assert len(np.unique(tokens)) == len(tokens)


@settings(max_examples=100, deadline=None)
@given(coarse=tables(), fine=tables(), from_right=st.booleans())
def test_all_tokens_of_a_class_begin_with_the_bytes_of_one_fine_token(coarse, fine, from_right):
    for prefix, table in _every(VocabularyMap(coarse, fine, TableTokenizer(fine, from_right)), coarse):
        for coarse_tokens, fine_tokens in _members(table).values():
            remainders = [coarse.pieces[r][len(prefix) :] for r in coarse_tokens] + [
                fine.pieces[u] for u in fine_tokens
            ]
            assert not fine_tokens or any(
                all(rest.startswith(fine.pieces[u]) for rest in remainders) for u in fine_tokens
            )


@settings(max_examples=100, deadline=None)
@given(coarse=tables(), fine=tables(), from_right=st.booleans())
def test_every_coarse_token_has_a_class_at_a_common_boundary(coarse, fine, from_right):
    table = VocabularyMap(coarse, fine, TableTokenizer(fine, from_right)).at_common_boundary()
    assert {r for r, piece in enumerate(coarse.pieces) if piece} <= set(table.coarse_tokens.tolist())


@settings(max_examples=100, deadline=None)
@given(coarse=tables(), fine=tables(), from_right=st.booleans())
def test_every_coarse_token_continues_after_each_prefix_that_it_is_split_after_and_ends_after_itself(
    coarse, fine, from_right
):
    vocabulary_map = VocabularyMap(coarse, fine, TableTokenizer(fine, from_right))
    for r, piece in enumerate(coarse.pieces):
        parts = _segmentation(piece, fine, TableTokenizer(fine, from_right)) if piece else []
        for count in range(1, len(parts)):
            prefix = b"".join(fine.pieces[u] for u in parts[:count])
            table = vocabulary_map.after_prefix(prefix)
            (class_,) = table.coarse_classes[table.coarse_tokens == r]
            assert class_ in table.fine_classes[table.fine_tokens == parts[count]]
        table = vocabulary_map.after_prefix(piece)
        if table and coarse.pieces.count(piece) == 1:
            assert table.coarse_classes[table.coarse_tokens == r].tolist() == [table.num_classes - 1]


@settings(max_examples=100, deadline=None)
@given(table=tables(), from_right=st.booleans())
def test_equal_vocabularies_give_the_identity_on_all_ids(table, from_right):
    found = VocabularyMap(table, table, TableTokenizer(table, from_right)).at_common_boundary()
    assert set(_members(found).values()) == {(frozenset([i]), frozenset([i])) for i in range(len(table.pieces))}
    vocabulary_map = VocabularyMap(table, table, TableTokenizer(table, from_right))
    assert all(vocabulary_map.after_prefix(prefix) is None for prefix in [*_prefixes(table), *table.pieces])


@settings(max_examples=100, deadline=None)
@given(coarse=tables(), fine=tables(), from_right=st.booleans(), data=st.data())
def test_permuting_the_fine_ids_permutes_the_classes_and_nothing_else(coarse, fine, from_right, data):
    order = data.draw(st.permutations(range(len(fine.pieces))))
    new_id = {old: new for new, old in enumerate(order)}
    start = "<s>" if "<s>" in fine.strings else "</s>"
    permuted = token_table([fine.strings[i] for i in order], start, fine.dummy_prefix)
    one = VocabularyMap(coarse, fine, TableTokenizer(fine, from_right))
    other = VocabularyMap(coarse, permuted, TableTokenizer(permuted, from_right))
    for (prefix, before), (same, after) in zip(_every(one, coarse), _every(other, coarse), strict=True):
        expected = {(a, frozenset(new_id[u] for u in b)) for a, b in _members(before).values()}
        assert set(_members(after).values()) == expected
        assert prefix == same


# Hand examples


def _spelled(coarse: TokenTable, fine: TokenTable, table: ClassTable) -> set[tuple[str, str]]:
    """Each class as its coarse and its fine tokens, spelled and joined by '|'."""
    return {
        ("|".join(sorted(coarse.strings[r] for r in a)), "|".join(sorted(fine.strings[u] for u in b)))
        for a, b in _members(table).values()
    }


def test_hand_example_of_words_and_their_letters():
    coarse, fine = token_table(["</s>", "t", "h", "e", "th", "the"]), token_table(["</s>", "h", "t", "e", "he"])
    vocabulary_map = VocabularyMap(coarse, fine, TableTokenizer(fine))
    shared = {("</s>", "</s>"), ("t|th|the", "t"), ("h", "h|he"), ("e", "e")}
    assert _spelled(coarse, fine, vocabulary_map.at_common_boundary()) == shared
    assert _spelled(coarse, fine, vocabulary_map.after_prefix(b"t")) == {("th", "h"), ("the", "he"), ("t", "")}
    assert vocabulary_map.after_prefix(b"th") is None  # the is split t|he
    assert vocabulary_map.after_prefix(b"the") is None
    assert vocabulary_map.after_prefix(b"x") is None


@pytest.mark.parametrize(("lone", "class_of"), [("1969", "19"), ("    ", "  "), ("12", "1"), ("  \n", "  ")])
def test_a_token_that_only_the_fine_side_has_is_merged_with_the_longest_that_it_begins_with(lone, class_of):
    coarse = token_table(["</s>", *"1269 \na", "19", "  ", "a1"])
    fine = token_table(["</s>", *"1269 \na", "19", "  ", "12", "1969", "    ", "  \n"])
    classes = _spelled(coarse, fine, VocabularyMap(coarse, fine, TableTokenizer(fine)).at_common_boundary())
    (found,) = [(a, b) for a, b in classes if lone in b.split("|")]
    assert class_of in found[0].split("|")
    assert class_of in found[1].split("|")


def test_a_number_that_only_the_fine_side_has_is_merged_inside_a_coarse_token_too():
    coarse, fine = token_table(["</s>", *"12a", "a1"]), token_table(["</s>", *"12a", "12"])
    table = VocabularyMap(coarse, fine, TableTokenizer(fine)).after_prefix(b"a")
    assert _spelled(coarse, fine, table) == {("a1", "1|12"), ("a", "")}


def test_a_prefix_that_is_no_coarse_token_cannot_be_an_end():
    coarse, fine = token_table(["</s>", *"abc", "abc"]), token_table(["</s>", *"abc", "ab"])
    table = VocabularyMap(coarse, fine, TableTokenizer(fine)).after_prefix(b"ab")
    assert _spelled(coarse, fine, table) == {("abc", "c"), ("", "")}
    assert not table.can_end
    assert table.num_classes == 2


def test_a_fine_token_is_merged_with_an_ordinary_token_and_not_with_its_byte_token():
    # As in Gemma, the byte tokens come after the ordinary newline.
    strings = ["</s>", "\n", "a", "<0x0A>"]
    for order in (strings, strings[::-1]):
        coarse, fine = token_table(order), token_table(["</s>", "<0x0A>", "\n", "a", "\n\n"])
        found = _spelled(coarse, fine, VocabularyMap(coarse, fine, TableTokenizer(fine)).at_common_boundary())
        assert found == {("</s>", "</s>"), ("\n", "\n|\n\n"), ("<0x0A>", "<0x0A>"), ("a", "a")}


def test_the_finer_tokenizers_own_segmentation_counts_and_not_the_longest_match():
    coarse, fine = (
        token_table(["</s>", *"abcd", "abcd", "xabcd", "x"]),
        token_table(["</s>", *"abcdx", "abc", "cd", "ab", "bcd"]),
    )
    from_right = VocabularyMap(coarse, fine, TableTokenizer(fine, from_right=True))  # a|bcd
    assert ("a|abcd", "a|ab|abc") in _spelled(coarse, fine, from_right.at_common_boundary())
    assert _spelled(coarse, fine, from_right.after_prefix(b"x")) == {("xabcd", "a"), ("x", "")}
    assert _spelled(coarse, fine, from_right.after_prefix(b"xa")) == {("xabcd", "bcd"), ("", "")}
    from_left = VocabularyMap(coarse, fine, TableTokenizer(fine))  # abc|d
    assert ("abcd", "abc") in _spelled(coarse, fine, from_left.at_common_boundary())
    assert _spelled(coarse, fine, from_left.after_prefix(b"x")) == {("xabcd", "abc"), ("x", "")}
    assert from_left.after_prefix(b"xa") is None


def test_the_longest_match_counts_where_the_bytes_are_no_text():
    # The first byte of a character after another one; from the right the finer would split a|bXc3, if it could.
    coarse, fine = (
        token_table(["</s>", "<0xC3>", *"ab", "<0x61>"]),
        token_table(["</s>", "<0xC3>", "<0xA9>", *"ab", "ab"]),
    )
    coarse.pieces[-1], fine.pieces[2] = b"ab\xc3", b"b\xc3"
    found = _spelled(
        coarse, fine, VocabularyMap(coarse, fine, TableTokenizer(fine, from_right=True)).at_common_boundary()
    )
    assert ("<0x61>", "ab") in found
    assert VocabularyMap(coarse, fine, TableTokenizer(fine, from_right=True)).after_prefix(b"a") is None


def test_an_ordinary_token_is_preferred_to_the_byte_token_of_its_bytes():
    strings = ["</s>", "<0x61>", "a", "<0x62>", "b"]
    coarse = token_table(["</s>", "a", "ab", "b"])
    for order in (strings, strings[::-1]):
        fine = token_table(order)
        vocabulary_map = VocabularyMap(coarse, fine, TableTokenizer(fine))
        assert _spelled(coarse, fine, vocabulary_map.at_common_boundary()) == {
            ("</s>", "</s>"),
            ("a|ab", "a"),
            ("b", "b"),
        }
        assert _spelled(coarse, fine, vocabulary_map.after_prefix(b"a")) == {("ab", "b"), ("a", "")}


def test_a_newline_that_the_coarse_side_has_as_a_byte_token_only_is_the_fine_sides_ordinary_newline():
    # Llama 2 has no token "\n" but "<0x0A>"; many others have both, and emit the first.
    coarse, fine = token_table(["</s>", "<0x0A>", "a", "b"]), token_table(["</s>", "\n", "a", "b", "<0x0A>"])
    classes = _members(VocabularyMap(coarse, fine, TableTokenizer(fine)).at_common_boundary())
    (found,) = [(a, b) for a, b in classes.values() if fine.strings.index("\n") in b]
    assert found[0] == {coarse.strings.index("<0x0A>")}
    assert found[1] <= {fine.strings.index("\n"), fine.strings.index("<0x0A>")}


def test_tokens_without_bytes_are_paired_by_their_spelling_and_ends_and_starts_by_their_role():
    coarse = token_table(["</s>", "a", "<s>", "<pad>", "<only>"], "<s>")
    fine = token_table(["<pad>", "a", "</s>", "<other>"])
    found = _spelled(coarse, fine, VocabularyMap(coarse, fine, TableTokenizer(fine)).at_common_boundary())
    assert found == {("</s>", "</s>"), ("a", "a"), ("<pad>", "<pad>")}
    back = _spelled(fine, coarse, VocabularyMap(fine, coarse, TableTokenizer(coarse)).at_common_boundary())
    assert back == {("</s>", "</s>"), ("a", "a"), ("<pad>", "<pad>")}


def test_a_start_token_is_never_the_end_of_the_other_side_however_it_is_spelled():
    """One side begins texts with what the other one ends them with."""
    coarse = token_table(["</s>", "a", "<x>"], "<x>")
    fine = token_table(["</s>", "a", "<x>", "<s>"], "<s>")
    fine = dataclasses.replace(fine, end_id=2, end_ids=(2,))
    for one, other in ((coarse, fine), (fine, coarse)):
        table = VocabularyMap(one, other, TableTokenizer(other)).at_common_boundary()
        for tokens_of_one, tokens_of_other in _members(table).values():
            assert not (one.start_id in tokens_of_one and tokens_of_other & set(other.end_ids))
            assert not (other.start_id in tokens_of_other and tokens_of_one & set(one.end_ids))


CHAT = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def chat_pair(sp_tokenizer, byte_tokenizer):
    """chat_pair(student_is_coarser): the student has byte tokens, and its template ends turns by <|im_end|>."""

    def make(student_is_coarser: bool):
        rust = Tokenizer.from_str(sp_tokenizer.backend_tokenizer.to_str())
        rust.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        student = transformers.PreTrainedTokenizerFast(
            tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT
        )
        rust = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
        rust.add_special_tokens(["<|end|>"])
        if student_is_coarser:  # a tokenizer of single bytes
            rust.model = models.BPE({k: v for k, v in rust.get_vocab(False).items() if len(k) == 1}, [])
        teacher = transformers.PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|endoftext|>")
        sizes = {"student_vocab_size": len(student), "teacher_vocab_size": len(teacher) + 1000}
        return TokenizerPair(student, teacher, **sizes)

    return make


GOOD = "The quick brown fox jumps over the lazy dog."
MESSAGES = (Message("user", "Good?", False), Message("assistant", GOOD, True))
TEXTS = {
    "documents": ([Document("d", GOOD)], {"</s>"}),
    "conversations": ([Conversation("c", MESSAGES, False)], {"<|im_end|>"}),
    "both": ([Document("d", GOOD), Conversation("c", MESSAGES, False)], {"</s>", "<|im_end|>"}),
}


@pytest.mark.parametrize("student_is_coarser", [False, True])
@pytest.mark.parametrize("kind", TEXTS)
def test_of_several_ways_to_spell_bytes_or_an_end_the_student_learns_the_one_that_its_text_holds(
    chat_pair, kind, student_is_coarser
):
    documents, ends = TEXTS[kind]
    pair = chat_pair(student_is_coarser)
    aligner = build_dataset(documents, pair, 128, 256).aligner
    assert aligner.teacher_is_coarser != student_is_coarser
    classes, table = aligner.shared_classes, pair.tables[0]
    class_of = dict(zip(classes.student_tokens.tolist(), classes.student_classes.tolist(), strict=True))
    spelled = {table.strings[i] for i in class_of}
    assert {"G", "o"} <= spelled
    assert not {"<0x47>", "<0x6F>"} & spelled
    assert spelled & {table.strings[i] for i in table.end_ids} == ends
    teachers = dict(zip(classes.teacher_tokens.tolist(), classes.teacher_classes.tolist(), strict=True))
    end_classes = {class_of[table.strings.index(end)] for end in ends}
    assert {teachers[i] for i in pair.tables[1].end_ids} == end_classes  # the probability that the text ends
    same = same_token_map(aligner._student_as_written, pair.tables[1])
    assert {table.strings[i] for i in same[list(pair.tables[1].end_ids)]} <= ends


def test_padding_of_an_lm_head_has_no_class(sp_tokenizer, byte_tokenizer):
    coarse = build_token_table(byte_tokenizer, len(byte_tokenizer) + 8)
    fine = build_token_table(sp_tokenizer, len(sp_tokenizer) + 8)
    table = VocabularyMap(coarse, fine, sp_tokenizer).at_common_boundary()
    assert table.coarse_tokens.max() < len(byte_tokenizer)
    assert table.fine_tokens.max() < len(sp_tokenizer)


# Tokenizers that were trained


@pytest.fixture(scope="module")
def tokenizers(byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer):
    return dict(zip(KINDS, (byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer), strict=True))


@pytest.fixture(scope="module")
def token_tables(tokenizers):
    return {kind: build_token_table(tokenizer, len(tokenizer)) for kind, tokenizer in tokenizers.items()}


@pytest.fixture(scope="module")
def occurrences(tokenizers, token_tables, corpus_texts):
    """occurrences(coarse, fine): coarse token, prefix length and the fine token that starts there in the corpus."""

    def find(coarse: str, fine: str) -> list[np.ndarray]:
        found = []
        for text in corpus_texts:
            ids, ends = [], []
            for kind in (coarse, fine):
                (tokens,) = encode(tokenizers[kind], ["\n" + text])
                widths = token_tables[kind].lengths[tokens]
                widths[0] -= int(widths.sum()) - len(("\n" + text).encode())  # a space that is no text
                ids.append(np.array(tokens))
                ends.append(np.cumsum(widths))
            boundaries = find_boundaries(*ends)
            starts = boundaries.teacher_prefix_length == 0
            arrays = (
                ids[0][boundaries.student[starts]],
                boundaries.student_prefix_length[starts],
                ids[1][boundaries.teacher[starts]],
            )
            found.append(np.stack(arrays))
        return list(np.concatenate(found, axis=1))

    return find


@pytest.mark.parametrize("names", BOTH_WAYS)
def test_classes_of_trained_tokenizers_at_a_common_boundary_are_those_of_the_definition(
    tokenizers, token_tables, names
):
    coarse, fine = (token_tables[name] for name in names)
    found = VocabularyMap(coarse, fine, tokenizers[names[1]]).at_common_boundary()
    assert set(_members(found).values()) == _expected(coarse, fine, _following(coarse, fine, tokenizers[names[1]]), b"")


@pytest.mark.parametrize("names", BOTH_WAYS)
def test_classes_of_trained_tokenizers_after_a_prefix_are_those_of_the_definition(tokenizers, token_tables, names):
    coarse, fine = (token_tables[name] for name in names)
    vocabulary_map = VocabularyMap(coarse, fine, tokenizers[names[1]])
    following = _following(coarse, fine, tokenizers[names[1]])
    for prefix in _prefixes(coarse):
        table = vocabulary_map.after_prefix(prefix)
        assert (table is None) == (prefix not in following)
    picked = np.random.default_rng(0).permutation(len(following))[:60]
    for prefix in (sorted(following)[i] for i in picked):
        if prefix:
            found = vocabulary_map.after_prefix(prefix)
            assert set(_members(found).values()) == _expected(coarse, fine, following, prefix), prefix


def _corrected(coarse: TokenTable, following: dict, met: list) -> tuple[dict, set]:
    """`_following` as the text corrects it, and the groups of fine tokens that the text merges into one class.

    met: coarse token, prefix length and the fine token that starts there, in the text
    """
    seen = defaultdict(Counter)
    for r, length, u in sorted(met):
        if r in following.get(coarse.pieces[r][:length], ()):
            seen[coarse.pieces[r][:length], r][u] += 1
    corrected, expected = {prefix: dict(begins) for prefix, begins in following.items()}, defaultdict(Counter)
    for (prefix, r), counts in seen.items():
        u, count = counts.most_common(1)[0]
        total = sum(counts.values())
        if total >= 3 and 2 * count > total:
            corrected[prefix][r] = u
        for u, count in counts.items():
            expected[u][corrected[prefix][r]] += count
    groups = defaultdict(set)
    for u, counts in expected.items():
        other, count = counts.most_common(1)[0]
        if other != u and count >= 3 and 2 * count >= sum(counts.values()):
            joined = {u, other} | groups[u] | groups[other]
            groups |= dict.fromkeys(joined, joined)
    return corrected, {frozenset(group) for group in groups.values() if group}


@pytest.mark.parametrize("names", BOTH_WAYS)
def test_classes_after_fitting_to_a_corpus_are_those_of_the_definition(tokenizers, token_tables, occurrences, names):
    coarse, fine = (token_tables[name] for name in names)
    vocabulary_map, following = (
        VocabularyMap(coarse, fine, tokenizers[names[1]]),
        _following(coarse, fine, tokenizers[names[1]]),
    )
    met = occurrences(*names)
    vocabulary_map.fit_(*met)
    following, same = _corrected(coarse, following, np.stack(met).T.tolist())
    assert set(_members(vocabulary_map.at_common_boundary()).values()) == _expected(coarse, fine, following, b"", same)
    for prefix in [*(prefix for prefix in sorted(following) if prefix)][::10]:
        found = set(_members(vocabulary_map.after_prefix(prefix)).values())
        assert found == _expected(coarse, fine, following, prefix, same), prefix
    if names == ("byte", "sp"):
        assert following != _following(coarse, fine, tokenizers[names[1]]), (
            "nothing was corrected, so nothing is tested"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_tokenizer_maps_every_id_to_itself_and_is_not_corrected(tokenizers, token_tables, occurrences, kind):
    table = token_tables[kind]
    vocabulary_map = VocabularyMap(table, table, tokenizers[kind])
    vocabulary_map.fit_(*occurrences(kind, kind))
    identity = {(frozenset([i]), frozenset([i])) for i in range(len(tokenizers[kind]))}
    assert set(_members(vocabulary_map.at_common_boundary()).values()) == identity


# Fitting to text

TABLES = token_table(["</s>", *"abc ", "ab", "  "]), token_table(["</s>", *"abc ", "ab", "  "])


def _fitted(*occurrences: tuple[str, int, str, int], tables=TABLES) -> set[tuple[str, str]]:
    """The shared classes after a text with these occurrences: coarse token, prefix length, fine token, how often."""
    coarse, fine = tables
    vocabulary_map = VocabularyMap(coarse, fine, TableTokenizer(fine))
    met = [
        (coarse.strings.index(a), length, fine.strings.index(b))
        for a, length, b, count in occurrences
        for _ in range(count)
    ]
    vocabulary_map.fit_(*np.array(met, dtype=np.int64).reshape(-1, 3).T)
    return _spelled(coarse, fine, vocabulary_map.at_common_boundary())


IDENTITY = {(string, string) for string in TABLES[0].strings}
MERGED = IDENTITY - {("ab", "ab"), ("a", "a")} | {("a|ab", "a|ab")}


def test_without_text_nothing_is_merged():
    assert _fitted() == IDENTITY


@pytest.mark.parametrize(
    ("strange", "usual", "corrects"),
    [(50, 0, True), (3, 0, True), (2, 0, False), (3, 2, True), (3, 3, False), (9, 8, True), (8, 9, False)],
)
def test_a_coarse_token_is_followed_by_the_fine_token_that_mostly_follows_in_the_text(strange, usual, corrects):
    found = _fitted(("ab", 0, "a", strange), ("ab", 0, "ab", usual), ("a", 0, "a", 50))
    assert found == (MERGED if corrects else IDENTITY)


@pytest.mark.parametrize(
    ("strange", "usual", "merges"), [(3, 0, True), (2, 0, False), (4, 3, True), (3, 4, False), (9, 8, True)]
)
def test_a_fine_token_that_mostly_occurs_where_another_is_expected_is_merged_with_it(strange, usual, merges):
    # For a few of all coarse "a" the fine token is "ab"; of all fine "ab", those are the most.
    found = _fitted(("a", 0, "ab", strange), ("a", 0, "a", 150), ("ab", 0, "ab", usual))
    assert found == (MERGED if merges else IDENTITY)


def test_merging_is_transitive():
    # In one order of ids and in the other.
    found = _fitted(("a", 0, "ab", 5), ("a", 0, "a", 6), ("c", 0, "a", 20), ("c", 0, "c", 30))
    assert found == IDENTITY - {(x, x) for x in ("a", "ab", "c")} | {("a|ab|c", "a|ab|c")}
    found = _fitted(("ab", 0, "a", 5), ("ab", 0, "ab", 6), ("  ", 0, "ab", 20), ("  ", 0, "  ", 30))
    assert found == IDENTITY - {(x, x) for x in ("a", "ab", "  ")} | {("  |a|ab", "  |a|ab")}


def test_what_the_text_corrects_is_expected_no_longer():
    # For "ab" the text always has "a", which so occurs where it is expected, and is merged with nothing.
    found = _fitted(("ab", 0, "a", 50), ("a", 0, "c", 2), ("c", 0, "c", 9))
    assert ("a|ab", "a|ab") in found
    assert ("c", "c") in found


def test_a_correction_inside_a_token_counts_inside_and_outside():
    coarse, fine = token_table(["</s>", *"abc", "cab", "ca"]), token_table(["</s>", *"abc", "ab"])
    vocabulary_map = VocabularyMap(coarse, fine, TableTokenizer(fine))
    apart = {("cab", "ab"), ("ca", "a"), ("c", "")}
    assert _spelled(coarse, fine, vocabulary_map.after_prefix(b"c")) == apart
    found = VocabularyMap(coarse, fine, TableTokenizer(fine))
    occurrence = coarse.strings.index("cab"), 1, fine.strings.index("a")
    found.fit_(*np.array([occurrence] * 5).T)
    assert _spelled(coarse, fine, found.after_prefix(b"c")) == {("ca|cab", "a|ab"), ("c", "")}
    assert ("a", "a|ab") in _spelled(coarse, fine, found.at_common_boundary())


def test_where_a_token_is_not_split_nothing_is_corrected():
    assert _fitted(("ab", 1, " ", 50)) == IDENTITY


def test_tokens_without_bytes_correct_nothing():
    assert _fitted(("</s>", 0, "a", 50), ("a", 0, "</s>", 50), ("a", 1, "ab", 50)) == IDENTITY


# The same token


@settings(max_examples=150, deadline=None)
@given(student=tables(), teacher=tables())
def test_the_same_token_has_the_same_bytes_and_is_ordinary_where_one_is(student, teacher):
    found = same_token_map(student, teacher)
    assert len(found) == len(teacher.pieces)
    for token, partner in enumerate(found.tolist()):
        piece = teacher.pieces[token]
        twins = [t for t, other in enumerate(teacher.pieces) if other == piece]
        ordinary = min(twins, key=lambda t: is_byte_token(teacher.strings[t]))
        partners = [s for s, other in enumerate(student.pieces) if other == piece]
        if token == teacher.end_id:
            assert partner == student.end_id
        elif not piece or token != ordinary or not partners:
            assert partner == -1
        else:
            assert partner == min(partners, key=lambda s: is_byte_token(student.strings[s]))
