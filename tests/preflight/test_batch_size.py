"""`--per_device_batch_size auto`: the largest number that fits, with as many blocks in an update as without it."""

import json
from functools import cache

import pytest
import torch

from sar_kd.commands.main import main
from sar_kd.commands.train import train
from sar_kd.config.command_line import configure, parse
from sar_kd.config.commands import SFT
from sar_kd.config.fields import AUTO
from sar_kd.config.presets import STABLE
from sar_kd.errors import UsageError
from sar_kd.models.loading import MetaModels
from sar_kd.preflight import fitting, memory_plan
from sar_kd.preflight.fitting import fit_batch_size
from sar_kd.preflight.memory_plan import MARGIN, NotEstimated, plan
from sar_kd.runtime import environment
from sar_kd.runtime.distributed import SINGLE_PROCESS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
FLAGS = ["--per_device_batch_size", "auto", "--block_size", "64", "--device", "cpu", "--output_dir", "out"]


@pytest.fixture
def limited(monkeypatch):
    """limited(bytes): a machine with so much free memory, and a process that holds none."""
    monkeypatch.setattr(environment, "resident_memory", lambda: 0)
    monkeypatch.setattr(memory_plan, "_LIBRARIES", {"cpu": 0})

    def limit(room: int) -> None:
        monkeypatch.setattr(environment, "free_memory", lambda device: room)

    return limit


def _parse(*flags: str):
    return parse(STABLE, [*FLAGS, *flags])


@cache
def _needed(size: int, accum: int = 2) -> int:
    """Bytes at the peak of a run with this batch size, without the baseline; with several micro-batches or one."""
    config = parse(STABLE, [*FLAGS, "--per_device_batch_size", str(size), "--grad_accum_steps", str(accum)])
    return plan(config, MetaModels(config).models, CPU, torch.float32).peak.total


@pytest.mark.parametrize("size", [1, 4])
def test_the_largest_divisor_of_an_update_that_fits_is_taken_and_none_above_it(limited, size):
    sizes = [1, 2, 4, 8, 16]
    needed = {size: _needed(size) for size in sizes}
    assert sorted(needed.values()) == list(needed.values())
    limited(int((1 + MARGIN) * needed[size]) + 1)
    found = fit_batch_size(_parse("--grad_accum_steps", "4"), SINGLE_PROCESS).train
    assert (found.per_device_batch_size, found.grad_accum_steps) == (size, 16 // size)
    if size > 1:
        limited(int((1 + MARGIN) * needed[size]) - 1)
        found = fit_batch_size(_parse("--grad_accum_steps", "4"), SINGLE_PROCESS).train
        assert found.per_device_batch_size == size // 2


def test_with_enough_memory_an_update_is_one_micro_batch_of_the_default_size(limited):
    limited(10**15)
    config = fit_batch_size(_parse(), SINGLE_PROCESS)
    assert (config.train.per_device_batch_size, config.train.grad_accum_steps) == (4, 1)
    assert type(config.train.per_device_batch_size) is int
    assert config.notices[-1].startswith("--per_device_batch_size auto: 4 (")
    assert config.notices[-1].endswith("--grad_accum_steps 1: 4 blocks an update")


def test_a_task_and_fine_tuning_have_their_own_default(limited):
    limited(10**15)
    found = fit_batch_size(_parse("--task", "units"), SINGLE_PROCESS).train
    assert found.per_device_batch_size * found.grad_accum_steps == 16
    found = fit_batch_size(parse(SFT, [*FLAGS, "--grad_accum_steps", "3"]), SINGLE_PROCESS).train
    assert (found.per_device_batch_size, found.grad_accum_steps) == (24, 1)


def test_a_micro_batch_on_a_cpu_is_no_larger_than_makes_it_faster(limited, monkeypatch):
    limited(10**15)
    monkeypatch.setattr(fitting, "MAX_TOKENS_ON_CPU", 8 * 64)
    found = fit_batch_size(_parse("--grad_accum_steps", "8"), SINGLE_PROCESS).train
    assert (found.per_device_batch_size, found.grad_accum_steps) == (8, 4)
    monkeypatch.setattr(fitting, "MAX_TOKENS_ON_CPU", 1)
    assert fit_batch_size(_parse(), SINGLE_PROCESS).train.per_device_batch_size == 1


def test_if_not_even_one_block_fits_the_notice_says_so(limited):
    limited(2**20)
    config = fit_batch_size(_parse(), SINGLE_PROCESS)
    assert config.train.per_device_batch_size == 1
    assert "though even that may not fit" in config.notices[-1]


def test_a_number_is_unchanged(monkeypatch):
    monkeypatch.setattr(fitting, "plan", lambda *a: pytest.fail("planned"))
    config = parse(STABLE, ["--per_device_batch_size", "3"])
    assert fit_batch_size(config, SINGLE_PROCESS) is config


def test_auto_is_a_value_of_this_option_alone(capsys):
    assert _parse().train.per_device_batch_size == AUTO
    for argv, reason in (
        (["--per_device_batch_size", "many"], "'many' is not a whole number or auto"),
        (["--per_device_batch_size", "0"], "must be a number of at least 1"),
        (["--grad_accum_steps", "auto"], "'auto' is not a whole number"),
    ):
        with pytest.raises(UsageError, match=reason):
            parse(STABLE, argv)
    assert configure(STABLE, {"per_device_batch_size": "auto"}).train.per_device_batch_size == AUTO
    with pytest.raises(UsageError, match="--grad_accum_steps 'auto': must be a whole number"):
        configure(STABLE, {"grad_accum_steps": "auto"})


def test_a_run_saves_the_batch_size_and_a_resumed_one_uses_it(tmp_path, limited, corpus_texts, capsys):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(corpus_texts), encoding="utf-8")
    limited(int((1 + MARGIN) * _needed(2)) + 10**6)
    flags = ["--train_file", str(path), "--block_size", "64", "--device", "cpu", "--output_dir", str(tmp_path / "run")]
    flags += ["--per_device_batch_size", "auto", "--eval_steps", "2", "--save_steps", "1"]
    assert train(parse(STABLE, [*flags, "--train_steps", "1"]))["status"] == "finished"
    assert "--per_device_batch_size auto: 2 (" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
    assert (saved["per_device_batch_size"], saved["grad_accum_steps"]) == (2, 2)
    limited(10**15)  # now more would fit
    for again in ([*flags, "--grad_accum_steps", "1"], flags[:-6], ["--output_dir", str(tmp_path / "run")]):
        resumed = parse(STABLE, [*again, "--resume", "--train_steps", "2"])
        assert fit_batch_size(resumed, SINGLE_PROCESS).train.per_device_batch_size == 2
    assert train(resumed)["steps"] == 2
    with pytest.raises(UsageError, match="--grad_accum_steps 3: the run to resume has '2'"):
        parse(STABLE, [*flags, "--grad_accum_steps", "3", "--resume"])


def test_preflight_shows_the_batch_size(capsys, tmp_path):
    assert main(["preflight", *FLAGS[:-1], str(tmp_path / "run"), "--alpha_kd", "0", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["batch_size"] == {"per_device_batch_size": 4, "grad_accum_steps": 1}


def test_without_an_estimate_the_default_is_taken_and_the_notice_gives_the_reason(limited, monkeypatch):
    def plan(*_):
        raise NotEstimated("a model needs tensor values")

    monkeypatch.setattr(fitting, "plan", plan)
    limited(10**15)
    config = fit_batch_size(_parse("--grad_accum_steps", "2"), SINGLE_PROCESS)
    assert (config.train.per_device_batch_size, config.train.grad_accum_steps) == (4, 2)
    assert "the default; memory not estimated, a model needs tensor values" in config.notices[-1]
