"""The table of results at the end of a run: aligned, on 80 columns."""

import math
from pathlib import Path

import pytest

from sar_kd.reporting.summary_table import summary_table

SCORE = {"accuracy": 0.125, "answer_rate": 1.0}
SUMMARY = {
    "status": "finished", "steps": 12345, "wall_seconds": 75.0, "tokens_per_second": 12345.6, "skipped": {"norm": 2},
    "applied": 12343, "success_rate": 0.99, "loss_scale_final": 16384.0, "best_step": 12000, "experts": "all",
    **{f"val_ppl_{when}": value for when, value in (("start", 1234567.0), ("final", 71.5), ("best", math.nan))},
    **{f"val_bits_per_byte_{when}": 12.5 for when in ("start", "final", "best")},
    "teacher_val_ppl": 41.2, "teacher_val_bits_per_byte": 1.7,
    "router_final": {
        f"teacher_val_{figure}_{how}": 1.5 for figure in ("ppl", "bits_per_byte") for how in ("native", "routed")
    },
}  # fmt: skip
TASK = {
    "benchmark_result": dict.fromkeys(("student_start", "student_end", "student", "teacher"), SCORE),
    "control": {
        "status": "finished",
        "steps": 12345,
        "wall_seconds": 61.0,
        "folder": "runs/a-control",
        "best_step": 12000,
        "val_ppl_best": 2.5,
        "val_bits_per_byte_best": 1.5,
        **SCORE,
    },
}


ALONE = "by cross-entropy alone, same start and batches, in runs/a-control"


def _table(summary):
    lines = summary_table(summary, Path("runs/a"))
    return lines[2 : next(i for i, line in enumerate(lines) if line.startswith("  applied"))]


@pytest.mark.parametrize("extra", [{}, TASK], ids=["a_text", "a_task"])
def test_every_row_of_the_table_ends_where_its_header_does(extra):
    header, *rows = _table(SUMMARY | extra)
    ends = {len(row) for row in rows if extra == {} or row.split()[-1] == "1.000"}
    assert ends == {len(header)}
    assert len(header) <= 80
    assert any(row.startswith("  teacher, every expert, end ") for row in rows)


def test_scores_stand_under_their_names():
    header, first, *_ = _table(SUMMARY | TASK)
    for name, shown in (("perplexity", "1.23e+06"), ("bits per byte", "12.5000"), ("accuracy", "0.125")):
        assert header.index(name) + len(name) == first.index(shown) + len(shown)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({}, "student, end "),  # of a version that did not keep the step
        ({"val_step_final": 12345}, "student, end "),
        ({"val_step_final": 12300}, "student, step 12300 "),
        ({"val_step_final": 0}, "student, step 0 "),
    ],
    ids=str,
)
def test_the_last_validation_has_its_step_where_the_run_went_on_after_it(more, name):
    _, _, last, *_ = _table(SUMMARY | more)
    assert last.startswith(f"  {name}")


@pytest.mark.parametrize(
    ("control", "line"),
    [
        (TASK["control"], f"{ALONE}; 12,345 steps in 1 min 01 s"),
        (TASK["control"] | {"status": "interrupted", "steps": 7}, f"{ALONE}; interrupted after 7 steps in 1 min 01 s"),
        ({"status": "emergency_stop", "stop_reason": "stopped at step 3: nan"}, "stopped at step 3: nan"),
    ],
    ids=["finished", "interrupted", "stopped"],
)  # fmt: skip
def test_a_control_has_a_line_with_its_time(control, line):
    found = summary_table(SUMMARY | {"control": control}, Path("runs/a"))
    assert f"  control: {line}" in found
    assert any("control, best (step 12000)" in row for row in found) == ("best_step" in control)


def test_the_share_of_the_teacher_that_was_left_out_has_a_line():
    def lines(**counts):
        return [line for line in summary_table(SUMMARY | counts, Path("runs/a")) if "left out" in line]

    assert lines() == lines(teacher_rows_dropped=0, teacher_positions=400) == []
    assert lines(teacher_rows_dropped=30, teacher_positions=400) == [
        "  teacher left out at 7.5% of its positions: its logits are not finite, or not in its cache"
    ]
    masked = "KL is infinite (masked tokens)"
    for infinite, why in ((30, masked), (10, f"its logits are not finite, or not in its cache, or {masked}")):
        (line,) = lines(teacher_rows_dropped=30, teacher_rows_infinite=infinite, teacher_positions=400)
        assert line == f"  teacher left out at 7.5% of its positions: {why}"


def test_the_share_at_which_the_teacher_could_not_be_compared_has_a_line():
    lines = summary_table(SUMMARY | {"teacher_rows_unshared": 30, "teacher_positions": 400}, Path("runs/a"))
    (line,) = [line for line in lines if "not compared" in line]
    assert line.startswith("  teacher not compared at 7.5% of its positions: too little of its distribution")
    assert not [line for line in summary_table(SUMMARY, Path("runs/a")) if "not compared" in line]
