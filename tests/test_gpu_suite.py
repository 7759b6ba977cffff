"""The benchmarks on a GPU: what the script says where there is none, and that each of them runs as it calls it."""

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def _suite(*flags, **environment):
    command = ["bash", str(SCRIPT), "--python", sys.executable, *map(str, flags)]
    own = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=own)


@pytest.mark.slow
def test_without_a_gpu_it_says_so_in_one_line_and_measures_nothing(tmp_path):
    done = _suite("--results", tmp_path / "results", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --device cuda: PyTorch sees no such GPU")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--devise", "cuda"], "--devise: no such option"),
        (["--device"], "--device: needs a value"),
        (["--device", "cuda:first"], "--device cuda:first: must be cuda, cuda:N or cpu"),
        (["--minutes", "0"], "--minutes 0: must be a whole number"),
        (["--python", "/no/such/python"], "--python /no/such/python: no such program"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, says):
    done = _suite(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {says}")


def test_its_help_shows_every_flag():
    done = _suite("--help")
    assert done.returncode == 0
    for flag in ("--device", "--minutes", "--results", "--python", "--brief"):
        assert flag in done.stdout


@pytest.fixture
def benchmark(monkeypatch):
    """benchmark(name, *flags): run one in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def call(name, *flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        importlib.import_module(name).main()

    return call


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["loss", "step_floor", "growth", "guard_cost", "teacher_cache"])
def test_a_benchmark_on_a_gpu_that_is_not_there_is_one_line(benchmark, name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark(name, "--device", "cuda", "--output", tmp_path / "figures.json")
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", "error: --device cuda: PyTorch sees no CUDA GPU; use --device cpu\n")
    assert not (tmp_path / "figures.json").exists()


@pytest.mark.slow
def test_a_benchmark_prints_its_table_and_writes_its_figures_with_the_machines(benchmark, tmp_path, capsys):
    path, sizes = tmp_path / "results" / "loss.json", ("--vocab_size", 300, "--rows", 16, "--rounds", 1)
    benchmark("loss", "--output", path, *sizes, "--model_dtype", "float32", "--sides", "floor", "ours")
    assert capsys.readouterr().out.splitlines()[-1].startswith("| float32 | 300 | 16 |")
    found = json.loads(path.read_text())
    assert found["torch"] == torch.__version__
    assert found["results"][0]["sides"]["ours"]["seconds"] > 0


def test_turns_leave_the_first_round_out_and_begin_with_another_side_each_time(benchmark, monkeypatch):
    paired, seen = importlib.import_module("paired"), []

    def side(name):
        return lambda number: seen.append((number, name)) or float(number)

    found = paired.take_turns({name: side(name) for name in "abc"}, rounds=3)
    assert "".join(name for _, name in seen) == "abc" + "bca" + "cab" + "abc"
    assert found == {name: [1.0, 2.0, 3.0] for name in "abc"}
    ratio = paired.ratio_of([2.0, 3.0, 8.0], [1.0, 1.0, 2.0])
    assert ratio == (3.0, 2.5, 3.5)


def test_the_peak_is_what_is_allocated_at_once_beyond_what_was_there(benchmark):
    paired, held = importlib.import_module("paired"), torch.ones(2**20)

    def act():
        first = held[: 2**18] + 1
        del first
        second = held * 2
        return second + held[0]

    assert paired.peak_bytes(torch.device("cpu"), act) == 2 * held.nbytes


@pytest.mark.long
def test_the_whole_suite_runs_on_a_cpu(tmp_path):
    done = _suite("--device", "cpu", "--brief", "--results", tmp_path)
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu-cpu.md").read_text()
    page = (tmp_path / "gpu-cpu.md").read_text()
    assert page.startswith("# cpu\n\nDriver none, PyTorch ")
    titles = (
        "The main job, float16", "A pair of real size, full and LoRA", "The losses alone",
        "A loss scale that overflows", "The teacher in the machine's memory", "A step beside the floor", "Growth",
        "The guards", "The memory plan",
    )  # fmt: skip
    places = [page.index(f"\n## {title}\n") for title in titles]
    assert places == sorted(places)  # what matters most is measured first
    assert page.count("| finished | 2 |") == 2
    assert re.search(r"\| finished \| 1\d \| {'no_targets': 0, 'forward': 0, 'teacher': 0, 'overflow': [1-9]", page)
    written = {path.name for path in (tmp_path / "gpu-cpu").iterdir()}
    assert {"loss.json", "step_floor.json", "growth.json", "guard_cost.json", "memory_plan.json"} <= written
    assert "summary-the-main-job-float16.json" in written


@pytest.mark.long
def test_what_does_not_end_in_its_time_is_cut_off_and_named(tmp_path):
    done = _suite("--device", "cpu", "--minutes", "1", "--results", tmp_path)
    assert done.returncode == 1
    assert "Not measured: the 1 minutes were over." in (tmp_path / "gpu-cpu.md").read_text()


@pytest.mark.slow
def test_the_parts_of_a_step_have_their_names(benchmark, tmp_path):
    growth, paired = importlib.import_module("growth"), importlib.import_module("paired")
    text = tmp_path / "text.txt"
    text.write_text("One sentence is enough for a block of a few tokens. " * 40, encoding="utf-8")
    flags = ["--train_file", text, "--block_size", 32, "--per_device_batch_size", 1, "--device", "cpu"]
    run = paired.Run([*map(str, flags), "--token_cache", "off"])
    (batch,) = run.batches(0)
    found = growth.by_parts(run, batch, paired.Clock(torch.device("cpu")))
    assert tuple(found) == growth.PARTS
    assert min(found.values()) > 0


def test_what_a_machine_with_pytorch_has_is_not_packed(benchmark):
    pack = importlib.import_module("pack_gpu")
    versions, missing = pack.closure(["transformers", "no-such-package"])
    assert missing == ["no-such-package"]
    assert {"transformers", "tokenizers", "huggingface-hub"} <= versions.keys()
    assert "torch" not in versions
    assert versions["tokenizers"] == importlib.metadata.version("tokenizers")
