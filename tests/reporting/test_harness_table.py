"""What lm-evaluation-harness has found, as text: the standard error, or an interval where that says nothing."""

import pytest

from sar_kd.reporting.harness_table import harness_rows


def _shown(value, stderr, count):
    entry = {"metrics": {"accuracy": {"value": value, "stderr": stderr}}, "num_questions": count}
    ((_, _, _, shown, questions),) = harness_rows({"distilled": {"task": entry}})
    assert questions == str(count)
    return shown


def _wilson(right, count, z=1.959964):
    """Both roots of (p - share)^2 = z^2 p (1 - p) / n, by bisection."""
    share = right / count

    def outside(p):
        return (p - share) ** 2 - z**2 * p * (1 - p) / count > 0

    def root(inner, outer):
        for _ in range(60):
            middle = (inner + outer) / 2
            inner, outer = (inner, middle) if outside(middle) else (middle, outer)
        return inner

    inside = share + (1e-9 if share < 0.5 else -1e-9)
    return root(inside, -1e-6) if share else 0.0, root(inside, 1 + 1e-6) if share < 1 else 1.0


@pytest.mark.parametrize(("right", "count"), [(0, 2), (2, 2), (0, 200), (500, 500)])
def test_answers_that_are_all_alike_have_wilsons_interval(right, count):
    low, high = _wilson(right, count)
    assert _shown(right / count, 0.0, count) == f"{right / count:.4f}, 95 %: {low:.2f} to {high:.2f}"


def test_other_values_have_the_harnesss_standard_error():
    assert _shown(0.5, 0.125, 4) == "0.5000 +- 0.1250"
    assert _shown(0.5, 0.0, 4) == "0.5000 +- 0.0000"  # no share of right answers
    assert _shown(0.0, "nan", 2) == "0.0000"
    assert _shown(0.0, 0.0, None) == "0.0000 +- 0.0000"
