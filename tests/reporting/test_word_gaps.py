"""The words on which student and teacher differ most: ranked by all of their nats, and shown as a table and a chart."""

import dataclasses
import json
import math
import re
import types

import numpy as np
import pytest

from sar_kd.reporting import report
from sar_kd.reporting.charts import build_word_chart
from sar_kd.reporting.held_out import FILE, HeldOut, WordLosses, read_held_out
from sar_kd.reporting.word_gaps import largest_gaps

NAMES = ["the", "<b>", "$x_1$", "of", "\u5b66", "end"]
COUNTS = np.array([10, 4, 5, 8, 3, 6])
NATS = {
    "start": np.array([30.0, 20.0, 9.0, 8.0, 9.0, 6.0]),
    "best": np.array([25.0, 12.0, 5.0, 8.0, 6.0, 1.0]),
    "teacher": np.array([15.0, 16.0, 5.0, 2.0, math.nan, 0.5]),
}


def _held_out(nats=NATS, names=NAMES, counts=COUNTS, num_bytes=100):
    own = WordLosses(names, counts, num_bytes, nats)
    return HeldOut("text", "tokenizer", "blocks", ["a"], np.array([100]), {"best": np.array([80.0])}, own)


def test_the_words_are_ranked_by_the_nats_of_all_occurrences():
    gaps = largest_gaps(_held_out())
    assert [(word.word, word.gap) for word in gaps.behind] == [("the", 10.0), ("of", 6.0), ("end", 0.5)]
    assert [(word.word, word.gap) for word in gaps.ahead] == [("<b>", -4.0)]
    assert (gaps.num_words, gaps.num_nonfinite, gaps.gap) == (5, 1, 12.5)
    assert gaps.header == ("word", "times", "start", "best student", "teacher", "student - teacher", "on all")
    assert gaps.behind[0].cells() == ("the", "10", "3.00", "2.50", "1.50", "+1.00", "+10.0")


def test_a_control_of_the_same_words_is_a_column_and_of_others_is_none():
    control = _held_out({"start": NATS["start"], "best": NATS["best"] + 1})
    gaps = largest_gaps(_held_out(), control)
    assert gaps.behind[0].cells() == ("the", "10", "3.00", "2.60", "2.50", "1.50", "+1.00", "+10.0")
    other = dataclasses.replace(control, words=dataclasses.replace(control.words, counts=COUNTS + 1))
    assert "control" not in largest_gaps(_held_out(), other).header


@pytest.mark.parametrize("nats", [{"best": NATS["best"]}, {**NATS, "teacher": NATS["best"]}, {}])
def test_nothing_is_shown_where_a_model_was_not_measured_or_none_differs(nats):
    assert largest_gaps(_held_out(nats)) is None
    assert largest_gaps(dataclasses.replace(_held_out(), words=None)) is None


def test_of_many_words_those_with_the_largest_gaps_are_shown_and_long_ones_are_cut():
    count = 60
    best = np.arange(count, dtype=float)
    names = [f"{'w' * 40}{i}" if i == 59 else f"w{i}" for i in range(count)]
    gaps = largest_gaps(_held_out({"best": best, "teacher": np.full(count, 29.5)}, names, np.full(count, 3)))
    assert [word.word for word in gaps.behind] == ["w" * 21 + "...", *(f"w{i}" for i in range(58, 44, -1))]
    assert [word.word for word in gaps.ahead] == [f"w{i}" for i in range(10)]


def test_the_file_keeps_the_words_and_one_of_lists_that_differ_in_length_is_refused(tmp_path):
    _held_out().write(tmp_path)
    found = read_held_out(tmp_path).words
    assert (found.words, found.counts.tolist(), found.num_bytes) == (NAMES, COUNTS.tolist(), 100)
    for model, values in NATS.items():
        np.testing.assert_array_equal(found.nats[model], values)
    content = json.loads((tmp_path / FILE).read_text())
    content["words"]["counts"] = [1]
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(report.UsageError, match="differ in length"):
        read_held_out(tmp_path)


@pytest.mark.filterwarnings("error")
def test_the_chart_has_a_bar_and_a_name_for_each_word_whatever_its_letters():
    pytest.importorskip("matplotlib")
    names = [*NAMES[:4], "\u5b66\u0915\u094d", "end"]
    nats = {**NATS, "teacher": np.where(np.isnan(NATS["teacher"]), 1.0, NATS["teacher"])}
    chart = build_word_chart(largest_gaps(_held_out(nats, names)))
    labels = re.findall(r"<text[^>]*>(.*?)</text>", chart.svg)
    for name in ("the", "&lt;b&gt;", "of", "\u5b66\u0915\u094d", "end", "worse", "better"):
        assert name in labels
    assert chart.title == "Nats beyond the teacher's"
    assert "left of 0" in chart.caption


def test_the_page_has_the_words_folded_with_the_part_of_the_text_that_was_read(tmp_path):
    pytest.importorskip("matplotlib")
    _held_out(num_bytes=90).write(tmp_path)
    values = report._words_of(types.SimpleNamespace(folder=tmp_path, control=None))
    assert values["words_read"].startswith(" in the first ")
    assert "5 such words the student loses 12 nats more" in values["words_line"]
    assert "1 more left out" in values["words_line"]
    assert [rows[0][0] for _, rows in values["words"]] == ["the", "<b>"]
    _held_out(num_bytes=100).write(tmp_path)
    assert report._words_of(types.SimpleNamespace(folder=tmp_path, control=None))["words_read"] == ""
