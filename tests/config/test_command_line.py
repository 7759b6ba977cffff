"""The command line: legal values, precedence, modes, and what a resumed run keeps."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from sar_kd.config.command_line import configure, parse
from sar_kd.config.commands import CACHE, PREFLIGHT, SFT
from sar_kd.config.presets import EMBEDDED_LR_FACTOR, EMBEDDED_ROUTER_LR_FACTOR, FP16_SAFE, MODES, STABLE
from sar_kd.config.runs import SECTIONS, Config
from sar_kd.config.sections import LossConfig
from sar_kd.errors import UsageError
from sar_kd.version import RUN_FORMAT

OPTIONS = [
    "teacher_model", "student_model", "trust_remote_code", "teacher_cache", "teacher_system_prompt",
    "train_file", "validation_file", "text_field", "dataset_name", "dataset_config_name",
    "dataset_split", "task", "template_date",
    "block_size", "token_cache", "task_teacher_steps",
    "temperature", "alpha_kd", "alpha_ce", "logit_clamp", "logit_clamp_style", "loss_clamp", "loss_clamp_style",
    "alignment", "kd_direction", "jsd_beta", "teacher_top_k", "alm_tau", "loss_workspace_mb",
    "force",
    "routing", "router_patterns", "sar_schedule", "sar_routing", "router_lr", "router_beta", "router_anchor",
    "router_direction", "router_max_grad_norm", "router_stop_on_drift", "activation_checkpointing", "ka_lambda",
    "ka_passes",
    "recipe", "on_policy_fraction", "on_policy_start", "sample_temperature", "sample_top_p", "max_new_tokens",
    "replay_size", "replay_fraction", "keep_last",
    "control", "skip_baseline",
    "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_quantization",
    "adapter_only",
    "optimizer", "weight_decay", "warmup_steps", "lr_schedule", "student_lr",
    "model_dtype", "device", "init_loss_scale",
    "gradient_checkpointing", "fit", "teacher_device", "teacher_device_map", "teacher_max_memory",
    "offload_teacher_to_cpu", "teacher_quantization",
    "max_grad_norm", "skip_grad_norm", "skip_rule", "skip_factor", "max_nan_batches", "on_divergence",
    "train_steps", "per_device_batch_size", "grad_accum_steps", "eval_steps", "log_steps", "verbose", "quiet",
    "save_steps", "parallel", "keep_checkpoints", "time_limit", "tensorboard", "wandb", "seed", "output_dir", "resume",
    "allow_changed_inputs", "overwrite",
    "save_dtype", "push_to_hub", "public",
]  # fmt: skip

BAD_VALUES = [
    # what is typed, the value as it is shown, the remedy
    ("--temperature 0", "0", "above 0"),
    ("--temperature warm", "warm", "not a number"),
    ("--temperature 1e-300", "1e-300", "from 1e-37 to 3e38"),
    ("--temperature 1e300", "1e+300", "from 1e-37 to 3e38"),
    ("--temperature 2000", "2000", "from 0.001 to 1000"),
    ("--student_lr 1e-320", "1e-320", "from 1e-37 to 3e38"),
    ("--student_lr 1e39", "1e+39", "from 1e-37 to 3e38"),
    ("--alpha_kd 1e7", "10000000", "at most 1e+06"),
    ("--temperature nan", "nan", "above 0"),
    ("--temperature inf", "inf", "above 0"),
    ("--alpha_kd -0.1", "-0.1", "at least 0"),
    ("--alpha_ce nan", "nan", "at least 0"),
    ("--logit_clamp 0", "0", "above 0"),
    ("--loss_clamp -6", "-6", "above 0"),
    ("--logit_clamp_style soft", "soft", "normalized"),
    ("--loss_clamp_style soft", "soft", "scale"),
    ("--alignment gold", "gold", "projection"),
    ("--kd_direction backward", "backward", "reverse"),
    ("--routing sparse", "sparse", "native"),
    ("--sar_schedule three_stage", "three_stage", "joint"),
    ("--sar_routing top2", "top2", "native"),
    ("--router_lr -1", "-1", "at least 0"),
    ("--router_beta nan", "nan", "at least 0"),
    ("--router_anchor -1", "-1", "at least 0"),
    ("--router_max_grad_norm 0", "0", "above 0"),
    ("--ka_lambda 1.5", "1.5", "between 0 and 1"),
    ("--on_policy_fraction 1.5", "1.5", "between 0 and 1"),
    ("--on_policy_fraction 0.5 --alpha_kd 0", "0.5", "--alpha_kd"),
    ("--sample_top_p 0", "0", "above 0"),
    ("--sample_temperature -1", "-1", "at least 0"),
    ("--max_new_tokens 0", "0", "at least 1"),
    ("--replay_fraction 1 --replay_size 8", "1", "below 1"),
    ("--ka_passes 0", "0", "at least 1"),
    ("--jsd_beta 0", "0", "above 0 and below 1"),
    ("--jsd_beta 1", "1", "above 0 and below 1"),
    ("--jsd_beta nan", "nan", "above 0 and below 1"),
    ("--teacher_top_k -1", "-1", "at least 0"),
    ("--teacher_top_k 2.5", "2.5", "not a whole number"),
    ("--alm_tau 0", "0", "above 0"),
    ("--alm_tau inf", "inf", "above 0"),
    ("--student_lr 0", "0", "above 0"),
    ("--weight_decay -1", "-1", "at least 0"),
    ("--warmup_steps -1", "-1", "at least 0"),
    ("--warmup_steps 2.5", "2.5", "not a whole number"),
    ("--lr_schedule linear", "linear", "cosine"),
    ("--model_dtype fp16", "fp16", "float16"),
    ("--device gpu", "gpu", "cpu, cuda or cuda:N"),
    ("--device cuda:", "cuda:", "cpu, cuda or cuda:N"),
    ("--device cuda:x", "cuda:x", "cpu, cuda or cuda:N"),
    ("--device 0", "0", "cpu, cuda or cuda:N"),
    ("--teacher_device 0", "0", "cpu, cuda or cuda:N"),
    ("--init_loss_scale 0.5", "0.5", "between 1 and 16777216"),
    ("--init_loss_scale 33554432", "33554432", "between 1 and 16777216"),
    ("--init_loss_scale 3", "3", "a power of two"),
    ("--init_loss_scale nan", "nan", "between 1 and 16777216"),
    ("--max_grad_norm 0", "0", "above 0"),
    ("--skip_grad_norm inf", "inf", "above 0"),
    ("--skip_rule always", "always", "adaptive"),
    ("--skip_factor 0.5", "0.5", "at least 1"),
    ("--max_nan_batches 0", "0", "at least 1"),
    ("--train_steps 0", "0", "at least 1"),
    ("--train_steps 1e3", "1e3", "not a whole number"),
    ("--per_device_batch_size 0", "0", "at least 1"),
    ("--grad_accum_steps 0", "0", "at least 1"),
    ("--eval_steps 0", "0", "at least 1"),
    ("--log_steps 0", "0", "at least 1"),
    ("--save_steps -5", "-5", "at least 1"),
    ("--seed -1", "-1", "at least 0"),
    ("--time_limit 11", "11", "such as 11h"),
    ("--time_limit 0h", "0h", "such as 11h"),
    ("--time_limit 1m1h", "1m1h", "such as 11h"),
    ("--block_size 7", "7", "at least 8"),
    ("--mode careful", "careful", "balanced"),
    ("--dataset_config_name wikitext-2", "wikitext-2", "needs --dataset_name"),
    ("--dataset_split test", "test", "needs --dataset_name"),
    ("--template_date 31.1.2026", "31.1.2026", "must be a date such as 2026-01-31"),
    ("--validation_file held_out.txt", "held_out.txt", "needs --train_file or --dataset_name"),
]


def _parse(line: str = "", script=STABLE) -> Config:
    return parse(script, line.split())


def _message(line: str, *script) -> str:
    with pytest.raises(UsageError) as caught:
        _parse(line, *script)
    return str(caught.value)


def _options(config: Config) -> dict:
    sections = {name: part for name, part in config.to_dict().items() if name not in ("format", "mode")}
    return {name: value for section in sections.values() for name, value in section.items()}


def _save(config: Config, folder) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


@pytest.mark.parametrize(("line", "value", "remedy"), BAD_VALUES)
def test_a_bad_value_is_refused_by_option_value_and_remedy(line, value, remedy):
    message = _message(line)
    assert message.startswith(line.split()[0])
    assert value in message
    assert remedy in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("line", "both"),
    [
        ("--dataset_name wikitext --train_file a.txt", ("--dataset_name", "--train_file")),
        ("--resume --overwrite", ("--resume", "--overwrite")),
        ("--alpha_kd 0 --alpha_ce 0", ("--alpha_kd", "--alpha_ce")),
        ("--resume", ("--resume", "--output_dir")),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(line, both):
    message = _message(line)
    assert all(name in message for name in both)


@pytest.mark.parametrize("started_with", ["", "--overwrite"])
def test_resume_and_overwrite_contradict_each_other_for_every_run(tmp_path, started_with):
    _save(_parse(f"--output_dir {tmp_path} {started_with}"), tmp_path)
    assert "--overwrite" in _message(f"--resume --overwrite --output_dir {tmp_path}")


@pytest.mark.parametrize("seed", [2**64, 10**400], ids=["2**64", "10**400"])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    assert _message(f"--seed {seed}").startswith("--seed")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--temprature", "--temperature"), ("--student-lrr", "--student_lr"), ("--train_step", "--train_steps")],
)
def test_an_unknown_option_is_answered_with_the_nearest(typed, meant):
    assert _message(f"{typed} 3") == f"{typed}: no such option; did you mean {meant}?"


def test_an_unknown_option_like_no_other_is_pointed_to_the_help():
    assert _message("--zzz 1") == "--zzz: no such option; --help lists the options"


def test_a_value_after_an_option_without_one_is_answered_with_the_options_help():
    assert _message("--resume runs/first") == (
        "--resume: takes no value, not 'runs/first'; its help: continue the run in --output_dir from its checkpoint"
    )
    assert _message("runs/first --resume") == "'runs/first': belongs to no option"


def test_a_missing_value_is_refused_by_option():
    assert _message("--train_steps").startswith("--train_steps")


def test_the_options_are_these():
    assert [item.name for section in SECTIONS.values() for item in dataclasses.fields(section)] == OPTIONS


def test_the_alignments_are_these_and_each_direction_goes_with_each():
    for alignment in ("auto", "projection", "strict", "alm", "uld", "hidden"):
        for direction in ("forward", "reverse", "jsd"):
            loss = _parse(f"--alignment {alignment} --kd_direction {direction} --jsd_beta 0.1 --alm_tau 1").loss
            assert (loss.alignment, loss.kd_direction, loss.jsd_beta, loss.alm_tau) == (alignment, direction, 0.1, 1.0)


@pytest.mark.parametrize("mode", list(MODES))
def test_every_mode_distils_forward_from_the_whole_teacher_and_chooses_the_alignment_itself(mode):
    loss = _parse(f"--mode {mode}").loss
    assert (loss.alignment, loss.kd_direction, loss.teacher_top_k, loss.alm_tau) == ("auto", "forward", 0, 5.0)


def test_an_option_wins_over_the_mode():
    config = _parse("--temperature 3 --mode precise --max_grad_norm 0.25")
    assert (config.loss.temperature, config.guards.max_grad_norm) == (3.0, 0.25)
    assert config.loss.alpha_kd == MODES["precise"]["alpha_kd"]


def test_a_mode_wins_over_the_script():
    config = _parse("--mode balanced", FP16_SAFE)
    assert (config.mode, config.loss.temperature) == ("balanced", 2.0)
    assert config.precision.model_dtype == "float16"


def test_an_option_wins_over_the_script():
    assert _parse("--model_dtype float32", FP16_SAFE).precision.model_dtype == "float32"


@pytest.mark.parametrize(
    ("script", "mode", "dtype"), [(FP16_SAFE, "ultra-conservative", "float16"), (STABLE, "balanced", "auto")]
)
def test_a_script_brings_its_mode_and_dtype(script, mode, dtype):
    config = _parse("", script)
    assert (config.mode, config.precision.model_dtype) == (mode, dtype)


@pytest.mark.parametrize(
    ("mode", "rate", "temperature", "alpha_kd", "alpha_ce"),
    [("ultra-conservative", 5e-6, 1.5, 0.05, 0.95), ("balanced", 1e-5, 2.0, 0.1, 0.9)],
)
def test_a_clamped_mode_has_the_designs_values(mode, rate, temperature, alpha_kd, alpha_ce):
    config = _parse(f"--mode {mode} --student_model somewhere")
    loss, guards = config.loss, config.guards
    assert config.optim.student_lr == rate
    assert (loss.temperature, loss.alpha_kd, loss.alpha_ce) == (temperature, alpha_kd, alpha_ce)
    assert (loss.logit_clamp, loss.logit_clamp_style) == (5.0, "normalized")
    assert (loss.loss_clamp, loss.loss_clamp_style) == (6.0, "scale")
    assert (guards.max_grad_norm, guards.skip_grad_norm, guards.skip_rule) == (0.5, 2.0, "adaptive")
    assert guards.max_nan_batches == 10


@pytest.mark.parametrize("command", [STABLE, FP16_SAFE])
def test_a_recipe_is_a_set_of_defaults_in_every_mode_and_an_option_given_wins(command):
    config = _parse("--recipe on-policy --max_new_tokens 32", command)
    assert config.on_policy.max_new_tokens == 32
    assert (config.on_policy.on_policy_start, config.on_policy.on_policy_fraction) == (0.5, 0.5)
    assert config.on_policy.keep_last
    assert (config.loss.alpha_kd, config.loss.kd_direction, config.loss.logit_clamp_style) == (0.6, "forward", "off")
    assert configure(command, {"recipe": "on-policy", "max_new_tokens": 32}).on_policy == config.on_policy
    (line,) = (line for line in config.notices if line.startswith("Recipe on-policy"))
    assert "50% of the steps on the given text, then 50% of the micro-batches" in line
    with pytest.raises(UsageError, match=r"--on_policy_start 1.0: must be below 1"):
        _parse("--recipe on-policy --on_policy_start 1", command)
    with pytest.raises(UsageError, match=r"--on_policy_fraction 0.0: must be above 0 with --recipe on-policy"):
        _parse("--recipe on-policy --on_policy_fraction 0", command)
    assert ", mode " + config.mode + " with the values of recipe on-policy; " in config.summary_lines()[0]


@pytest.mark.parametrize(
    ("flags", "is_too_short"),
    [
        ("--recipe on-policy --train_steps 2 --grad_accum_steps 1", True),
        ("--recipe on-policy --train_steps 4 --grad_accum_steps 1", False),
        ("--recipe on-policy --train_steps 2 --grad_accum_steps 2", False),
        ("--on_policy_fraction 0.25 --train_steps 3 --grad_accum_steps 1", True),
        ("--on_policy_fraction 0.25 --train_steps 4 --grad_accum_steps 1", False),
        ("--train_steps 1", False),
    ],
)
def test_a_run_too_short_for_a_response_is_warned_of(flags, is_too_short):
    assert any("no response is generated in so few" in line for line in _parse(flags).notices) == is_too_short


def test_precise_has_no_clamp_and_an_adaptive_limit():
    config = _parse("--mode precise")
    assert (config.loss.logit_clamp_style, config.loss.loss_clamp_style) == ("off", "off")
    assert (config.guards.max_grad_norm, config.guards.skip_rule, config.guards.max_nan_batches) == (
        1.0,
        "adaptive",
        10,
    )


def test_every_mode_sets_existing_options_only():
    assert {name for values in MODES.values() for name in values} <= set(OPTIONS)


@pytest.mark.parametrize("line", ["", "--teacher_model elsewhere", "--mode precise"])
def test_the_rate_of_a_mode_is_multiplied_for_the_embedded_student(line):
    config = _parse(line)
    rate = MODES[config.mode]["student_lr"] * EMBEDDED_LR_FACTOR
    assert config.optim.student_lr == rate
    assert f"= {rate:g} for" in config.notices[-1]


@pytest.mark.parametrize("line", ["--student_lr 1e-5", "--student_model elsewhere"])
def test_a_rate_given_by_hand_and_a_students_own_are_used_as_they_are(line):
    config = _parse(line)
    assert config.optim.student_lr == 1e-5
    assert not [notice for notice in config.notices if "--student_lr" in notice]


@pytest.mark.parametrize(
    ("line", "rate", "is_shown"),
    [
        ("", 1e-5 * EMBEDDED_ROUTER_LR_FACTOR, False),
        ("--routing auto", 1e-5 * EMBEDDED_ROUTER_LR_FACTOR, True),
        ("--routing sar --student_model elsewhere", 1e-5 * EMBEDDED_ROUTER_LR_FACTOR, True),
        ("--routing native", 1e-5 * EMBEDDED_ROUTER_LR_FACTOR, False),
        ("--routing auto --alpha_kd 0", 1e-5 * EMBEDDED_ROUTER_LR_FACTOR, False),
        ("--routing auto --router_lr 1e-4", 1e-4, False),
        ("--routing auto --teacher_model elsewhere", 1e-5, False),
    ],
)
def test_the_routers_rate_is_multiplied_for_the_embedded_teacher(line, rate, is_shown):
    config = _parse(line)
    assert config.routing.router_lr == pytest.approx(rate)
    assert sum(f"= {rate:g} for the tiny embedded teacher" in notice for notice in config.notices) == is_shown


@pytest.mark.parametrize(
    "line",
    [
        "--output_dir out",
        "--mode precise --train_file a.txt b.jsonl --validation_file c.txt --seed 7 --overwrite --output_dir out",
        "--dataset_name wikitext --dataset_config_name wikitext-2-raw-v1 --student_lr 3e-7 --output_dir out --force",
        "--alignment alm --alm_tau 100 --kd_direction jsd --jsd_beta 0.25 --teacher_top_k 64 --output_dir out",
    ],
)
def test_config_json_gives_back_an_equal_config(line):
    config = _parse(line, FP16_SAFE)
    again = Config.from_options(_options(_through_json(config)), config.mode)
    assert again == config


def _through_json(config: Config):
    saved = json.loads(json.dumps(config.to_dict()))
    return type("Saved", (), {"to_dict": staticmethod(lambda: saved)})


def test_configs_that_differ_in_one_option_are_not_equal():
    assert _parse("--output_dir out --seed 1") != _parse("--output_dir out --seed 2")


def test_a_section_built_in_code_is_checked_too():
    with pytest.raises(UsageError, match="--temperature"):
        LossConfig(temperature=-1.0)


def test_a_run_without_a_folder_is_given_one_named_after_its_script():
    assert _parse("", FP16_SAFE).train.output_dir.startswith("runs/fp16_safe-")


def test_resume_takes_the_saved_config_whatever_the_script(tmp_path):
    saved = _parse(f"--output_dir {tmp_path} --temperature 1.25 --seed 3 --mode precise --train_file a.txt", FP16_SAFE)
    _save(saved, tmp_path)
    resumed = _parse(f"--resume --output_dir {tmp_path}", STABLE)
    assert resumed.mode == "precise"
    assert {**_options(resumed), "resume": False} == _options(saved)


@pytest.mark.parametrize(
    "change", ["--temperature 3", "--mode precise", "--seed 9", "--train_file other.txt", "--alignment uld"]
)
def test_resume_refuses_to_become_another_run(tmp_path, change):
    _save(_parse(f"--output_dir {tmp_path} --temperature 1.25"), tmp_path)
    message = _message(f"--resume --output_dir {tmp_path} {change}")
    assert all(word in message for word in (*change.split(), "the run to resume has"))


def test_resume_accepts_an_option_repeated_with_its_saved_value(tmp_path):
    _save(_parse(f"--output_dir {tmp_path} --temperature 1.25 --train_file a.txt"), tmp_path)
    resumed = _parse(f"--resume --output_dir {tmp_path} --temperature 1.25 --train_file a.txt --mode balanced")
    assert resumed.loss.temperature == 1.25


def test_resume_may_run_longer_and_shows_it(tmp_path):
    _save(_parse(f"--output_dir {tmp_path} --train_steps 10"), tmp_path)
    resumed = _parse(f"--resume --output_dir {tmp_path} --train_steps 20")
    assert resumed.train.train_steps == 20
    assert "--train_steps 20" in resumed.notices[0]


def test_resume_may_log_and_save_at_other_times_without_a_notice(tmp_path):
    _save(_parse(f"--output_dir {tmp_path}"), tmp_path)
    resumed = _parse(f"--resume --output_dir {tmp_path} --eval_steps 7 --save_steps 8 --log_steps 9")
    assert (resumed.train.eval_steps, resumed.train.save_steps, resumed.train.log_steps) == (7, 8, 9)
    assert not resumed.notices


def test_preflight_of_a_run_to_resume_takes_an_option_that_the_run_does_not_have(tmp_path):
    _save(_parse(f"--output_dir {tmp_path} --seed 3"), tmp_path)
    config = parse(PREFLIGHT, ["--resume", "--output_dir", str(tmp_path), "--json"])
    assert (config.output.json, config.train.seed, config.train.resume) == (True, 3, True)


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    assert "holds no run to resume" in _message(f"--resume --output_dir {tmp_path}")


@pytest.mark.parametrize("run_format", [None, 1, "2", True])
def test_a_run_folder_of_another_format_is_refused_in_one_line(tmp_path, run_format):
    _save(_parse(f"--output_dir {tmp_path}"), tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert saved.pop("format") == RUN_FORMAT
    path.write_text(json.dumps(saved if run_format is None else saved | {"format": run_format}))
    line = _message(f"--resume --output_dir {tmp_path}")
    assert f"{path} has run format {run_format or 1!r}, and this version reads {RUN_FORMAT}; resume it with" in line
    assert line.endswith("start a new run")
    assert "\n" not in line


@pytest.mark.parametrize("content", ["{", "\xff", "[" * 10**5], ids=["cut", "odd", "deep"])
def test_a_config_json_that_is_no_json_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    expected = f"--resume: {tmp_path / 'config.json'} is damaged, or cannot be read; put back a copy of it"
    assert _message(f"--resume --output_dir {tmp_path}").startswith(expected)


@pytest.mark.parametrize("content", [{"model_type": "llama"}, [], None, {"models": {}}], ids=str)
def test_a_model_folder_holds_no_run_to_resume(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert "holds no run to resume (config.json is not a run's)" in _message(f"--resume --output_dir {tmp_path}")


@pytest.mark.parametrize(("own", "other", "name"), [(SFT, STABLE, "train"), (STABLE, SFT, "sft")])
def test_a_run_of_another_command_names_the_command_that_resumes_it(tmp_path, own, other, name):
    _save(_parse(f"--output_dir {tmp_path}", other), tmp_path)
    kind = {"train": "distillation", "sft": "fine-tuning"}[name]
    line = _message(f"--resume --output_dir {tmp_path}", own)
    assert f"{tmp_path} holds a {kind} run; resume it with `" in line
    assert f"sar_kd {name} --resume --output_dir {tmp_path}`" in line


@pytest.mark.parametrize(
    ("change", "part"),
    [({"seed": None}, "damaged: --seed is None"), ({"seed": ...}, "no value of --seed"), ({"mode": 3}, "called 3")],
)
def test_an_option_that_a_config_json_lacks_or_cannot_have_is_named(tmp_path, change, part):
    saved = _parse(f"--output_dir {tmp_path}").to_dict()
    ((name, value),) = change.items()
    section = saved if name in saved else saved["train"]
    section[name] = value
    if value is ...:
        del section[name]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    line = _message(f"--resume --output_dir {tmp_path}")
    assert part in line
    assert line.endswith("; start a new run")


def test_an_option_that_a_run_of_an_older_version_lacks_has_its_default_if_it_may_change(tmp_path):
    saved = _parse(f"--output_dir {tmp_path}").to_dict()
    del saved["train"]["allow_changed_inputs"], saved["train"]["keep_checkpoints"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert _parse(f"--resume --output_dir {tmp_path}").train.keep_checkpoints == 2


def test_changed_inputs_are_allowed_for_one_resume_only(tmp_path):
    _save(_parse(f"--output_dir {tmp_path}"), tmp_path)
    once = _parse(f"--resume --output_dir {tmp_path} --allow_changed_inputs")
    assert once.train.allow_changed_inputs
    _save(once, tmp_path)
    assert not _parse(f"--resume --output_dir {tmp_path}").train.allow_changed_inputs
    assert "is for --resume" in _message("--allow_changed_inputs")


def test_another_scripts_run_shows_whose_settings_hold(tmp_path):
    _save(_parse(f"--output_dir {tmp_path}", FP16_SAFE), tmp_path)
    (line,) = _parse(f"--resume --output_dir {tmp_path}", STABLE).notices
    assert line == f"--resume: mode ultra-conservative and every other setting are the run's own, as {tmp_path}/" + (
        "config.json has them"
    )


def test_two_runs_of_one_second_have_different_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    first = _parse("").train.output_dir
    assert first == f"runs/stable-20260101-000000-{os.getpid()}"
    Path(first).mkdir(parents=True)
    assert _parse("").train.output_dir == f"{first}-2"
    monkeypatch.setattr(os, "getpid", lambda: 7)
    assert _parse("").train.output_dir == "runs/stable-20260101-000000-7"


@pytest.mark.parametrize(
    ("script", "shown"),
    [(FP16_SAFE, {"temperature": "1.5", "student_lr": "5e-06", "model_dtype": "float16", "alpha_ce": "0.95"}),
     (STABLE, {"temperature": "2", "student_lr": "1e-05", "model_dtype": "auto", "alpha_ce": "0.9"})],
)  # fmt: skip
def test_help_shows_the_scripts_defaults(script, shown, capsys, monkeypatch):
    entries = _help(script, capsys, monkeypatch).split("  --")
    texts = {entry.split()[0]: " ".join(entry.split("\n\n")[0].split()).replace("- ", "-") for entry in entries}
    assert {name: texts[name].rsplit("(", 1)[1].rstrip(")") for name in shown} == shown
    assert f"({script.defaults['mode']})" in texts["mode"]


def test_help_has_a_group_for_each_section_and_every_option(capsys, monkeypatch):
    text = _help(STABLE, capsys, monkeypatch)
    assert [line[:-1] for line in text.splitlines() if line[:1].isupper() and line.endswith(":")] == [
        "Models", "Text", "Loss", "Routing", "On-policy", "Control", "LoRA", "Optimizer", "Precision", "Memory",
        "Guards", "Run", "Saving",
    ]  # fmt: skip
    assert all(f"  --{name}" in text for name in OPTIONS)


@pytest.mark.parametrize(
    ("command", "line", "expected"),
    [
        (STABLE, "", ""),
        (STABLE, "--train_file t.txt", ""),
        (STABLE, "--student_model x", "no text is given"),
        (PREFLIGHT, "--student_model x", "no text is given"),
        (SFT, "--student_model x", "no text is given"),
        (SFT, "--student_model x --train_file t.txt", ""),
        (STABLE, "--student_model x --train_file t.txt", "the teacher is the embedded one"),
        (STABLE, "--teacher_model x --train_file t.txt", "the student is the embedded one"),
        (STABLE, "--student_model x --train_file t.txt --alpha_kd 0", ""),
        (STABLE, "--student_model x --task units", ""),
        (STABLE, "--teacher_model x --student_model y --train_file t.txt", ""),
        (CACHE, "--teacher_model x --train_file t.txt", ""),
        (CACHE, "--teacher_model x", "no text is given"),
    ],
)
def test_an_embedded_model_or_text_beside_a_model_of_ones_own_is_warned_of(command, line, expected):
    config = parse(command, line.split())
    found = [notice for notice in config.notices if notice.startswith("Warning: ")]
    assert len(found) == bool(expected)
    assert all(expected in notice for notice in found)


def _help(script, capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        parse(script, ["--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out
