"""The lines of a running training, from records written by hand."""

import ast
import math

import pytest

from sar_kd.reporting.step_lines import Pace, dropped_share, evaluation_line, fit, sft_line, start_line, step_parts
from sar_kd.runtime.console import count_of, format_clock, format_duration

PACE = Pace(50, 1000, 0.98, 5286.4, 31.4, 3724.0)


def _record(**metrics):
    known = {"loss": 4.0, "ce_loss": 4.25, "kd_loss": 2.5, "grad_norm": 1.0, "learning_rate": 9.5e-4}
    return known | {"num_target_tokens": 9, "epoch": 0.125} | metrics


def test_a_line_has_means_of_the_finite_losses_and_the_pace():
    records = [_record(), _record(loss=5.0, kd_loss=3.5, grad_norm=2.0), _record(loss=math.nan, grad_norm=math.inf)]
    assert step_parts(records, PACE) == [
        "Step 50: avg_loss=4.5000 (kd=3.0000, ce=4.2500) not_finite=1",
        "lr=9.5e-04 grad_norm=1.50",
        "success_rate=98%",
        "5,286 tokens/s",
        "5% in 0:31, 1:02:04 left",
    ]


def test_a_line_without_a_finite_loss_or_a_cross_entropy_is_still_a_line():
    (first, *_) = step_parts([_record(loss=math.nan, grad_norm=math.nan)], PACE)
    assert first == "Step 50: avg_loss=nan (kd=nan, ce=nan) not_finite=1"
    (first, *_) = step_parts([_record(ce_loss=None, router_kl=0.5)], PACE)
    assert first == "Step 50: avg_loss=4.0000 (kd=2.5000) router_kl=0.5000"


def test_the_share_of_the_teacher_that_was_left_out_is_shown_unless_it_is_0():
    def first(*counts):
        records = [_record(teacher_rows_dropped=dropped, teacher_positions=of) for dropped, of in counts]
        return step_parts(records, PACE)[0]

    plain = "Step 50: avg_loss=4.0000 (kd=2.5000, ce=4.2500)"
    assert first((0, 100), (0, 0)) == plain
    assert first((30, 100), (0, 300)) == f"{plain} teacher_dropped=7.5%"
    assert first((1, 100_000)) == f"{plain} teacher_dropped=<0.1%"
    assert first((99_999, 100_000)) == f"{plain} teacher_dropped=>99.9%"
    assert first((100, 100)) == f"{plain} teacher_dropped=100.0%"


def test_a_log_that_did_not_count_the_positions_is_read_by_its_targets():
    assert dropped_share([{"teacher_rows_dropped": 254, "num_target_tokens": 254}] * 2) == 1.0
    assert dropped_share([{"teacher_rows_dropped": 300, "num_target_tokens": 254}]) == 1.0
    assert dropped_share([{"teacher_rows_dropped": "x", "teacher_positions": 3}, {}]) == 0.0


@pytest.mark.parametrize(
    ("columns", "expected"), [(3, "one"), (8, "one two"), (7, "one"), (13, "one two"), (99, "one two three")]
)
def test_parts_are_shown_whole_or_not_at_all(columns, expected):
    assert fit(["one", "two", "three"], columns) == expected


def test_fine_tuning_has_a_dict_that_python_reads():
    found = ast.literal_eval(sft_line([_record(loss=2.0), _record(loss=3.0, grad_norm=1.55555)], PACE))
    assert found == {
        "loss": 2.5, "grad_norm": 1.556, "learning_rate": 9.5e-4, "epoch": 0.12, "step": "50/1000",
        "tokens_per_second": 5286, "elapsed": "0:31", "left": "1:02:04",
    }  # fmt: skip


def test_the_teachers_perplexity_stands_beside_the_students_only_where_their_tokens_are_the_same():
    own, teacher = {"val_ppl": 71.0, "val_bits_per_byte": 2.5}, {"val_ppl": 41.0, "val_bits_per_byte": 1.75}
    begin = "Start: Validation PPL = 71.00, bits per byte 2.5000"
    assert start_line(own, {}, True) == begin
    assert start_line(own, teacher, False) == begin + "; teacher: 1.7500"
    assert start_line(own, teacher, True) == begin + "; teacher: 41.00, 1.7500"
    bad = own | {"val_bits_per_byte": math.nan, "val_nonfinite": 0.3}
    assert start_line(own, bad, False) == f"{begin}; teacher: nan (not finite at 30.0% of the text)"
    assert "bits per byte nan (not finite at 30.0% of the text)" in evaluation_line({"step": 5, **bad}, False, True)
    assert "(masked at 0.1% of the text)" in evaluation_line({"step": 5, **own, "val_masked": 0.001}, False, True)
    record = {"step": 5, **own, "router_entropy": 0.5, "teacher_val_ppl_native": 41.0, "teacher_val_ppl_routed": 42.0}
    line = evaluation_line(record, True, False)
    assert "; teacher PPL 41.00, 42.00 with every expert in its own tokens, router entropy 0.500" in line
    assert line.endswith(" (best so far)")


def test_numbers_are_written_for_people():
    assert [count_of(n, "line") for n in (0, 1, 2, 1234)] == ["0 lines", "1 line", "2 lines", "1,234 lines"]
    assert [format_clock(s) for s in (0, 59.9, 61, 3725)] == ["0:00", "0:59", "1:01", "1:02:05"]
    assert [format_duration(s) for s in (12, 184, 18360)] == ["12 s", "3 min 04 s", "5 h 06 min"]
