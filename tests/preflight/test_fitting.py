"""The cheapest options with which a run fits: which are found, what `--fit` sets, what a command line says."""

import json
import shlex

import pytest
import torch
import transformers

from sar_kd.commands.main import main
from sar_kd.commands.preflight import commands_of
from sar_kd.commands.train import train
from sar_kd.config.command_line import parse, reconfigure
from sar_kd.config.commands import CACHE, PREFLIGHT, TRAIN
from sar_kd.config.presets import MODES, STABLE
from sar_kd.config.runs import Config
from sar_kd.errors import UsageError
from sar_kd.models.loading import MetaModels
from sar_kd.preflight import fitting, memory_plan
from sar_kd.preflight.fitting import CACHE as CACHE_FOLDER
from sar_kd.preflight.fitting import cheapest_fit, fit
from sar_kd.preflight.memory_plan import MARGIN, plan
from sar_kd.runtime import environment
from sar_kd.runtime.distributed import SINGLE_PROCESS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SMALLEST = {"per_device_batch_size": 1, "grad_accum_steps": 4, "gradient_checkpointing": True}
OTHERS = (["gradient_checkpointing"], ["optimizer"], ["teacher_quantization"])
SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture
def limited(monkeypatch):
    """limited(bytes): a machine on which a run of so many bytes at the peak just fits."""
    monkeypatch.setattr(environment, "resident_memory", lambda: 0)
    monkeypatch.setattr(memory_plan, "_LIBRARIES", {"cpu": 0})

    def limit(room: int) -> None:
        monkeypatch.setattr(environment, "free_memory", lambda device: int((1 + MARGIN) * room) + 1)

    return limit


@pytest.fixture(scope="module")
def models():
    build = transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"):
        return {
            "teacher": build(transformers.LlamaConfig(**SMALL, vocab_size=4000, num_hidden_layers=2)),
            "student": build(transformers.LlamaConfig(**SMALL, vocab_size=4000, num_hidden_layers=2)),
        }


def _config(**flags) -> Config:
    values = {"per_device_batch_size": 4, "block_size": 64, "device": "cpu", **flags}
    return Config.from_options({**MODES["balanced"], **values}, "balanced")


def _needed(models, **flags) -> int:
    return plan(_config(**flags), models, CPU, torch.float32).peak.total


def _with_packages(monkeypatch, *installed):
    monkeypatch.setattr(environment, "is_installed", lambda package: package in installed)


def test_a_smaller_micro_batch_alone_is_cheapest_and_no_smaller_than_need_be(limited, models):
    limited(_needed(models, per_device_batch_size=2, grad_accum_steps=2))
    found = cheapest_fit(_config(), models, CPU, torch.float32)
    assert found.fits
    assert found.options == {"per_device_batch_size": 2, "grad_accum_steps": 2}


def test_none_of_the_options_found_can_be_left_out(limited, models, monkeypatch):
    _with_packages(monkeypatch, "peft")
    limited(_needed(models, lora_rank=16, **SMALLEST))
    found = cheapest_fit(_config(), models, CPU, torch.float32)
    assert found.fits
    assert found.options["lora_rank"] == 16
    assert found.options["student_lr"] == pytest.approx(1e-4)
    for together in ({"lora_rank", "student_lr"}, {"per_device_batch_size", "grad_accum_steps"}, *map(set, OTHERS)):
        rest = {name: value for name, value in found.options.items() if name not in together}
        if rest != found.options:
            assert plan(_config(**rest), models, CPU, torch.float32).verdict != "fits"


def test_optimizers_are_taken_before_an_adapter_and_only_installed_packages(limited, models, monkeypatch):
    sizes = {name: _needed(models, optimizer=name, **SMALLEST) for name in ("adamw", "adafactor")}
    assert sizes["adafactor"] < sizes["adamw"]
    limited(sizes["adafactor"])
    _with_packages(monkeypatch, "peft")
    assert cheapest_fit(_config(), models, CPU, torch.float32).options["optimizer"] == "adafactor"
    given = parse(STABLE, ["--student_lr", "1e-4", "--block_size", "64", "--device", "cpu"])
    found = cheapest_fit(given, models, CPU, torch.float32)  # whose rate Adafactor would read in another way
    assert "lora_rank" in found.options
    assert not {"optimizer", "student_lr"} & found.options.keys()


def test_an_option_that_is_given_is_not_changed(limited, models, monkeypatch):
    _with_packages(monkeypatch)
    limited(_needed(models, per_device_batch_size=1, grad_accum_steps=4))
    found = cheapest_fit(_config(), models, CPU, torch.float32, {"grad_accum_steps"})
    assert not {"per_device_batch_size", "grad_accum_steps"} & found.options.keys()


def test_packages_to_install_and_a_cache_come_last_and_are_named(limited, models, monkeypatch):
    _with_packages(monkeypatch)
    limited(_needed(models, lora_rank=16, **SMALLEST))
    found = cheapest_fit(_config(), models, CPU, torch.float32)
    assert found.fits
    assert found.missing
    assert f"needs `pip install {' '.join(found.missing)}`" in str(found)
    assert not cheapest_fit(_config(), models, CPU, torch.float32, may_need_more=False).fits
    _with_packages(monkeypatch, "peft", "bitsandbytes", "accelerate")
    cached = _needed(models, teacher_cache="folder", lora_rank=16, **SMALLEST)
    assert cached < _needed(models, teacher_quantization="nf4", lora_rank=16, **SMALLEST)
    limited(cached)
    found = cheapest_fit(_config(), models, CPU, torch.float32)
    assert found.fits
    assert found.options["teacher_cache"] == CACHE_FOLDER
    assert "teacher_quantization" not in found.options
    assert "a teacher cache made before" in str(found)


def test_with_a_second_gpu_the_teacher_goes_there_first(models, monkeypatch):
    gpus = [environment.Gpu(number, "T4", (7, 5), 2**34) for number in (0, 1)]
    monkeypatch.setattr(environment, "find_gpus", lambda: gpus)
    monkeypatch.setattr(environment, "free_memory", lambda device: 2**34)
    first, *rest = fitting._teacher_candidates(_config(device="cuda:0"), models["teacher"], torch.device("cuda:0"))
    assert first.options == {"teacher_device": "cuda:1"}
    assert rest[0].options["offload_teacher_to_cpu"]
    monkeypatch.setattr(environment, "free_memory", lambda device: 1000)  # it is in use
    first, *_ = fitting._teacher_candidates(_config(device="cuda:0"), models["teacher"], torch.device("cuda:0"))
    assert "offload_teacher_to_cpu" in first.options


# On the command line

FLAGS = ["--block_size", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def sizes():
    """Bytes at the peak of the embedded pair's run, with 4 blocks at once and with 2."""
    return {n: _size(["--per_device_batch_size", str(n), "--grad_accum_steps", str(4 // n)]) for n in (4, 2)}


def _size(flags) -> int:
    config = parse(TRAIN, [*FLAGS, *flags])
    return plan(config, MetaModels(config).models, CPU, torch.float32).peak.total


def test_what_fit_sets_is_what_typing_it_would(limited, sizes, tmp_path):
    limited(sizes[2])
    flags = [*FLAGS, "--output_dir", str(tmp_path / "run")]
    config = fit(parse(STABLE, [*flags, "--fit"]), SINGLE_PROCESS)
    assert config.notices[-1].startswith("--fit: sets --per_device_batch_size 2 --grad_accum_steps 2 (")
    assert config == parse(STABLE, [*flags, "--per_device_batch_size", "2", "--grad_accum_steps", "2"])
    adafactor = reconfigure(parse(STABLE, flags), {"optimizer": "adafactor"})
    assert adafactor == parse(STABLE, [*flags, "--optimizer", "adafactor"])  # its rate is another one
    assert adafactor.optim.student_lr != config.optim.student_lr


def test_fit_sets_nothing_where_the_run_fits_and_the_largest_batch_is_found_behind_it(limited, sizes):
    limited(10**12)
    config = fit(parse(STABLE, [*FLAGS, "--fit", "--per_device_batch_size", "auto"]), SINGLE_PROCESS)
    assert config.notices[-1].startswith("--fit: sets nothing, the run fits (")
    assert (config.memory.fit, config.train.per_device_batch_size) == (False, "auto")


def test_where_nothing_fits_one_line_says_what_comes_closest(limited, capsys, monkeypatch):
    _with_packages(monkeypatch, "peft")
    limited(2**16)
    assert main(["train", *FLAGS, "--fit", "--output_dir", "none"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("error: --fit: the run needs about ")
    assert "the closest is --per_device_batch_size 1 --grad_accum_steps 4" in line
    assert "options that are given keep their values" in line


def test_a_run_with_fit_is_saved_with_what_it_set_and_is_resumed(limited, sizes, tmp_path, corpus_texts, capsys):
    path, folder = tmp_path / "text.txt", tmp_path / "run"
    path.write_text("\n".join(corpus_texts), encoding="utf-8")
    limited(sizes[2])
    flags = [*FLAGS, "--train_file", str(path), "--output_dir", str(folder), "--save_steps", "1", "--fit"]
    assert train(parse(STABLE, [*flags, "--train_steps", "1"]))["status"] == "finished"
    assert "--fit: sets --per_device_batch_size 2 --grad_accum_steps 2 (" in capsys.readouterr().out
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["train"]["per_device_batch_size"], saved["train"]["grad_accum_steps"]) == (2, 2)
    assert saved["memory"]["fit"] is False
    assert not {"origin", "notices"} & saved.keys()
    limited(10**12)
    resumed = parse(STABLE, [*flags, "--resume", "--train_steps", "2"])
    assert (fit(resumed, SINGLE_PROCESS).train.per_device_batch_size, resumed.memory.fit) == (2, False)
    assert train(resumed)["steps"] == 2


def test_preflight_prints_a_command_line_that_fits(limited, sizes, tmp_path, capsys):
    limited(sizes[2])
    flags = [*FLAGS, "--output_dir", str(tmp_path / "a run"), "--alpha_ce", "0.5"]
    is_refused = sizes[4] * (1 - MARGIN) > sizes[2] * (1 + MARGIN)
    assert main(["preflight", *flags]) == (2 if is_refused else 0)
    command = capsys.readouterr().out.split("What fits:\n  ")[1].splitlines()[0]
    words = shlex.split(command)
    config = parse(TRAIN, words[words.index("train") + 1 :])
    assert config == parse(TRAIN, [*flags, "--per_device_batch_size", "2", "--grad_accum_steps", "2"])


def test_what_fits_begins_with_what_is_to_be_installed(limited, capsys, monkeypatch):
    _with_packages(monkeypatch)
    limited(_size(["--per_device_batch_size", "1", "--gradient_checkpointing", "--lora_rank", "16"]))
    main(["preflight", *FLAGS, "--student_lr", "1e-3", "--routing", "native"])  # no Adafactor, whose rate is another
    command, run, *_ = capsys.readouterr().out.split("What fits:\n")[1].splitlines()
    assert command.startswith("  pip install ")
    assert "peft" in command
    assert "--lora_rank 16" in run


def test_a_cache_is_made_by_a_command_of_its_own_before(monkeypatch):
    flags = ["--teacher_model", "a b", "--block_size", "64", "--train_file", "x.txt", "y.txt"]
    config = parse(PREFLIGHT, [*flags, "--per_device_batch_size", "8", "--mode", "precise", "--student_lr", "1e-4"])
    record = {"device": {"dtype": "float16"}, "models": {"teacher": {"parameters": 1000}}}
    for available, spread in ((2300, ""), (2299, "auto")):
        record["memory"] = {"available_bytes": available}
        first, second = commands_of(config, record, {"teacher_cache": "folder", "gradient_checkpointing": True})
        cache = parse(CACHE, shlex.split(first.split(" cache ")[1]))
        assert (cache.cache.teacher_cache, cache.cache.teacher_model, cache.data.block_size) == ("folder", "a b", 64)
        default = parse(CACHE, ["--teacher_device_map", spread] if spread else []).cache.per_device_batch_size
        assert (cache.data.train_file, cache.cache.per_device_batch_size) == (("x.txt", "y.txt"), default)
        assert cache.memory.teacher_device_map == spread
        run = parse(TRAIN, shlex.split(second.split(" train ")[1]))
        assert (run.mode, run.train.per_device_batch_size, run.models.teacher_cache) == ("precise", 8, "folder")


def test_a_resumed_run_is_advised_no_option_that_may_not_change(limited, models):
    limited(2**16)
    config = parse(STABLE, FLAGS)
    found = cheapest_fit(config, models, CPU, torch.float32, {"optimizer", "lora_rank", "per_device_batch_size"})
    assert found.options.keys() == {"gradient_checkpointing"}


def test_fit_is_refused_where_a_value_is_wrong():
    with pytest.raises(UsageError, match="--lora_rank 4: with --parallel fsdp"):
        _config().changed({"lora_rank": 4, "parallel": "fsdp"})


def test_a_given_option_in_the_way_is_named_with_what_would_fit_without_it(limited, sizes, capsys, monkeypatch):
    _with_packages(monkeypatch)
    limited(sizes[2])
    given = ["--gradient_checkpointing", "--optimizer", "adafactor", "--per_device_batch_size", "4"]
    assert main(["train", *FLAGS, *given, "--block_size", "256", "--fit", "--output_dir", "none"]) == 2
    line = capsys.readouterr().err
    assert ": without --per_device_batch_size it fits with --per_device_batch_size " in line
