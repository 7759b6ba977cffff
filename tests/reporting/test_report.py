"""The report, its findings and the model card, from runs with metrics written by hand; and their cost."""

import functools
import importlib.machinery
import json
import math
import re
import sys
import time
import types
from html.parser import HTMLParser

import numpy as np
import pytest
from huggingface_hub import ModelCard

from sar_kd.commands import main as command
from sar_kd.commands.main import run as exit_code
from sar_kd.config.command_line import parse
from sar_kd.config.commands import REPORT
from sar_kd.config.presets import STABLE
from sar_kd.errors import UsageError
from sar_kd.reporting import history, report, trackers
from sar_kd.reporting.held_out import HeldOut
from sar_kd.reporting.history import findings_of, read_history
from sar_kd.reporting.model_card import build_model_card
from sar_kd.reporting.report import results_of
from sar_kd.reporting.run_log import RunLog, open_run
from sar_kd.reporting.summary_table import next_commands
from sar_kd.runtime import environment
from sar_kd.runtime.files import json_safe
from sar_kd.version import RUN_FORMAT
from tests.helpers.runs import untimed

START = {"val_ppl": 71.0, "val_loss": 4.26, "val_bits_per_byte": 2.5, "teacher_val_ppl": 41.0}
START |= {"teacher_val_bits_per_byte": 1.75}


def _step(step, cause=None, **metrics):
    known = {"loss": 4.0 - step / 100, "ce_loss": 4.2, "kd_loss": 2.5, "grad_norm": 0.7, "loss_scale": 16384.0}
    state = {"applied": cause is None, "cause": cause, "norm_limit": 2.0, "learning_rate": 1e-3, "num_target_tokens": 9}
    return {"event": "step", "step": step, **known, **state, **metrics}


def _evaluation(step, bits, **more):
    ppl = math.exp(bits * 1.7) if math.isfinite(bits) else bits
    loss = bits * 1.7
    return {"event": "evaluation", "step": step, "val_ppl": ppl, "val_loss": loss, "val_bits_per_byte": bits, **more}


@pytest.fixture
def make_run(tmp_path):
    """make_run(records, name=..., summary=..., *flags): a run folder as a run would have left it."""

    def make(records, *flags, name="run", summary=None, start=START):
        folder = tmp_path / name
        folder.mkdir()
        config = parse(STABLE, [*flags, "--output_dir", str(folder)])
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        lines = [{"event": "start", "step": 0, **start}, *records] if start else records
        (folder / "metrics.jsonl").write_text("".join(json.dumps(json_safe(line)) + "\n" for line in lines))
        if summary:
            (folder / "summary.json").write_text(json.dumps(json_safe(summary)))
        return folder

    return make


class _Page(HTMLParser):
    """Checks that every tag is closed, and collects text and references to anything outside the file."""

    VOID = frozenset({"meta", "br", "img", "path", "use", "line"})

    def __init__(self, page):
        super().__init__()
        self.open, self.texts, self.references = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def _page(folder, *others):
    pytest.importorskip("matplotlib")
    path = folder.parent / "page.html"
    report.write_report([read_history(f) for f in (folder, *others)], path)
    text = path.read_text(encoding="utf-8")
    return text, _Page(text)


RECORDS = [_step(1), _step(2, "norm", grad_norm=5.0), _evaluation(2, 2.4), _step(3), _step(4), _evaluation(4, 2.2)]


def test_the_report_is_one_file_that_needs_nothing_else(make_run):
    text, page = _page(make_run(RECORDS))
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert "url(http" not in text
    assert "<script" not in text
    assert "@import" not in text


def test_the_report_shows_every_chart_and_the_teachers_line(make_run):
    _, page = _page(make_run(RECORDS))
    for title in ("Loss = 0.9 ce + 0.1 kd", "Bits per byte", "Perplexity", "Gradient norm", "Loss scale"):
        assert title in page.texts
    assert page.texts.count("teacher") == 2  # of bits per byte and of perplexity
    assert {"limit", "clip", "skipped", "norm"} <= set(page.texts)
    assert "Router entropy" not in page.texts


def test_routers_that_learn_have_their_entropy_and_usage_drawn(make_run):
    usage = {"router_entropy": 0.8, "router_usage": {"layers.0.gate": [0.5, 0.25, 0.25], "layers.1.gate": [0.2, 0.8]}}
    _, page = _page(make_run([_step(1), _evaluation(1, 2.4, **usage)]))
    assert {"Router entropy", "Expert usage"} <= set(page.texts)


def test_on_policy_text_is_drawn_apart_and_steps_without_a_metric_leave_no_gap(make_run):
    own = {"responses": 4, "response_end_rate": 0.5, "response_length": 30.0, "ce_loss": None, "norm_limit": math.inf}
    _, page = _page(make_run([_step(1, norm_limit=math.inf), _step(2, **own), _step(3, norm_limit=math.inf)]))
    assert {"Responses that end", "Length of responses", "ce"} <= set(page.texts)
    assert "limit" not in page.texts  # of which nothing could be drawn
    none = [_step(step, **own) for step in (1, 2)]
    _, page = _page(make_run(none, name="none"))
    assert "ce" not in page.texts


def test_gradient_norms_close_together_have_numbers_beside_them(make_run):
    _, page = _page(make_run([_step(1, grad_norm=0.71), _step(2, grad_norm=0.93)], "--max_grad_norm", "0.8"))
    numbers = [text for text in page.texts if re.fullmatch(r"0\.[789]\d*", text)]
    assert len(numbers) >= 3


def test_what_a_finding_sets_in_backticks_is_code(make_run):
    text, _ = _page(make_run([_step(1), _evaluation(1, 2.2), _step(2), _evaluation(2, 2.4)]))
    assert "<code>student/</code> holds the best." in text


def test_every_colour_is_the_pages_so_that_it_reads_on_dark_and_on_light(make_run):
    text, _ = _page(make_run(RECORDS))
    drawn = text[text.index("<svg") :]
    assert not re.findall(r"(?:fill|stroke): (?:#|black|white|rgb)", drawn)
    assert "prefers-color-scheme: dark" in text
    used = set(re.findall(r"var\((--\w+)\)", text))
    light, dark = re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)
    assert all(f"{name}:" in light and f"{name}:" in dark for name in used)


def test_what_a_run_is_called_is_text_and_never_markup(make_run):
    text, page = _page(make_run(RECORDS, "--teacher_model", "<b>evil</b>", name="a<i>b"))
    assert "<b>evil" not in text
    assert any("<b>evil</b>" in part for part in page.texts)


@pytest.mark.parametrize(
    "records",
    [
        [],
        [_step(1)],
        [_step(1, "forward", loss=math.nan, ce_loss=math.nan, kd_loss=math.nan, grad_norm=math.nan)],
        [_step(1, "overflow", grad_norm=math.inf), _evaluation(1, math.nan)],
        [_step(1, grad_norm=0.0, norm_limit=math.inf), _evaluation(1, 2.5)],
    ],
    ids=["nothing yet", "one step", "only nan", "infinite", "no gradient"],
)
@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_a_run_with_little_to_show_is_still_drawn(make_run, records):
    for start in (START, None):
        folder = make_run(records, name=f"run{bool(start)}", start=start)
        _page(folder)


def test_a_long_run_is_drawn_in_bins_and_stays_small(make_run):
    records = [_step(step, loss=math.sin(step)) for step in range(1, 20_001)]
    text, _ = _page(make_run(records))
    assert len(text) < 400_000


def test_several_runs_are_compared_in_a_table_with_the_settings_that_differ(make_run):
    first = make_run(RECORDS, "--student_lr", "1e-3", name="first")
    second = make_run([*RECORDS, _evaluation(6, 2.1)], "--student_lr", "2e-3", "--seed", "5", name="second")
    text, page = _page(first, second)
    rows = re.findall(r"<tr><td>(?:<svg.*?</svg>)?(.*?)</td></tr>", text)
    assert rows[0].startswith("first</td><td>under way")
    assert "2.2000" in rows[0]
    assert "2.1000" in rows[1]
    assert rows[2:] == ["student_lr</td><td>0.001</td><td>0.002", "seed</td><td>0</td><td>5"]
    assert page.texts.count("second") == 3  # in the table, in the charts' legend, and above the settings
    assert not any("different texts" in line for line in page.texts)


def test_runs_on_different_texts_are_compared_with_a_warning(make_run):
    first, second = (make_run(RECORDS, "--train_file", name, name=name) for name in ("a.txt", "b.txt"))
    _, page = _page(first, second)
    assert any(line.startswith("These runs have different texts") for line in page.texts)
    changed = make_run(RECORDS, "--train_file", "a.txt", name="changed", start=START | {"val_bytes": 5})
    _, page = _page(first, changed)  # the same file name
    assert any(line.startswith("These runs have different texts") for line in page.texts)


def test_each_of_many_runs_has_a_line_of_its_own_and_its_whole_name(make_run):
    names = [f"a-run-with-a-long-name-{i}" for i in range(10)]
    text, page = _page(*(make_run(RECORDS, name=name) for name in names))
    assert all(page.texts.count(name) == 2 for name in names)  # in the table and in the charts' legend
    keys = re.findall(r'class="key".*?style="(.*?)"', text)[:10]
    assert len(set(keys)) == 10
    bits = text[text.index("<b>Bits per byte</b>") :]
    assert len(set(re.findall(r"stroke: (var\(--s\d\))", bits))) == 8


@pytest.mark.parametrize("name", ["$$", "$\\bad{x}$", "a_b^c$"])
def test_names_that_look_like_formulas_are_names(make_run, name):
    first, second = make_run(RECORDS, "--train_file", name, name=name), make_run(RECORDS, name="other")
    _, page = _page(first, second)
    assert page.texts.count(name) == 4  # in the table, in the legend, and above and in the settings


@pytest.mark.parametrize("value", [1e19, -1e19, 1e300, math.inf, 10**400, "1e400", None, "x", True], ids=range(9))
def test_values_of_any_size_are_drawn_or_left_out(make_run, value):
    metrics = dict.fromkeys(("loss", "ce_loss", "kd_loss", "grad_norm", "loss_scale", "learning_rate"), value)
    usage = {"router_entropy": value, "router_usage": {"gate": [value, 0.5]}}
    records = [
        _step(1),
        {**_step(2), **metrics, "norm_limit": value},
        _evaluation(2, 2.4) | {"val_ppl": value, **usage},
    ]
    folder = make_run(records, start=START | {"val_ppl": value, "teacher_val_ppl": value})
    _page(folder)
    _page(folder, make_run(RECORDS, name="other"))


@pytest.mark.parametrize("usage", [{}, {"gate": []}, None])
def test_routers_without_a_usage_have_no_chart_of_it(make_run, usage):
    _, page = _page(make_run([_step(1), _evaluation(1, 2.4, router_entropy=0.8, router_usage=usage)]))
    assert "Router entropy" in page.texts
    assert "Expert usage" not in page.texts


def test_a_step_that_no_run_has_is_one_line(make_run):
    with pytest.raises(UsageError, match="cannot be read"):
        read_history(make_run([_step(10**19)]))


def test_the_learning_rate_is_drawn_and_a_loss_scale_only_where_there_is_one(make_run):
    _, page = _page(make_run(RECORDS))
    assert {"Learning rate", "Loss scale"} <= set(page.texts)
    _, page = _page(make_run([_step(1, loss_scale=1.0), _step(2, loss_scale=1.0)], name="float32"))
    assert "Learning rate" in page.texts
    assert "Loss scale" not in page.texts


@pytest.mark.parametrize(
    ("status", "level"), [("finished", "good"), ("interrupted", "warn"), ("emergency_stop", "bad"), (None, "calm")]
)
def test_how_a_run_ended_has_its_colour(make_run, status, level):
    text, _ = _page(make_run(RECORDS, summary={"status": status, "steps": 4} if status else None))
    assert f'<div class="findings {level}">' in text


def test_a_run_without_a_finite_loss_has_no_numbers_on_that_axis(make_run):
    _, page = _page(make_run([_step(i, "forward", loss=math.nan, ce_loss=math.nan, kd_loss=math.nan) for i in (1, 2)]))
    assert "no finite value" in page.texts
    assert not any(text in ("-0", "-0.04") for text in page.texts)


def test_the_page_has_where_the_run_was_made_its_first_lines_and_its_samples(make_run):
    folder = make_run(RECORDS)
    config = json.loads((folder / "config.json").read_text())
    config["environment"] = {"torch": "9.9", "commit": "abc", "devices": ["T4", "T4"], "command": "python <x>.py"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.txt").write_text("Teacher: Big\nStep 1/4: avg_loss=3\nafter\n")
    (folder / "samples.json").write_text(json.dumps([{"text": "Once <upon>", "student": " a time"}]))
    text, page = _page(folder)
    assert {"9.9", "abc", "T4 T4", "python <x>.py", "Teacher: Big"} <= set(page.texts)
    assert "<upon>" not in text
    assert any("Once" in part for part in page.texts)
    assert "after" not in page.texts
    assert not any("torch" in str(name) for name in read_history(folder).settings())


def _write_held_out(folder, **nats):
    names = ["a.txt", "b.jsonl:1", "b.jsonl:2"]
    found = {model: np.array(values, dtype=np.float64) for model, values in nats.items()}
    HeldOut("text", "tokenizer", "blocks", names, np.array([100, 40, 60]), found).write(folder)


def test_the_page_opens_on_the_verdict_and_the_curves_of_run_and_control_and_folds_the_rest(make_run):
    sentence = "The distilled student is 0.1000 +- 0.0100 bits per byte better than the control."
    best = {"best_step": 4, "val_ppl_best": 40.0, "val_bits_per_byte_best": 2.2, "status": "finished", "steps": 4}
    folder = make_run(RECORDS, summary={**best, "control": {"status": "finished", "best_step": 2, "val_ppl_best": 50.0},
                                        "comparison": {"sentences": [sentence]}})  # fmt: skip
    control = make_run([_evaluation(2, 2.45), _evaluation(4, 2.3)], name="run-control")
    for path, answer in ((folder, "by the teacher"), (control, "alone")):
        sample = {"text": "Once", "student, before": "at first", "student, after": answer, "teacher": "taught"}
        (path / "samples.json").write_text(json.dumps([sample]))
    _write_held_out(folder, start=[200, 80, 150], best=[100, 40, 70], teacher=[50, 20, 30])
    _write_held_out(control, start=[200, 80, 150], best=[150, 60, 80])
    text, page = _page(folder)
    assert text.index("<h1") < text.index(sentence) < text.index("<svg") < text.index("<details")
    lead = text[: text.index("<details")]
    assert lead.count("<svg") == 1
    assert all(f">{label}<" in lead for label in ("control", "distilled", "teacher"))
    assert re.search(r'role="img" aria-label="Bits per byte. On held-out text', lead)
    shown = [page.texts.index(name) for name in ("at first", "alone", "by the teacher", "taught")]
    assert shown == sorted(shown)
    rows = [tuple(re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)) for row in text.split("<tr>")]
    models = ("start", "control", "best student", "teacher")
    assert ("file", "documents", "bytes", *models, "better than the control by") in rows
    ln2 = math.log(2)
    losses = [f"{nats / ln2 / 100:.4f}" for nats in (230, 140, 110, 50, 30)]
    assert ("b.jsonl", "2", "100", *losses) in rows


def test_a_control_that_has_not_finished_is_named_and_not_compared(make_run):
    control = {"status": "interrupted", "steps": 3, "best_step": 0, "val_ppl_best": 71.0, "val_bits_per_byte_best": 2.5}
    folder = make_run(RECORDS, summary={"status": "finished", "steps": 4, "control": control})
    other = make_run([_evaluation(2, 2.5)], name="run-control")
    for path in (folder, other):
        _write_held_out(path, start=[200, 80, 150], best=[100, 40, 70])
    _, page = _page(folder)
    assert "control" not in page.texts
    assert "better than the control by" not in page.texts
    assert "Its control was interrupted after 3 steps; --resume goes on with it." in page.texts
    assert "| control" not in build_model_card(read_history(folder))


def test_a_control_that_is_gone_leaves_the_page_as_one_without(make_run):
    folder = make_run(RECORDS, summary={"status": "finished", "control": {"status": "finished", "best_step": 2}})
    _, page = _page(folder)
    assert "control" not in page.texts


@pytest.mark.parametrize(
    ("summary", "beginning"),
    [
        ({"status": "finished", "steps": 4}, "Bits per byte on held-out text fell from 2.5000 to 2.2000"),
        ({"status": "emergency_stop", "steps": 4, "stop_reason": "10 NaN batches"}, "Emergency stop at step 4"),
        ({}, "Under way: 4 of"),
    ],
)
def test_without_a_control_a_page_opens_on_how_far_the_student_came_or_why_it_ended(make_run, summary, beginning):
    text, _ = _page(make_run(RECORDS, summary=summary))
    (headline,) = re.findall(r"<h1[^>]*>(.*?)</h1>", text)
    assert headline.startswith(beginning)
    others = findings_of(read_history(make_run(RECORDS, summary=summary, name="other")))
    findings = text[text.index('<div class="findings') : text.index("<details")]
    assert findings.count("<p>") == len(others) - 1


def test_a_long_run_is_thinned_and_its_counts_are_of_all_steps(make_run, monkeypatch):
    records = [_step(step, "norm" if step % 7 == 0 else None) for step in range(1, 3001)]
    folder = make_run(records)
    whole = read_history(folder)
    assert (len(whole.steps), whole.num_steps, whole.stride) == (3000, 3000, 1)
    monkeypatch.setattr(history, "_MAX_STEPS", 100)
    thinned = read_history(folder)
    assert 90 <= len(thinned.steps) <= 120
    assert thinned.stride > 1
    assert (thinned.num_steps, thinned.skipped, thinned.num_applied) == (3000, whole.skipped, whole.num_applied)
    assert thinned.steps[-1]["step"] == 3000
    assert findings_of(thinned) == findings_of(whole)
    text, _ = _page(folder)
    assert f"one of {thinned.stride} steps" in text


@pytest.mark.slow
def test_a_million_steps_take_seconds(make_run):
    folder = make_run([])
    line = json.dumps(_step(123456))
    with open(folder / "metrics.jsonl", "a") as file:
        for first in range(0, 1_000_000, 1000):
            lines = (line.replace("123456", str(step)) for step in range(first + 1, first + 1001))
            file.write("\n".join(lines) + "\n")
    started = time.process_time()
    text, _ = _page(folder)
    assert time.process_time() - started < 15
    assert len(text) < 400_000
    assert "1,000,000 of 1,000,000" in text


# Findings


def test_a_finished_run_is_described_with_its_way_to_the_teacher(make_run):
    folder = make_run(RECORDS, "--train_steps", "4", summary={"status": "finished", "steps": 4})
    lines = findings_of(read_history(folder))
    assert lines[0] == "Finished: 4 steps."
    assert (
        lines[1] == "Bits per byte on held-out text fell from 2.5000 to 2.2000, 40% of the way to the teacher's 1.7500."
    )
    assert lines[2] == "3 of 4 updates were applied; skipped: norm 1."
    assert findings_of(read_history(folder), with_status=False) == lines[1:]
    assert "Skipped for norm in 25% of the steps" in lines[3]


def test_a_student_that_is_better_than_its_teacher_is_not_so_many_percent_of_the_way(make_run):
    folder = make_run(RECORDS, start=START | {"teacher_val_bits_per_byte": 2.45})
    lines = findings_of(read_history(folder))
    assert any("fell from 2.5000 to 2.2000, below the teacher's 2.4500." in line for line in lines)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ((2.4, 2.2, 2.3), "Best at step 2 (2.2000); the later steps made it worse."),
        ((2.4, 2.3, 2.2), "It was still falling at the last validation"),
        ((2.4, 2.3, math.nan), "The last validation is not finite."),
    ],
)
def test_the_course_of_the_validations_is_described(make_run, bits, expected):
    records = [record for i, value in enumerate(bits, 1) for record in (_step(i), _evaluation(i, value))]
    assert any(line.startswith(expected) for line in findings_of(read_history(make_run(records))))


def test_alarms_about_the_students_responses_are_findings(make_run):
    alarms = ["length"], [], ["cut_off", "length"]
    records = [_step(i, responses=4, response_alarms=names) for i, names in enumerate(alarms, 1)]
    lines = findings_of(read_history(make_run([*records, _step(4), _evaluation(4, 2.4)])))
    (length,) = (line for line in lines if "grew by more than half" in line)
    assert "(so in 2 steps)" in length
    assert "--on_policy_fraction" in length
    assert any("came to end less often (so in 1 step)" in line for line in lines)
    assert not any("repeat" in line for line in lines)


def test_a_run_without_an_applied_update_or_a_better_validation_says_so(make_run):
    folder = make_run([_step(1, "norm"), _step(2, "forward"), _evaluation(2, 2.5)])
    lines = findings_of(read_history(folder))
    assert "Bits per byte on held-out text stayed at 2.5000; the teacher has 1.7500." in lines
    assert "No update was applied, so the student is as it was; skipped: norm 1, forward 1." in lines
    lines = findings_of(read_history(make_run([_step(1), _evaluation(1, 2.6)], name="worse")))
    assert "No validation was better than the one before the first step" in lines[-1]


@pytest.mark.parametrize(("last", "names_rate"), [(2.8, False), (3.1, True), (math.nan, True)])
def test_a_student_that_got_much_worse_names_the_rate_and_no_mode_that_teaches_more(make_run, last, names_rate):
    records = [record for i, value in enumerate((2.4, last), 1) for record in (_step(i), _evaluation(i, value))]
    summary = {"status": "finished", "steps": 2, "val_bits_per_byte_start": 2.5, "val_bits_per_byte_final": last}
    folder = make_run(records, "--student_lr", "0.5", summary=json_safe(summary))
    lines = findings_of(read_history(folder))
    assert names_rate == ("The updates made it much worse: a lower --student_lr may help (it is 0.5)." in lines)
    assert not any("still falling" in line for line in lines)
    assert not any("To learn more" in line for line in next_commands(folder))
    better = json_safe({**summary, "val_bits_per_byte_final": 2.4})
    (folder / "summary.json").write_text(json.dumps(better))
    assert any("To learn more" in line for line in next_commands(folder))
    with_recipe = make_run(records, "--recipe", "on-policy", summary=better, name="recipe")
    assert not any("To learn more" in line for line in next_commands(with_recipe))
    better_than_its_teacher = json_safe({**summary, "val_bits_per_byte_start": 1.75, "val_bits_per_byte_final": 1.5})
    (folder / "summary.json").write_text(json.dumps(better_than_its_teacher))
    assert not any("To learn more" in line for line in next_commands(folder))


def test_a_run_that_made_nothing_better_is_followed_by_another_rate_and_not_by_its_texts(make_run):
    summary = {"status": "finished", "steps": 2, "best_step": 0}
    lines = next_commands(make_run([_step(1), _step(2), _evaluation(2, 2.6)], "--student_lr", "0.5", summary=summary))
    assert lines[-1] == "Next: the same command with another --student_lr (it was 0.5), or more --train_steps"
    assert not any("generate" in line for line in lines)


def test_a_run_without_a_teacher_has_no_figure_of_one_in_a_comparison(make_run):
    start = {name: value for name, value in START.items() if not name.startswith("teacher_")}
    starts = {"distilled": START, "alone": start, "not_finite": START | {"teacher_val_bits_per_byte": math.nan}}
    runs = [read_history(make_run([_step(1)], name=name, start=start)) for name, start in starts.items()]
    assert [row["teacher's bits"] for row in results_of(runs)] == ["1.7500", "none", "nan"]


@pytest.mark.parametrize("value", [None, "x", math.nan, math.inf, -5, 1e308, True, [], {}])
def test_a_summary_of_nonsense_is_shown(make_run, value):
    names = "status steps applied skipped success_rate tokens tokens_per_second wall_seconds peak_memory_bytes"
    text, _ = _page(make_run(RECORDS, summary=dict.fromkeys(names.split(), value)))
    assert "2.2000" in text


def test_a_flat_end_is_not_called_falling(make_run):
    records = [record for i, value in enumerate((2.1, 2.001, 2.0), 1) for record in (_step(i), _evaluation(i, value))]
    assert not any("falling" in line for line in findings_of(read_history(make_run(records))))


def test_a_teacher_that_is_no_better_than_the_student_was_is_mentioned(make_run):
    folder = make_run(RECORDS, start=START | {"teacher_val_bits_per_byte": 2.6})
    assert any("little to teach" in line for line in findings_of(read_history(folder)))


def test_a_teacher_that_teaches_its_prompt_need_not_be_better(make_run):
    start = START | {"teacher_val_bits_per_byte": 2.6}
    folder = make_run(RECORDS, "--teacher_system_prompt", "Be brief.", start=start)
    assert not any("little to teach" in line for line in findings_of(read_history(folder)))


def test_a_summary_of_an_earlier_part_is_not_taken_for_the_end(make_run):
    folder = make_run(RECORDS, summary={"status": "interrupted", "steps": 2})
    assert findings_of(read_history(folder))[0] == "Under way: 4 of 500 steps."


@pytest.mark.parametrize("own_format", [None, RUN_FORMAT + 1])
def test_a_run_of_another_format_is_read_with_a_line_about_it(make_run, own_format):
    pytest.importorskip("matplotlib")
    records = [{"event": event, "step": 1} for event in ("step", "evaluation")]
    folder = make_run(records, summary={"status": "finished"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("format")
    (folder / "config.json").write_text(json.dumps({**config, "format": own_format} if own_format else config))
    lines = findings_of(read_history(folder))
    assert lines[0].startswith(f"Its run format is {own_format or 1}, not {RUN_FORMAT}")
    assert not any("run format" in line for line in findings_of(read_history(make_run(RECORDS, name="own"))))
    text, _ = _page(folder)
    assert f"not {RUN_FORMAT}: values" in text


def test_a_line_that_a_kill_cut_short_is_left_out(make_run):
    folder = make_run(RECORDS)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "st')
    assert [record["step"] for record in read_history(folder).steps] == [1, 2, 3, 4]


@pytest.mark.parametrize("content", ["no json\n", '{"event": "step"}\n', '{"event": "step", "step": "x"}\n', "[1]\n"])
def test_metrics_that_no_run_wrote_are_one_line(make_run, content):
    folder = make_run(RECORDS)
    (folder / "metrics.jsonl").write_text(content)
    with pytest.raises(UsageError, match="cannot be read"):
        read_history(folder)


# The command


def test_the_command_writes_the_page_and_prints_the_findings(make_run, capsys):
    pytest.importorskip("matplotlib")
    folder = make_run(RECORDS)
    assert exit_code(functools.partial(command.start, REPORT), [str(folder)]) == 0
    out = capsys.readouterr().out
    assert "40% of the way" in out
    assert out.endswith(f"Written to {folder / 'report.html'}\n")
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["nowhere"], "nowhere: holds no run"), ([], "RUN_DIR"), (["a", "--runs"], "--runs: no such option")],
)
def test_a_report_on_nothing_is_one_line(words, expected, capsys):
    assert exit_code(functools.partial(command.start, REPORT), words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


@pytest.mark.parametrize("where", ["", "no/page.html"])
def test_a_page_that_cannot_be_there_is_one_line(make_run, where, tmp_path, capsys):
    assert (
        exit_code(functools.partial(command.start, REPORT), [str(make_run(RECORDS)), "--output", f"{tmp_path}/{where}"])
        == 2
    )
    expected = "the folder {}/no is not there" if where else "is a folder; give a file, such as {}/report.html"
    assert capsys.readouterr().err == f"error: --output {tmp_path / where}: {expected.format(tmp_path)}\n"


def test_a_report_without_matplotlib_is_one_line_with_the_command(make_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert exit_code(functools.partial(command.start, REPORT), [str(make_run(RECORDS))]) == 2
    assert "`pip install matplotlib`" in capsys.readouterr().err


class _Broken:
    """A finder that lets matplotlib be found, and raises as it is imported."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, *_):
        if name == "matplotlib":
            return importlib.machinery.ModuleSpec(name, self)
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise self.error


@pytest.fixture(
    params=[
        ImportError("numpy.core.multiarray failed to import\n(auto-generated)"),
        AttributeError("_ARRAY_API not found"),
        RuntimeError("module was compiled against another numpy"),
    ],
    ids=lambda error: type(error).__name__,
)
def broken_matplotlib(request, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Broken(request.param), *sys.meta_path])
    return request.param


def test_a_matplotlib_that_cannot_be_imported_is_one_line(make_run, broken_matplotlib, capsys):
    assert exit_code(functools.partial(command.start, REPORT), [str(make_run(RECORDS))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"({type(broken_matplotlib).__name__}: {broken_matplotlib}".splitlines()[0] in line
    assert "pip install --upgrade matplotlib" in line


# During a run


def test_a_run_without_matplotlib_prints_once_how_to_get_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "is_installed", lambda package: False)
    open_run(parse(STABLE, ["--output_dir", str(tmp_path / "run")])).close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "report.html" in line]
    assert lines == [
        "No report.html without matplotlib: `pip install matplotlib`, then `python -m sar_kd report "
        f"{tmp_path}/run` at any time"
    ]


def test_a_writer_writes_at_validations_and_at_the_end_but_never_for_more_than_its_share(monkeypatch, tmp_path):
    clock, written = [100.0], []

    def write(*_):
        written.append(clock[0])
        clock[0] += 1.0  # what one page costs

    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(report, "write_report", write)
    monkeypatch.setattr(report, "read_history", lambda folder: None)
    writer = report.ReportWriter(tmp_path)
    for seconds, event in ((0, "step"), (1, "evaluation"), (10, "evaluation"), (45, "evaluation"), (1, "evaluation")):
        clock[0] += seconds
        writer.log_record({"event": event})
    writer.log_summary({})
    assert written == [101.0, 157.0, 159.0]  # 10 s after a page of 1 s is too soon, 55 s is not; the end always


def test_an_observer_receives_everything_that_is_written_and_the_end(tmp_path):
    seen = []
    observer = types.SimpleNamespace(
        log_record=lambda record: seen.append(record["event"]),
        log_summary=lambda summary: seen.append("finish"),
        close=lambda: seen.append("close"),
    )
    config = parse(STABLE, ["--output_dir", str(tmp_path)])
    log = RunLog(config, [observer])
    log.open(0, config.train)
    log.log_start({"val_ppl": 3.0}, {"val_ppl": 2.0})
    log.log_step(_step(1), 1.0, 1.0)
    log.close()
    assert seen == ["start", "step", "close"]
    start = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert untimed(start) == {
        "event": "start",
        "step": 0,
        "same_tokenizer": True,
        "val_ppl": 3.0,
        "teacher_val_ppl": 2.0,
    }


def test_the_log_of_another_rank_shows_and_writes_nothing(tmp_path, capsys):
    config = parse(STABLE, ["--output_dir", str(tmp_path)])
    log = RunLog(config, enabled=False)
    log.info("a line")
    log.print_start({"val_ppl": 3.0, "val_bits_per_byte": 1.0}, {"val_ppl": 2.0, "val_bits_per_byte": 1.0})
    log.log_start({"val_ppl": 3.0}, {"val_ppl": 2.0})
    log.log_step(_step(1), 1.0, 1.0)
    log.log_evaluation(_evaluation(1, 2.5), True)
    log.log_rewind({"step": 0, "rewound_from": 1, "skipped_blocks": [], "documents": []}, 9)
    log.close()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_metrics_go_to_weights_and_biases_when_asked(tmp_path, monkeypatch):
    sent, opened = [], []
    target = types.SimpleNamespace(
        log=lambda metrics, step: sent.append((step, metrics)), finish=lambda: sent.append("end")
    )
    fake = types.SimpleNamespace(init=lambda **how: opened.append(how) or target, __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tracker,) = trackers.find_trackers(parse(STABLE, ["--wandb", "--output_dir", str(tmp_path / "a run")]))
    tracker.log_record(_step(1, "overflow", grad_norm=math.inf))
    tracker.log_record(_evaluation(2, 2.5))
    tracker.log_summary({"status": "finished", "steps": 2, "val_ppl_final": 70.0})
    tracker.close()
    assert opened[0]["config"]["train"]["wandb"] is True
    assert (opened[0]["project"], opened[0]["name"], opened[0]["id"]) == ("sar-kd", "a run", "a-run")
    assert sent[0][1]["train/loss"] == 3.99
    assert "train/grad_norm" not in sent[0][1]  # infinite
    assert sent[1] == (2, {f"validation/val_{k}": v for k, v in _values(2.5).items()})
    assert sent[2][1]["summary/val_ppl_final"] == 70.0
    assert sent[3] == "end"


def _values(bits):
    return {"ppl": math.exp(bits * 1.7), "loss": bits * 1.7, "bits_per_byte": bits}


def test_metrics_go_to_tensorboard_when_asked(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = trackers.find_trackers(parse(STABLE, ["--tensorboard", "--output_dir", str(tmp_path)]))
    for step in (1, 2):
        tracker.log_record(_step(step))
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 4)) for event in events.Scalars("train/loss")] == [(1, 3.99), (2, 3.98)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_line_before_the_run(tmp_path, monkeypatch, name, capsys):
    monkeypatch.setattr(environment, "is_installed", lambda package: False)
    code = exit_code(lambda argv: open_run(parse(STABLE, argv)), [f"--{name}", "--output_dir", str(tmp_path / "run")])
    assert code == 2
    assert capsys.readouterr().err == f"error: --{name}: needs `pip install {name}`\n"


def test_nothing_is_sent_anywhere_unless_asked():
    assert trackers.find_trackers(parse(STABLE, [])) == []


# The model card


def test_the_card_describes_the_best_student_and_where_it_came_from(make_run):
    folder = make_run(
        [_step(1), _evaluation(1, 2.2), _step(2), _evaluation(2, 2.3)],
        "--teacher_model", "someone/teacher", "--student_model", "someone/student",
        "--dataset_name", "wikitext", "--dataset_config_name", "wikitext-2-raw-v1",
    )  # fmt: skip
    card = build_model_card(read_history(folder))
    metadata = ModelCard(card).data
    assert (metadata.base_model, metadata.datasets) == ("someone/student", ["wikitext"])
    assert (metadata.library_name, metadata.tags) == ("transformers", ["knowledge-distillation", "sar-kd"])
    assert "| student, before | 71.00 | 2.5000 |" in card
    assert f"| student, this one (step 1) | {math.exp(2.2 * 1.7):.2f} | 2.2000 |" in card
    assert "| teacher | 41.00 | 1.7500 |" in card
    assert "- Text: wikitext wikitext-2-raw-v1" in card
    assert "- temperature: 2.0" in card


def test_the_card_names_no_folder_of_the_machine_that_it_was_made_on(make_run, tmp_path):
    folder = make_run(RECORDS, "--teacher_model", str(tmp_path / "big"), "--train_file", str(tmp_path / "text.txt"))
    card = build_model_card(read_history(folder))
    assert str(tmp_path) not in card
    assert "- Teacher: big" in card
    assert "- Text: text.txt" in card
