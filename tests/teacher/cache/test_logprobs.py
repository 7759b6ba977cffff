"""Answers of servers as records: tokens are found by their bytes, and no number is made up."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from sar_kd.teacher.cache.logprobs import (
    Answer,
    BadAnswer,
    RecordReader,
    count_lines,
    num_given,
    read_completion,
    read_prompt_logprobs,
)
from sar_kd.tokenization.token_table import build_token_table

TEXT = "Words, words; caf\u00e9 \u65e5\u672c 42"


@pytest.fixture(scope="module")
def readers(byte_tokenizer, sp_tokenizer):
    """RecordReader of k tokens, by the name of the tokenizer."""

    def make(name, k=4):
        tokenizer = {"byte": byte_tokenizer, "sp": sp_tokenizer}[name]
        size = len(tokenizer)
        metadata = {"teacher_top_k": k, "num_tokens": size, "keep": "topk", "temperatures": [1.0]}
        ids = tokenizer(TEXT, add_special_tokens=False).input_ids
        return RecordReader(metadata, build_token_table(tokenizer, size)), ids, tokenizer

    return make


def _rows(ids, size, seed=0):
    """float64 [tokens, V]: log-probabilities of some distributions."""
    logits = torch.randn(len(ids), size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * logits).log_softmax(-1).numpy()


def _answer(ids, rows, k, tokens=None):
    tops = [[], *([(int(i), float(row[i])) for i in np.argsort(-row)[:k]] for row in rows[1:])]
    return Answer(list(tokens or ids), [None, *(float(row[i]) for row, i in zip(rows[1:], ids[1:], strict=True))], tops)


def test_a_record_holds_the_top_k_and_the_mass_of_all_others(readers):
    reader, ids, tokenizer = readers("byte")
    ids, counts = [tokenizer.eos_token_id, *ids], Counter()
    rows = _rows(ids, len(tokenizer))
    records = reader.records(_answer(ids, rows, 6), ids, [False] + [True] * (len(ids) - 1), counts)
    for record, row, token in zip(records, rows[1:], ids[1:], strict=True):
        order = np.argsort(-row)[:4]
        assert record["ids"].tolist() == order.tolist()
        assert record["target_log_prob"] == np.float32(row[token])
        assert record["max_log_prob"] == np.float32(row[order[0]])
        assert np.allclose(record["log_prob_gaps"], row[order] - row[order[0]], rtol=1e-3)
        inside, outside = np.exp(row[order]).sum(), np.exp(np.delete(row, order)).sum()
        assert np.allclose(record["tail_log_ratios"], math.log(outside / inside), atol=1e-3)
    assert not +counts


def test_a_mass_that_rounding_hides_is_stored_as_the_smallest_one_and_counted(readers):
    reader, ids, _ = readers("byte", k=2)
    counts = Counter()
    top = [(ids[1], -1e-8), (ids[0], -20.0)]
    (record,) = reader.records(Answer(ids[:2], [None, -1e-8], [[], top]), ids[:2], [False, True], counts)
    assert np.allclose(record["tail_log_ratios"], math.log(1e-6), atol=1e-2)
    assert counts == {"small_tail": 1}
    assert "below 1e-06, and stored as that, at 1 of 9 tokens" in count_lines(counts, 9)[0]


@pytest.mark.parametrize("sum_", [1.5, 1.01])
def test_probabilities_above_one_are_refused(readers, sum_):
    reader, ids, _ = readers("byte", k=2)
    top = [(ids[1], math.log(sum_ / 2)), (ids[0], math.log(sum_ / 2))]
    with pytest.raises(BadAnswer, match="probabilities with the sum 1"):
        reader.records(Answer(ids[:2], [None, top[0][1]], [[], top]), ids[:2], [False, True], Counter())


@pytest.mark.parametrize("name", ["byte", "sp"])
@pytest.mark.parametrize("how", ["replace", "ignore"])
def test_a_token_is_found_under_each_name_that_servers_give_it(readers, name, how):
    reader, ids, _ = readers(name)
    names = [reader.table.pieces[i].decode(errors=how) for i in ids]
    assert any(not token.isascii() or not token for token in names)  # a part of a character
    assert reader.find_tokens(names, ids) == list(range(len(ids)))
    by_bytes = ["bytes:" + "".join(f"\\x{byte:02x}" for byte in reader.table.pieces[i]) for i in ids]
    assert reader.find_tokens(by_bytes, ids) == list(range(len(ids)))
    assert reader.find_tokens([f"{n}" for n in names] + [" and", " on"], ids) == list(range(len(ids)))


def test_special_tokens_that_one_side_lacks_are_left_out(readers):
    reader, ids, tokenizer = readers("sp")
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    whole = [start, *ids, end, *ids, end]
    n = len(ids)
    assert reader.find_tokens(whole, whole) == list(range(len(whole)))
    assert reader.find_tokens([start, start, *ids, end, *ids, end], whole) == [0, *range(2, len(whole) + 1)]
    assert reader.find_tokens([*ids, *ids], whole) == [-1, *range(n), -1, *range(n, 2 * n), -1]
    names = ["<s>", *(reader.table.pieces[i].decode(errors="replace") for i in ids), "</s>"]
    assert reader.find_tokens(names, [*ids, end]) == list(range(1, n + 2))


def test_where_other_tokens_are_read_there_is_no_record_and_behind_them_there_are(readers):
    reader, ids, tokenizer = readers("byte")
    word = next(i for i, token in enumerate(ids) if len(reader.table.pieces[token]) == 2)
    letters = [tokenizer(chr(byte), add_special_tokens=False).input_ids[0] for byte in reader.table.pieces[ids[word]]]
    found = reader.find_tokens([*ids[:word], *letters, *ids[word + 1 :]], ids)
    assert found == [*range(word), -1, *range(word + 2, len(ids) + 1)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ids: ids[:-1], "ends after"),
        (lambda ids: [*ids[:3], ids[0], *ids[4:]], "where the text goes on with"),
        (lambda ids: ids[1:], "where the text goes on with"),
        (lambda ids: ["other", *ids[1:]], "has 'other' where the text goes on with 'Words, words"),
    ],
)
def test_another_text_is_refused_with_the_place(readers, change, reason):
    reader, ids, _ = readers("byte")
    with pytest.raises(BadAnswer, match=reason):
        reader.find_tokens(change(ids), ids)


def test_a_position_is_cut_where_a_token_of_the_top_k_has_no_name_of_its_own(readers):
    reader, _, tokenizer = readers("byte", k=2)
    ids = tokenizer(" a b", add_special_tokens=False).input_ids
    names = [reader.table.pieces[i].decode() for i in ids]
    for other, is_known in ((",", True), ("\ufffd", False), ("", False), ("no such token", False)):
        counts, top = Counter(), [(names[1], -0.5), (other, -1.0), (";", -9.0)]
        (record,) = reader.records(Answer(names, [None, -0.5], [[], top]), ids, [False, True], counts)
        assert record["target_log_prob"] == np.float32(-0.5)
        assert np.isfinite(record["max_log_prob"]) == is_known
        assert counts["cut"] == (not is_known)
    # Of two entries the second is the text's own: the second most likely may have shared a name and be lost.
    counts = Counter()
    reader.records(Answer(names, [None, -3.0], [[], [(",", -0.5), (names[1], -3.0)]]), ids, [False, True], counts)
    assert counts["cut"] == 1


def test_padding_of_the_head_and_masked_tokens_are_among_the_others(readers):
    reader, ids, tokenizer = readers("byte", k=2)
    top = [(len(tokenizer) + 3, math.log(0.3)), (ids[1], math.log(0.4)), (ids[0], math.log(0.1)), (5, -math.inf)]
    answer = read_completion({
        "tokens": [f"token_id:{i}" for i in ids[:2]],
        "token_logprobs": [None, math.log(0.4)],
        "top_logprobs": [None, {f"token_id:{i}": value for i, value in top[:3]} | {"token_id:5": -9999.0}],
    })  # fmt: skip
    (record,) = reader.records(answer, ids[:2], [False, True], Counter())
    assert record["ids"].tolist() == [ids[1], ids[0]]
    assert np.allclose(record["tail_log_ratios"], 0.0, atol=1e-3)  # 0.5 and 0.5


def test_vllms_form_is_read_with_and_without_the_tokens_beside_it():
    entry = {"7": {"logprob": -2.0, "rank": 3, "decoded_token": "a"}, "5": {"logprob": -0.5, "rank": 1}, "6": -1.0}
    for ids in (None, [4, 7]):
        answer = read_prompt_logprobs([None, entry], ids)
        assert answer.tokens == [None if ids is None else 4, 7]
        assert answer.log_probs == [None, -2.0]
        assert answer.tops == [[], [(5, -0.5), (6, -1.0), (7, -2.0)]]
        assert num_given(answer) == 2


@pytest.mark.parametrize("value", [0.5, float("nan"), True, "-1", None])
def test_what_is_no_log_probability_is_refused(value):
    with pytest.raises(BadAnswer, match="is no log-probability"):
        read_prompt_logprobs([None, {"7": {"logprob": value}}])


def test_two_log_probabilities_of_one_token_are_refused(readers):
    reader, ids, _ = readers("byte", k=1)
    with pytest.raises(BadAnswer, match="two log-probabilities"):
        reader.records(Answer(ids[:2], [None, -1.0], [[], [(ids[1], -0.5)]]), ids[:2], [False, True], Counter())


def test_why_records_are_missing_is_told(readers):
    (line,) = count_lines({"first": 2, "cut": 1}, 1000)
    assert line.startswith("Warning: no log-probabilities, so a student learns these from the text alone: 2 of 1,000")
    assert count_lines({}, 1000) == []
