"""Runs that are there, compared: which is the reference, what is said, and which runs cannot be compared."""

import json
import math

import numpy as np
import pytest

from sar_kd.commands.main import main
from sar_kd.errors import UsageError
from sar_kd.reporting.held_out import HeldOut, read_held_out
from sar_kd.reporting.run_comparison import compare_runs

COUNT = 60
START, TEACHER = 2.0, 1.0
"""Bits per byte"""


@pytest.fixture
def make_run(tmp_path):
    """A finished run whose best student has these bits per byte, give or take some on each document."""

    def make(name, bits, seed=0, alpha_kd=0.5, count=COUNT, **changes):
        folder = tmp_path / name
        folder.mkdir()
        num_bytes = np.arange(100, 100 + 3 * count, 3)
        noise = np.random.default_rng(seed).normal(0, 0.02, count)
        nats = {"start": START + 0 * noise, "best": bits + noise, "teacher": TEACHER + 0 * noise}
        nats = {model: values * num_bytes * math.log(2) for model, values in nats.items()}
        digests = {"text": "a text", "tokenizer": "a tokenizer", "blocks": "blocks"} | changes
        HeldOut(**digests, names=[str(i) for i in range(count)], num_bytes=num_bytes, nats=nats).write(folder)
        (folder / "config.json").write_text(json.dumps({"mode": "precise", "loss": {"alpha_kd": alpha_kd}}))
        records = [{"event": "start", "step": 0, "val_ppl": 9.0, "val_loss": 2.0},
                   {"event": "evaluation", "step": 30, "val_ppl": 8.0, "val_loss": 1.9}]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder

    return make


def test_what_is_written_is_read_back(make_run, tmp_path):
    folder = make_run("run", 1.5)
    found = read_held_out(folder)
    found.nats["best"][3], found.nats["best"][4] = math.nan, math.inf
    found.write(tmp_path)
    again = read_held_out(tmp_path)
    assert (again.text, again.tokenizer, again.blocks, again.names) == ("a text", "a tokenizer", "blocks", found.names)
    assert again.num_bytes.tolist() == found.num_bytes.tolist()
    for model in ("start", "best", "teacher"):
        np.testing.assert_array_equal(again.nats[model], found.nats[model])


def test_each_run_is_compared_with_the_one_by_cross_entropy_alone(make_run):
    runs = [make_run("better", 1.5, 1), make_run("alone", 1.6, 2, alpha_kd=0.0), make_run("worse", 1.7, 3)]
    found = compare_runs(runs)
    assert found["reference"] == str(runs[1])
    assert found["sentences"][0].startswith(f"{runs[0]} is 0.")
    assert " better than " in found["sentences"][0]
    assert found["sentences"][1].startswith(f"{runs[2]} is 0.")
    assert " worse than " in found["sentences"][1]
    assert found["differences"][str(runs[0])]["gain"] == pytest.approx(0.1, abs=0.02)
    assert found["differences"][str(runs[2])]["gain"] == pytest.approx(-0.1, abs=0.02)
    models = found["models"][str(runs[0])]
    assert (models["start"], models["teacher"], models["best_step"]) == (pytest.approx(2.0), pytest.approx(1.0), 30)
    assert models["gap_closed"] == pytest.approx(START - models["best"], rel=1e-6)
    assert 0 < models["gap_closed_interval"] < 0.02
    assert compare_runs([runs[2], runs[0]])["reference"] == str(runs[2])  # the first, where none is by that alone


def test_a_run_alone_is_compared_with_its_control(make_run):
    run, control = make_run("run", 1.5, 1), make_run("run-control", 1.6, 2, alpha_kd=0.0)
    with pytest.raises(UsageError, match="run: has no finished control; give another run"):
        compare_runs([run])
    with pytest.raises(UsageError, match="run-control: a run by cross-entropy alone has no control"):
        compare_runs([control])
    summary = {"control": {"status": "finished", "folder": "elsewhere/run-control"}}  # it was moved since
    (run / "summary.json").write_text(json.dumps(summary))
    assert compare_runs([run])["reference"] == str(control)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"text": "another"}, "held-out texts"),
        ({"tokenizer": "another"}, "tokenizers of their students"),
        ({"count": COUNT + 1}, "sizes of their held-out text"),
    ],
    ids=str,
)
def test_runs_on_another_text_are_refused_in_one_line(make_run, capsys, changes, what):
    runs = [make_run("a", 1.5), make_run("b", 1.6, **changes)]
    assert main(["compare", *map(str, runs)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {runs[1]}: cannot be compared with {runs[0]}: the {what} differ\n"


def test_other_blocks_are_told(make_run):
    runs = [make_run("a", 1.5), make_run("b", 1.6, blocks="other")]
    (_, note) = compare_runs(runs)["sentences"]
    assert note.startswith("Their blocks begin at different places (--block_size")


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"bytes": [1], "nats": {"best": []}, "names": []}', "nats"])
def test_a_damaged_file_is_refused_in_one_line(make_run, damage):
    runs = [make_run("a", 1.5), make_run("b", 1.6)]
    text = (runs[1] / "held_out.json").read_text()
    (runs[1] / "held_out.json").write_text(text.replace('"best"', '"worst"') if damage == "nats" else damage)
    with pytest.raises(UsageError, match=r"b: (held_out.json cannot be read|the loss of its best student)"):
        compare_runs(runs)
    (runs[1] / "held_out.json").unlink()
    with pytest.raises(UsageError, match=r"b: holds no held_out.json, so its run is of an earlier version"):
        compare_runs(runs)


def test_the_command_prints_the_verdict_first_and_json_for_programs(make_run, capsys):
    runs = [str(make_run("a", 1.5, 1)), str(make_run("b", 1.6, 2, alpha_kd=0.0))]
    assert main(["compare", *runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{runs[0]} is 0.")
    names = [line.split("  ")[1] for line in lines[2:]]
    assert names == ["start", f"{runs[0]}, best (step 30)", f"{runs[1]}, best (step 30)", "teacher"]
    assert len({len(line.split("+-")[0].rstrip(" %0123456789")) > 0 for line in lines[2:]}) == 1
    assert main(["compare", *runs, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sentences"] == lines[:1]
