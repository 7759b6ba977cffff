"""The outcomes that two vocabularies share, against dictionaries and loops over all tokens."""

from collections import Counter, defaultdict
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sar_kd.alignment import vocabulary_map
from sar_kd.alignment.byte_alignment import find_boundaries
from sar_kd.alignment.vocabulary_map import ClassTable, VocabularyMap, same_token_map
from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.token_table import TokenTable, build_token_table
from tests.helpers.vocabularies import TableTokenizer, encode_any, is_byte_token, token_table

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


# What an outcome is, in dictionaries


def _cut(piece: bytes, fine: TokenTable, tokenizer) -> list[int]:
    """The finer tokens that a coarser token is cut into: the one that spells it, else the finer tokenizer's own cut of
    it standing alone, else always the longest that fits.
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
    try:  # a tokenizer that puts a space before the text reads it behind a line end
        text = (b"\n" * fine.dummy_prefix + piece).decode()
    except UnicodeDecodeError:
        return greedy
    if fine.canonical(text) != text:
        return greedy
    (ids,) = encode_any(tokenizer, [text])
    tails = [ids[first:] for first in range(len(ids))]
    return next((tail for tail in tails if b"".join(fine.pieces[u] for u in tail) == piece), greedy)


def _cuts(coarse: TokenTable, fine: TokenTable, tokenizer) -> dict[bytes, dict[int, int]]:
    """By the bytes on the left of a cut, the coarser tokens that have it and the finer token on its right."""
    found = defaultdict(dict)
    for r, piece in enumerate(coarse.pieces):
        position = 0
        for part in _cut(piece, fine, tokenizer) if piece else ():
            found[piece[:position]][r] = part
            position += len(fine.pieces[part])
    return found


def _joint(outcomes: ClassTable) -> dict[int, tuple[frozenset, frozenset]]:
    """The tokens of each outcome: coarser ones, finer ones."""
    coarse, fine = defaultdict(set), defaultdict(set)
    for token, outcome in zip(outcomes.coarse_tokens.tolist(), outcomes.coarse_classes.tolist(), strict=True):
        coarse[outcome].add(token)
    for token, outcome in zip(outcomes.fine_tokens.tolist(), outcomes.fine_classes.tolist(), strict=True):
        fine[outcome].add(token)
    assert set(coarse) | set(fine) <= set(range(outcomes.num_classes))
    return {n: (frozenset(coarse[n]), frozenset(fine[n])) for n in range(outcomes.num_classes)}


def _expected(coarse: TokenTable, fine: TokenTable, cuts: dict, prefix: bytes, same=()) -> set:
    """The outcomes by definition, each as its coarser and its finer tokens; `same`: groups of finer tokens that the
    text showed to be one outcome.
    """
    leader = {u: min(group) for group in same for u in group}
    begins = dict(cuts[prefix])
    rests = {}
    for r in sorted(begins, key=lambda r: not is_byte_token(coarse.strings[r])):
        piece = coarse.pieces[r]
        alike = [u for u, s in enumerate(fine.strings) if s == coarse.strings[r] and fine.pieces[u] == piece]
        if not prefix and alike and fine.pieces[begins[r]] == piece:  # told apart by their spelling
            begins[r] = alike[0]
        rests[piece[len(prefix) :]] = begins[r]  # of twins the ordinary one
    takes_part = {u: u for u in begins.values()}
    images = {leader.get(u, u) for u in takes_part}
    for u, piece in enumerate(fine.pieces):
        is_twin = is_byte_token(fine.strings[u]) and fine.pieces.count(piece) > 1
        if leader.get(u, u) in images and u in leader:
            takes_part[u] = u
        elif u not in takes_part:
            starts = [piece[:end] for end in range(1, len(piece) + (not is_twin)) if piece[:end] in rests]
            if starts:
                takes_part[u] = rests[starts[-1]]
    if not prefix:
        pairs = {r: u for (r, s), (u, t) in product(enumerate(coarse.strings), enumerate(fine.strings)) if s == t and s}
        pairs |= {coarse.start_id: fine.start_id} | {coarse.end_id: fine.end_id}
        for r, u in pairs.items():
            if not coarse.pieces[r] and not fine.pieces[u]:
                begins[r] = takes_part[u] = u
    members = defaultdict(lambda: (set(), set()))
    for r, u in begins.items():
        members[leader.get(u, u)][0].add(r)
    for u, begin in takes_part.items():
        members[leader.get(begin, begin)][1].add(u)
    if prefix:  # the coarser token ends there
        ends = [r for r, piece in enumerate(coarse.pieces) if piece == prefix]
        members["end"] = ({min(ends, key=lambda r: is_byte_token(coarse.strings[r]))} if ends else set(), set())
    return {(frozenset(a), frozenset(b)) for a, b in members.values()}


def _prefixes(coarse: TokenTable) -> list[bytes]:
    return sorted({piece[:end] for piece in coarse.pieces for end in range(1, len(piece) + 1)})


@settings(max_examples=200, deadline=None)
@given(coarse=tables(), fine=tables(), from_right=st.booleans())
def test_open_outcomes_are_those_of_the_definition(coarse, fine, from_right):
    tokenizer = TableTokenizer(fine, from_right)
    found = _joint(VocabularyMap(coarse, fine, tokenizer).at_common_boundary())
    assert set(found.values()) == _expected(coarse, fine, _cuts(coarse, fine, tokenizer), b"")
    assert len(set(found.values())) == len(found)


@settings(max_examples=150, deadline=None)
@given(coarse=tables(), fine=tables(), from_right=st.booleans())
def test_outcomes_behind_every_prefix_are_those_of_the_definition(coarse, fine, from_right):
    tokenizer = TableTokenizer(fine, from_right)
    vocabulary_map, cuts = VocabularyMap(coarse, fine, tokenizer), _cuts(coarse, fine, tokenizer)
    for prefix in _prefixes(coarse):
        outcomes = vocabulary_map.after_prefix(prefix)
        if prefix not in cuts:
            assert outcomes is None
            continue
        found = _joint(outcomes)
        assert set(found.values()) == _expected(coarse, fine, cuts, prefix), prefix
        assert len(set(found.values())) == len(found)
        assert not found[outcomes.num_classes - 1][1]  # the last is the end, which no finer token begins
        assert outcomes.can_end == bool(found[outcomes.num_classes - 1][0]) == (prefix in coarse.pieces)
        assert outcomes.prefix == prefix


def _every(vocabulary_map: VocabularyMap, coarse: TokenTable) -> list[tuple[bytes, ClassTable]]:
    behind = [(prefix, vocabulary_map.after_prefix(prefix)) for prefix in _prefixes(coarse)]
    return [
        (b"", vocabulary_map.at_common_boundary()),
        *((prefix, outcomes) for prefix, outcomes in behind if outcomes),
    ]


@settings(max_examples=100, deadline=None)
@given(coarse=tables(), fine=tables(), from_right=st.booleans())
def test_every_outcome_but_an_end_has_tokens_on_both_sides_and_no_token_has_two(coarse, fine, from_right):
    for prefix, outcomes in _every(VocabularyMap(coarse, fine, TableTokenizer(fine, from_right)), coarse):
        going_on = [n for n in range(outcomes.num_classes) if not prefix or n < outcomes.num_classes - 1]
        found = _joint(outcomes)
        assert len(outcomes.representatives) == len(going_on)
        assert all(leader in found[n][1] for n, leader in enumerate(outcomes.representatives.tolist()))
        assert going_on
        assert all(found[n][0] and found[n][1] for n in going_on)
        for tokens in (outcomes.coarse_tokens, outcomes.fine_tokens):
            assert len(np.unique(tokens)) == len(tokens)


@settings(max_examples=100, deadline=None)
@given(coarse=tables(), fine=tables(), from_right=st.booleans())
def test_all_tokens_of_an_outcome_begin_with_the_bytes_of_one_poorer_token(coarse, fine, from_right):
    for prefix, outcomes in _every(VocabularyMap(coarse, fine, TableTokenizer(fine, from_right)), coarse):
        for coarse_tokens, fine_tokens in _joint(outcomes).values():
            said = [coarse.pieces[r][len(prefix) :] for r in coarse_tokens] + [fine.pieces[u] for u in fine_tokens]
            assert not fine_tokens or any(all(rest.startswith(fine.pieces[u]) for rest in said) for u in fine_tokens)


@settings(max_examples=100, deadline=None)
@given(coarse=tables(), fine=tables(), from_right=st.booleans())
def test_every_coarser_token_has_an_outcome_where_both_start_one(coarse, fine, from_right):
    outcomes = VocabularyMap(coarse, fine, TableTokenizer(fine, from_right)).at_common_boundary()
    assert {r for r, piece in enumerate(coarse.pieces) if piece} <= set(outcomes.coarse_tokens.tolist())


@settings(max_examples=100, deadline=None)
@given(coarse=tables(), fine=tables(), from_right=st.booleans())
def test_every_coarser_token_goes_on_behind_each_of_its_cuts_and_ends_behind_itself(coarse, fine, from_right):
    vocabulary_map = VocabularyMap(coarse, fine, TableTokenizer(fine, from_right))
    for r, piece in enumerate(coarse.pieces):
        parts = _cut(piece, fine, TableTokenizer(fine, from_right)) if piece else []
        for count in range(1, len(parts)):
            prefix = b"".join(fine.pieces[u] for u in parts[:count])
            outcomes = vocabulary_map.after_prefix(prefix)
            (outcome,) = outcomes.coarse_classes[outcomes.coarse_tokens == r]
            assert outcome in outcomes.fine_classes[outcomes.fine_tokens == parts[count]]
        outcomes = vocabulary_map.after_prefix(piece)
        if outcomes and coarse.pieces.count(piece) == 1:
            assert outcomes.coarse_classes[outcomes.coarse_tokens == r].tolist() == [outcomes.num_classes - 1]


@settings(max_examples=100, deadline=None)
@given(table=tables(), from_right=st.booleans())
def test_equal_vocabularies_give_the_identity_on_all_ids(table, from_right):
    found = VocabularyMap(table, table, TableTokenizer(table, from_right)).at_common_boundary()
    assert set(_joint(found).values()) == {(frozenset([i]), frozenset([i])) for i in range(len(table.pieces))}
    vocabulary_map = VocabularyMap(table, table, TableTokenizer(table, from_right))
    assert all(vocabulary_map.after_prefix(prefix) is None for prefix in [*_prefixes(table), *table.pieces])


@settings(max_examples=100, deadline=None)
@given(coarse=tables(), fine=tables(), from_right=st.booleans(), data=st.data())
def test_permuting_the_poorer_ids_permutes_the_outcomes_and_nothing_else(coarse, fine, from_right, data):
    order = data.draw(st.permutations(range(len(fine.pieces))))
    new_id = {old: new for new, old in enumerate(order)}
    start = "<s>" if "<s>" in fine.strings else "</s>"
    permuted = token_table([fine.strings[i] for i in order], start, fine.dummy_prefix)
    one = VocabularyMap(coarse, fine, TableTokenizer(fine, from_right))
    other = VocabularyMap(coarse, permuted, TableTokenizer(permuted, from_right))
    for (prefix, before), (same, after) in zip(_every(one, coarse), _every(other, coarse), strict=True):
        expected = {(a, frozenset(new_id[u] for u in b)) for a, b in _joint(before).values()}
        assert set(_joint(after).values()) == expected
        assert prefix == same


# Hand examples


def _outcomes_of(coarse: TokenTable, fine: TokenTable, outcomes: ClassTable) -> set[tuple[str, str]]:
    """Each outcome as its coarser and its finer tokens, spelled and joined by '|'."""
    return {
        ("|".join(sorted(coarse.strings[r] for r in a)), "|".join(sorted(fine.strings[u] for u in b)))
        for a, b in _joint(outcomes).values()
    }


def test_hand_example_of_words_and_their_letters():
    coarse, fine = token_table(["</s>", "t", "h", "e", "th", "the"]), token_table(["</s>", "h", "t", "e", "he"])
    vocabulary_map = VocabularyMap(coarse, fine, TableTokenizer(fine))
    open_ = {("</s>", "</s>"), ("t|th|the", "t"), ("h", "h|he"), ("e", "e")}
    assert _outcomes_of(coarse, fine, vocabulary_map.at_common_boundary()) == open_
    assert _outcomes_of(coarse, fine, vocabulary_map.after_prefix(b"t")) == {("th", "h"), ("the", "he"), ("t", "")}
    assert vocabulary_map.after_prefix(b"th") is None  # the is cut t|he
    assert vocabulary_map.after_prefix(b"the") is None
    assert vocabulary_map.after_prefix(b"x") is None


@pytest.mark.parametrize(("lone", "place"), [("1969", "19"), ("    ", "  "), ("12", "1"), ("  \n", "  ")])
def test_a_token_that_only_the_poorer_has_shares_the_place_of_the_longest_that_starts_it(lone, place):
    coarse = token_table(["</s>", *"1269 \na", "19", "  ", "a1"])
    fine = token_table(["</s>", *"1269 \na", "19", "  ", "12", "1969", "    ", "  \n"])
    outcomes = _outcomes_of(coarse, fine, VocabularyMap(coarse, fine, TableTokenizer(fine)).at_common_boundary())
    (found,) = [(a, b) for a, b in outcomes if lone in b.split("|")]
    assert place in found[0].split("|")
    assert place in found[1].split("|")


def test_a_number_that_only_the_poorer_has_shares_a_place_inside_a_coarser_token_too():
    coarse, fine = token_table(["</s>", *"12a", "a1"]), token_table(["</s>", *"12a", "12"])
    behind = VocabularyMap(coarse, fine, TableTokenizer(fine)).after_prefix(b"a")
    assert _outcomes_of(coarse, fine, behind) == {("a1", "1|12"), ("a", "")}


def test_a_prefix_that_no_coarser_token_spells_cannot_be_an_end():
    coarse, fine = token_table(["</s>", *"abc", "abc"]), token_table(["</s>", *"abc", "ab"])
    outcomes = VocabularyMap(coarse, fine, TableTokenizer(fine)).after_prefix(b"ab")
    assert _outcomes_of(coarse, fine, outcomes) == {("abc", "c"), ("", "")}
    assert not outcomes.can_end
    assert outcomes.num_classes == 2


def test_a_poorer_token_shares_the_place_of_an_ordinary_token_and_not_of_its_byte_token():
    # Gemma's kind: the byte tokens come behind the ordinary newline. What says nothing would share nothing.
    strings = ["</s>", "\n", "a", "<0x0A>"]
    for order in (strings, strings[::-1]):
        coarse, fine = token_table(order), token_table(["</s>", "<0x0A>", "\n", "a", "\n\n"])
        found = _outcomes_of(coarse, fine, VocabularyMap(coarse, fine, TableTokenizer(fine)).at_common_boundary())
        assert found == {("</s>", "</s>"), ("\n", "\n|\n\n"), ("<0x0A>", "<0x0A>"), ("a", "a")}


def test_the_poorer_tokenizers_own_cut_counts_and_not_the_longest_token():
    coarse, fine = (
        token_table(["</s>", *"abcd", "abcd", "xabcd", "x"]),
        token_table(["</s>", *"abcdx", "abc", "cd", "ab", "bcd"]),
    )
    from_right = VocabularyMap(coarse, fine, TableTokenizer(fine, from_right=True))  # a|bcd
    assert ("a|abcd", "a|ab|abc") in _outcomes_of(coarse, fine, from_right.at_common_boundary())
    assert _outcomes_of(coarse, fine, from_right.after_prefix(b"x")) == {("xabcd", "a"), ("x", "")}
    assert _outcomes_of(coarse, fine, from_right.after_prefix(b"xa")) == {("xabcd", "bcd"), ("", "")}
    from_left = VocabularyMap(coarse, fine, TableTokenizer(fine))  # abc|d
    assert ("abcd", "abc") in _outcomes_of(coarse, fine, from_left.at_common_boundary())
    assert _outcomes_of(coarse, fine, from_left.after_prefix(b"x")) == {("xabcd", "abc"), ("x", "")}
    assert from_left.after_prefix(b"xa") is None


def test_the_longest_token_counts_where_the_bytes_are_no_text():
    # The first byte of a character behind another one; from the right the finer would cut a|bXc3, if it could.
    coarse, fine = (
        token_table(["</s>", "<0xC3>", *"ab", "<0x61>"]),
        token_table(["</s>", "<0xC3>", "<0xA9>", *"ab", "ab"]),
    )
    coarse.pieces[-1], fine.pieces[2] = b"ab\xc3", b"b\xc3"
    found = _outcomes_of(
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
        assert _outcomes_of(coarse, fine, vocabulary_map.at_common_boundary()) == {
            ("</s>", "</s>"),
            ("a|ab", "a"),
            ("b", "b"),
        }
        assert _outcomes_of(coarse, fine, vocabulary_map.after_prefix(b"a")) == {("ab", "b"), ("a", "")}


def test_a_newline_that_the_coarser_has_as_a_byte_token_only_is_the_poorers_ordinary_newline():
    # Llama 2 has no token "\n" but "<0x0A>"; many others have both, and write the first.
    coarse, fine = token_table(["</s>", "<0x0A>", "a", "b"]), token_table(["</s>", "\n", "a", "b", "<0x0A>"])
    outcomes = _joint(VocabularyMap(coarse, fine, TableTokenizer(fine)).at_common_boundary())
    (found,) = [(a, b) for a, b in outcomes.values() if fine.strings.index("\n") in b]
    assert found[0] == {coarse.strings.index("<0x0A>")}
    assert found[1] <= {fine.strings.index("\n"), fine.strings.index("<0x0A>")}


def test_tokens_without_bytes_meet_by_their_spelling_and_ends_and_starts_by_their_part():
    coarse = token_table(["</s>", "a", "<s>", "<pad>", "<only>"], "<s>")
    fine = token_table(["<pad>", "a", "</s>", "<other>"])
    found = _outcomes_of(coarse, fine, VocabularyMap(coarse, fine, TableTokenizer(fine)).at_common_boundary())
    assert found == {("</s>|<s>", "</s>"), ("a", "a"), ("<pad>", "<pad>")}
    back = _outcomes_of(fine, coarse, VocabularyMap(fine, coarse, TableTokenizer(coarse)).at_common_boundary())
    assert back == {("</s>", "</s>"), ("a", "a"), ("<pad>", "<pad>")}


def test_rows_of_a_head_without_a_token_take_no_part(sp_tokenizer, byte_tokenizer):
    coarse = build_token_table(byte_tokenizer, len(byte_tokenizer) + 8)
    fine = build_token_table(sp_tokenizer, len(sp_tokenizer) + 8)
    outcomes = VocabularyMap(coarse, fine, sp_tokenizer).at_common_boundary()
    assert outcomes.coarse_tokens.max() < len(byte_tokenizer)
    assert outcomes.fine_tokens.max() < len(sp_tokenizer)


# Tokenizers that were trained


@pytest.fixture(scope="module")
def tokenizers(byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer):
    return dict(zip(KINDS, (byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer), strict=True))


@pytest.fixture(scope="module")
def token_tables(tokenizers):
    return {kind: build_token_table(tokenizer, len(tokenizer)) for kind, tokenizer in tokenizers.items()}


@pytest.fixture(scope="module")
def contacts(tokenizers, token_tables, corpus_texts):
    """contacts(coarse, fine): coarser token, its written bytes and the finer token that starts there in the corpus."""

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
            met = find_boundaries(*ends)
            begins = met.teacher_prefix_length == 0
            columns = ids[0][met.student[begins]], met.student_prefix_length[begins], ids[1][met.teacher[begins]]
            found.append(np.stack(columns))
        return list(np.concatenate(found, axis=1))

    return find


@pytest.mark.parametrize("names", BOTH_WAYS)
def test_open_outcomes_of_trained_tokenizers_are_those_of_the_definition(tokenizers, token_tables, names):
    coarse, fine = (token_tables[name] for name in names)
    found = VocabularyMap(coarse, fine, tokenizers[names[1]]).at_common_boundary()
    assert set(_joint(found).values()) == _expected(coarse, fine, _cuts(coarse, fine, tokenizers[names[1]]), b"")


@pytest.mark.parametrize("names", BOTH_WAYS)
def test_outcomes_behind_trained_tokens_are_those_of_the_definition(tokenizers, token_tables, names):
    coarse, fine = (token_tables[name] for name in names)
    vocabulary_map = VocabularyMap(coarse, fine, tokenizers[names[1]])
    cuts = _cuts(coarse, fine, tokenizers[names[1]])
    for prefix in _prefixes(coarse):
        outcomes = vocabulary_map.after_prefix(prefix)
        assert (outcomes is None) == (prefix not in cuts)
    picked = np.random.default_rng(0).permutation(len(cuts))[:60]
    for prefix in (sorted(cuts)[i] for i in picked):
        if prefix:
            found = vocabulary_map.after_prefix(prefix)
            assert set(_joint(found).values()) == _expected(coarse, fine, cuts, prefix), prefix


def _corrected(coarse: TokenTable, cuts: dict, met: list) -> tuple[dict, set]:
    """The cuts as the text corrects them, and the groups of finer tokens that it shows to be one outcome.

    met: coarser token, its written bytes and the finer token that starts there, in the text
    """
    seen = defaultdict(Counter)
    for r, written, u in sorted(met):
        if r in cuts.get(coarse.pieces[r][:written], ()):
            seen[coarse.pieces[r][:written], r][u] += 1
    corrected, stands_for = {prefix: dict(begins) for prefix, begins in cuts.items()}, defaultdict(Counter)
    for (prefix, r), counts in seen.items():
        u, count = counts.most_common(1)[0]
        total = sum(counts.values())
        if total >= 3 and 2 * count > total:
            corrected[prefix][r] = u
        for u, count in counts.items():
            stands_for[u][corrected[prefix][r]] += count
    groups = defaultdict(set)
    for u, counts in stands_for.items():
        other, count = counts.most_common(1)[0]
        if other != u and count >= 3 and 2 * count >= sum(counts.values()):
            joined = {u, other} | groups[u] | groups[other]
            groups |= dict.fromkeys(joined, joined)
    return corrected, {frozenset(group) for group in groups.values() if group}


@pytest.mark.parametrize("names", BOTH_WAYS)
def test_outcomes_that_a_corpus_taught_are_those_of_the_definition(tokenizers, token_tables, contacts, names):
    coarse, fine = (token_tables[name] for name in names)
    vocabulary_map, cuts = VocabularyMap(coarse, fine, tokenizers[names[1]]), _cuts(coarse, fine, tokenizers[names[1]])
    met = contacts(*names)
    vocabulary_map.fit_(*met)
    cuts, same = _corrected(coarse, cuts, np.stack(met).T.tolist())
    assert set(_joint(vocabulary_map.at_common_boundary()).values()) == _expected(coarse, fine, cuts, b"", same)
    for prefix in [*(prefix for prefix in sorted(cuts) if prefix)][::10]:
        found = set(_joint(vocabulary_map.after_prefix(prefix)).values())
        assert found == _expected(coarse, fine, cuts, prefix, same), prefix
    if names == ("byte", "sp"):
        assert cuts != _cuts(coarse, fine, tokenizers[names[1]]), "nothing was learned, so nothing is tested"


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_tokenizer_maps_every_id_to_itself_and_learns_nothing(tokenizers, token_tables, contacts, kind):
    table = token_tables[kind]
    vocabulary_map = VocabularyMap(table, table, tokenizers[kind])
    vocabulary_map.fit_(*contacts(kind, kind))
    identity = {(frozenset([i]), frozenset([i])) for i in range(len(tokenizers[kind]))}
    assert set(_joint(vocabulary_map.at_common_boundary()).values()) == identity


# Learning from text

LEARNERS = token_table(["</s>", *"abc ", "ab", "  "]), token_table(["</s>", *"abc ", "ab", "  "])


def _taught(*lessons: tuple[str, int, str, int], tables=LEARNERS) -> set[tuple[str, str]]:
    """The open outcomes after a text with these lessons: coarser token, written bytes, finer token, how often."""
    coarse, fine = tables
    vocabulary_map = VocabularyMap(coarse, fine, TableTokenizer(fine))
    met = [
        (coarse.strings.index(a), written, fine.strings.index(b))
        for a, written, b, count in lessons
        for _ in range(count)
    ]
    vocabulary_map.fit_(*np.array(met, dtype=np.int64).reshape(-1, 3).T)
    return _outcomes_of(coarse, fine, vocabulary_map.at_common_boundary())


IDENTITY = {(string, string) for string in LEARNERS[0].strings}
JOINED = IDENTITY - {("ab", "ab"), ("a", "a")} | {("a|ab", "a|ab")}


def test_without_text_nothing_is_joined():
    assert _taught() == IDENTITY


@pytest.mark.parametrize(
    ("strange", "usual", "corrects"),
    [(50, 0, True), (3, 0, True), (2, 0, False), (3, 2, True), (3, 3, False), (9, 8, True), (8, 9, False)],
)
def test_a_coarser_token_goes_on_as_it_mostly_does_in_the_text(strange, usual, corrects):
    taught = _taught(("ab", 0, "a", strange), ("ab", 0, "ab", usual), ("a", 0, "a", 50))
    assert taught == (JOINED if corrects else IDENTITY)


@pytest.mark.parametrize(
    ("strange", "usual", "joins"), [(3, 0, True), (2, 0, False), (4, 3, True), (3, 4, False), (9, 8, True)]
)
def test_a_poorer_token_that_mostly_stands_where_another_is_expected_shares_its_outcome(strange, usual, joins):
    # Of all "a" that the coarser side says, the finer says "ab" for a few; of all "ab", those are the most.
    taught = _taught(("a", 0, "ab", strange), ("a", 0, "a", 150), ("ab", 0, "ab", usual))
    assert taught == (JOINED if joins else IDENTITY)


def test_joining_is_transitive():
    # One order of ids and the other: who stands for whom is learned first or last.
    taught = _taught(("a", 0, "ab", 5), ("a", 0, "a", 6), ("c", 0, "a", 20), ("c", 0, "c", 30))
    assert taught == IDENTITY - {(x, x) for x in ("a", "ab", "c")} | {("a|ab|c", "a|ab|c")}
    taught = _taught(("ab", 0, "a", 5), ("ab", 0, "ab", 6), ("  ", 0, "ab", 20), ("  ", 0, "  ", 30))
    assert taught == IDENTITY - {(x, x) for x in ("a", "ab", "  ")} | {("  |a|ab", "  |a|ab")}


def test_what_the_text_corrects_is_expected_no_longer():
    # "ab" is always said as "a", which so stands where it is expected, and joins nothing.
    taught = _taught(("ab", 0, "a", 50), ("a", 0, "c", 2), ("c", 0, "c", 9))
    assert ("a|ab", "a|ab") in taught
    assert ("c", "c") in taught


def test_what_is_learned_inside_a_token_counts_inside_and_outside():
    coarse, fine = token_table(["</s>", *"abc", "cab", "ca"]), token_table(["</s>", *"abc", "ab"])
    vocabulary_map = VocabularyMap(coarse, fine, TableTokenizer(fine))
    apart = {("cab", "ab"), ("ca", "a"), ("c", "")}
    assert _outcomes_of(coarse, fine, vocabulary_map.after_prefix(b"c")) == apart
    taught = VocabularyMap(coarse, fine, TableTokenizer(fine))
    lesson = coarse.strings.index("cab"), 1, fine.strings.index("a")
    taught.fit_(*np.array([lesson] * 5).T)
    assert _outcomes_of(coarse, fine, taught.after_prefix(b"c")) == {("ca|cab", "a|ab"), ("c", "")}
    assert ("a", "a|ab") in _outcomes_of(coarse, fine, taught.at_common_boundary())


def test_where_a_token_is_not_cut_there_is_nothing_to_learn():
    assert _taught(("ab", 1, " ", 50)) == IDENTITY


def test_tokens_without_bytes_teach_nothing():
    assert _taught(("</s>", 0, "a", 50), ("a", 0, "</s>", 50), ("a", 1, "ab", 50)) == IDENTITY


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
