"""The memory plan: its parts, what it is beside what real steps allocate, and what is said and refused."""

import dataclasses
import gc
import json
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import transformers

from sar_kd.commands.main import main as verbs
from sar_kd.config.command_line import parse
from sar_kd.config.presets import MODES, STABLE
from sar_kd.config.runs import Config, SftConfig
from sar_kd.config.sections import LoraConfig, TeacherMemoryConfig
from sar_kd.data.batch import Batch, TokenBatch
from sar_kd.evaluation.perplexity import evaluate
from sar_kd.losses.objective import Objective
from sar_kd.models import loading
from sar_kd.models.generation import generate
from sar_kd.models.loading import MetaModels, Models, vocab_size_of
from sar_kd.models.logit_tiles import vocab_blocks
from sar_kd.models.memory_saving import recompute_activations_
from sar_kd.preflight import memory_plan
from sar_kd.preflight.checks import preflight
from sar_kd.preflight.dry_run import dry_run
from sar_kd.preflight.memory_estimate import (
    CATEGORIES,
    Phase,
    Sizes,
    cache_bytes,
    estimate,
    teacher_width,
    writing_sizes,
)
from sar_kd.preflight.memory_plan import MARGIN, Plan, advice, plan
from sar_kd.preflight.memory_tracker import OFF_DEVICE, MemoryTracker, fake_copy, fake_tensors
from sar_kd.runtime import environment
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.runtime.environment import resident_memory
from sar_kd.runtime.precision import Precision
from sar_kd.teacher.live import build_live_teacher
from sar_kd.training.guards import StepGuard
from sar_kd.training.optimizer import build_optimizer
from sar_kd.training.step import train_step

CPU = torch.device("cpu")
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}


def _kind(name: str, vocab_size: int = 500, **overrides):
    if name == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocab_size, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    settings = SMALL | {"vocab_size": vocab_size, "intermediate_size": 160} | overrides
    if name == "llama":
        return transformers.LlamaConfig(**settings)
    return transformers.Qwen3MoeConfig(**settings, **MOE)


def _build(kind):
    return transformers.AutoModelForCausalLM.from_config(kind)


def _skeletons(student="llama", teacher="llama", **overrides):
    with torch.device("meta"):
        return {"teacher": _build(_kind(teacher, **overrides)), "student": _build(_kind(student, **overrides))}


def _config(**flags) -> Config:
    defaults = {
        "per_device_batch_size": 2,
        "block_size": 64,
        "device": "cpu",
        "skip_grad_norm": 1e9,
        "skip_rule": "fixed",
    }
    return Config.from_options({**MODES["balanced"], **defaults, **flags}, "balanced")


def _plan(skeletons=None, dtype=torch.float32, **flags) -> Plan:
    return plan(_config(**flags), skeletons or _skeletons(), CPU, dtype)


# What is counted


def test_a_ledger_counts_what_is_alive_and_remembers_the_most():
    held = torch.ones(1000)
    with MemoryTracker("first") as ledger:
        ledger.enter([held], "held")
        a = torch.ones(100)
        view = a[10:].view(9, 10)  # no storage of its own
        ledger.label = "second"
        b = torch.ones(50)
        del a, b
        assert ledger.live == {"held": 4000, "first": 400, "second": 0}
        del view
        ledger.enter([held], OFF_DEVICE)
    assert ledger.live["first"] == 0
    assert ledger.peak == 4600
    assert ledger.at_peak == {"held": 4000, "first": 400, "second": 200}


def test_a_hollow_model_has_shapes_ties_and_dtypes_and_no_memory():
    model = _build(_kind("gpt2"))
    with fake_tensors():
        found = fake_copy(model, CPU, torch.float16)
        assert found.lm_head.weight is found.transformer.wte.weight
        assert {p.dtype for p in found.parameters()} == {torch.float16}
        assert [p.shape for p in found.parameters()] == [p.shape for p in model.parameters()]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())


def test_a_model_of_7_billion_weights_is_planned_in_no_memory():
    with torch.device("meta"):
        big = _build(
            transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, vocab_size=32000)
        )
    small = _skeletons(vocab_size=32000)["student"]
    count = sum(p.numel() for p in big.parameters())
    gc.collect()
    before = resident_memory()
    found = plan(_config(), {"teacher": big, "student": small}, CPU, torch.float16)
    assert resident_memory() - before < 0.02 * 2 * count
    assert count > 6.7e9
    assert found.rehearsed
    assert found.peak.parts["teacher"] == pytest.approx(2 * count, rel=1e-3)


# The plan and its parts


def test_the_parts_of_a_moment_add_up_and_the_largest_moment_is_the_peak():
    found = _plan(grad_accum_steps=2)
    assert [moment.name for moment in found.moments] == ["start", "forward", "loss", "backward", "update", "evaluation"]
    for moment in found.moments:
        assert tuple(moment.parts) == CATEGORIES
        assert moment.total == sum(moment.parts.values())
    assert found.peak.total == max(moment.total for moment in found.moments)
    assert found.needed == found.peak.total + found.held
    record = json.loads(json.dumps(found.record()))
    assert record["needed_bytes"] == record["moments"][record["peak"]]["total"] + record["held_bytes"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "moe"])
def test_weights_gradients_and_optimizer_are_counted_exactly(name):
    skeletons = _skeletons(name, "moe")
    student, teacher = (sum(p.numel() for p in skeletons[whose].parameters()) for whose in ("student", "teacher"))
    found = _plan(skeletons, torch.float16)
    (update,) = (moment for moment in found.moments if moment.name == "update")
    assert update.parts["gradients"] == 4 * student
    assert update.parts["optimizer"] == 8 * student
    # Beside them the buffers, and rotary frequencies are all that there is.
    assert update.parts["student"] == pytest.approx(4 * student, abs=10_000)
    assert update.parts["teacher"] == pytest.approx(2 * teacher, abs=10_000)


def test_a_student_in_shards_has_its_share_and_what_computes_just_now():
    two = type("Two", (ProcessGroup,), {"size": 2})()
    alone, shared = (
        plan(_config(parallel="fsdp"), _skeletons(), CPU, torch.float32, process_group)
        for process_group in (SINGLE_PROCESS, two)
    )
    for part in ("gradients", "optimizer"):
        assert 2 * shared.peak.parts[part] == alone.peak.parts[part]
    assert shared.peak.parts["student"] > alone.peak.parts["student"] / 2
    assert shared.free <= alone.free * 0.51


def test_ddp_keeps_gradients_from_step_to_step():
    two = type("Two", (ProcessGroup,), {"size": 2})()
    found = plan(_config(), _skeletons(), CPU, torch.float32, two)
    assert len({moment.parts["gradients"] for moment in found.moments[1:]}) == 1
    assert found.moments[1].parts["gradients"] > 0


# Beside what is measured


def _measured(config, kinds, dtype) -> int:
    """Bytes at the peak of two steps and an evaluation of both models, as PyTorch's profiler saw them allocated."""
    return _allocated(lambda: _run(config, kinds, dtype, kinds["student"].vocab_size, config.train))


def _allocated(act) -> int:
    """Bytes at the peak, beyond what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        act()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def _run(config, kinds, dtype, vocab_size, train) -> None:
    precision = Precision(CPU, dtype, 1024.0)
    teacher = _build(kinds["teacher"]).to(dtype).requires_grad_(False).eval()
    student = _build(kinds["student"]).train()
    if config.memory.gradient_checkpointing:
        recompute_activations_(student, same_dropout=True)
    sizes = dict.fromkeys(("student_vocab_size", "teacher_vocab_size", "num_teacher_tokens"), vocab_size)
    aligner = SimpleNamespace(pair=SimpleNamespace(**sizes, tables=None))
    objective = Objective(teacher, student, config.loss, aligner, precision)
    optimizer, guard = build_optimizer(student, config.optim), StepGuard(config.guards)
    routing = build_live_teacher(
        config, Models(teacher, student, None, False), objective, SimpleNamespace(aligner=aligner)
    )
    with routing:
        for step in range(2):
            batches = [_batch(vocab_size, config) for _ in range(train.grad_accum_steps)]
            train_step(
                batches, objective, optimizer, guard, precision, 1.0, routing.router_trainer_at(step, lambda peak: peak)
            )
        for model in (student, teacher):
            batch = _batch(vocab_size, config).student
            evaluate(model, [batch], 1, precision, heads=objective.heads, workspace_mb=config.loss.loss_workspace_mb)


def _batch(vocab_size, config) -> Batch:
    input_ids = torch.randint(0, vocab_size, (config.train.per_device_batch_size, config.data.block_size))
    rows = torch.arange(input_ids.numel()).view_as(input_ids)[:, :-1].flatten()
    side = TokenBatch(input_ids, input_ids, rows, input_ids[:, 1:].flatten())
    return Batch(side, side, SimpleNamespace(teacher_positions=rows), ())


@pytest.mark.parametrize(
    ("student", "teacher", "dtype", "vocab_size", "flags"),
    [
        ("llama", "llama", torch.float32, 500, {}),
        ("llama", "llama", torch.float32, 500, {"gradient_checkpointing": True, "per_device_batch_size": 8}),
        ("llama", "llama", torch.float16, 500, {"grad_accum_steps": 2}),
        ("gpt2", "gpt2", torch.float16, 500, {}),
        ("gpt2", "gpt2", torch.float32, 9000, {"loss_workspace_mb": 1}),
        ("llama", "llama", torch.float32, 500, {"alpha_kd": 0.0}),
        ("moe", "moe", torch.float32, 500, {"per_device_batch_size": 4}),
        ("llama", "moe", torch.float32, 500, {"routing": "sar"}),
        ("llama", "moe", torch.float32, 500, {"routing": "sar", "sar_schedule": "two_stage"}),
        ("llama", "moe", torch.float32, 500, {"routing": "sar", "activation_checkpointing": True}),
        ("llama", "moe", torch.float16, 500, {"routing": "all"}),
    ],
)
def test_the_plan_is_within_15_percent_of_what_real_steps_allocate(student, teacher, dtype, vocab_size, flags):
    config = _config(**flags)
    skeletons = _skeletons(student, teacher, vocab_size=vocab_size)
    found = plan(config, skeletons, CPU, dtype)
    measured = _measured(config, {whose: model.config for whose, model in skeletons.items()}, dtype)
    assert found.rehearsed
    assert found.peak.total == pytest.approx(measured, rel=MARGIN)


def _peak_of_writing(kind, dtype, sizes: Sizes, top_p: float) -> int:
    """Bytes at the peak of a real model's writing, beyond its weights."""
    model, precision = _build(kind).eval(), Precision(CPU, dtype, 1024.0)
    prompts = [[1] * sizes.prompt] * (sizes.rows - 1) + [[1]]
    rooms = [1] * (sizes.rows - 1) + [sizes.total - sizes.prompt + 1]
    with precision.autocast():
        return _allocated(lambda: generate(model, prompts, stop_token_ids=[0], max_new_tokens=rooms, temperature=1.0, top_p=top_p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("name", "vocab_size", "top_p", "heads"),
    [
        ("llama", 500, 1.0, 2),
        ("llama", 500, 1.0, 1),
        ("gpt2", 500, 1.0, 2),
        ("moe", 500, 1.0, 2),
        ("llama", 9000, 0.9, 2),
    ],
)
def test_the_plan_knows_what_the_students_own_text_takes(name, vocab_size, top_p, heads, dtype):
    kind = _kind(name, vocab_size, **({"num_key_value_heads": heads} if name != "gpt2" else {}))
    with torch.device("meta"):
        skeletons = {"student": _build(kind), "teacher": _build(kind)}
    flags = {"on_policy_fraction": 0.5, "grad_accum_steps": 5, "max_new_tokens": 40, "sample_top_p": top_p}
    found = plan(_config(**flags), skeletons, CPU, dtype)
    assert found.rehearsed
    (writing,) = (moment for moment in found.moments if moment.name == "writing")
    sizes = Sizes(rows=6, prompt=63, total=102)
    assert writing_sizes(_config(**flags).on_policy, 2, 5, 64) == sizes
    assert writing.parts["gradients"] == 0
    measured = _peak_of_writing(kind, dtype, sizes, top_p)
    assert writing.parts["activations"] == pytest.approx(measured, rel=MARGIN)
    assert writing.parts["activations"] > cache_bytes(skeletons["student"], sizes, torch.finfo(dtype).bits // 8)


@pytest.mark.parametrize("name", ["llama", "gpt2", "moe"])
def test_keys_and_values_are_counted_as_the_model_keeps_them(name):
    model, sizes = _build(_kind(name)).eval(), Sizes(rows=3, prompt=5, total=7)
    kept = model(input_ids=torch.zeros(3, 7, dtype=torch.int64), use_cache=True).past_key_values
    tensors = [tensor for layer in kept.layers for tensor in (layer.keys, layer.values)]
    assert cache_bytes(model, sizes, 4) == sum(tensor.nbytes for tensor in tensors)


def test_without_own_text_nothing_is_planned_for_it_and_one_prompt_stays_within_its_block():
    assert "writing" not in [moment.name for moment in _plan().moments]
    alone = _config(on_policy_fraction=1.0, max_new_tokens=500).on_policy
    assert writing_sizes(alone, 1, 1, 64) == Sizes(rows=1, prompt=63, total=63)
    assert writing_sizes(alone, 2, 1, 64) == Sizes(rows=2, prompt=63, total=125)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_rule_of_thumb_knows_the_students_own_text_too(dtype):
    flags = {"on_policy_fraction": 1.0, "grad_accum_steps": 32, "max_new_tokens": 40}
    config, skeletons = _config(**flags), _skeletons()
    exact, rough = (
        next(moment.parts["activations"] for moment in found if moment.name == "writing")
        for found in (dry_run(config, skeletons, CPU, dtype), estimate(config, skeletons, dtype))
    )
    assert exact / 2 <= rough <= exact * 2


def test_recomputing_and_a_smaller_batch_make_the_plan_smaller():
    usual, recomputed, smaller = (
        _plan(per_device_batch_size=size, gradient_checkpointing=again).peak.parts["activations"]
        for size, again in ((8, False), (8, True), (4, False))
    )
    assert recomputed < 0.7 * usual
    assert smaller == pytest.approx(usual / 2, rel=0.05)


def test_a_teacher_that_leaves_is_not_there_while_the_student_learns(monkeypatch):
    monkeypatch.setattr(TeacherMemoryConfig, "offloads_from", lambda self, device: self.offload_teacher_to_cpu)
    skeletons = _skeletons()
    stays, leaves = (_plan(skeletons, offload_teacher_to_cpu=offload, grad_accum_steps=3) for offload in (False, True))
    head = 4 * skeletons["teacher"].lm_head.weight.numel()
    names = [moment.name for moment in leaves.moments]
    assert names == ["start", "teacher", "forward", "loss", "backward", "update", "evaluation"]
    at = {moment.name: moment.parts["teacher"] for moment in leaves.moments}
    assert at["start"] == at["teacher"] == at["evaluation"] == stays.peak.parts["teacher"]
    assert at["forward"] == at["backward"] == pytest.approx(head, abs=1000)


def test_a_rounded_teacher_takes_a_bit_more_than_4_bits_a_linear_weight():
    skeletons = _skeletons()
    whole, rounded = (_plan(skeletons, torch.float16, teacher_quantization=word) for word in ("off", "nf4"))
    linear = sum(
        layer.weight.numel() for layer in skeletons["teacher"].model.modules() if isinstance(layer, torch.nn.Linear)
    )
    saved = whole.peak.parts["teacher"] - rounded.peak.parts["teacher"]
    assert saved == pytest.approx((2 - 0.5625) * linear, rel=1e-3)


def test_the_teachers_width_follows_the_vocabularies():
    assert teacher_width(256, 1000, 1000) == teacher_width(256, 50257, 50304) == 256
    assert teacher_width(256, 1024, 2048) == round(256 * 10 / 11)
    assert teacher_width(256, 2048, 1024) > 256


class _Reads(transformers.LlamaForCausalLM):
    """A model that looks at its numbers, as none does without them."""

    def forward(self, *args, **kwargs):
        if self.lm_head.weight.sum() > 1e30:
            raise AssertionError
        return super().forward(*args, **kwargs)

    @property
    def base_model(self):
        return self


def test_a_model_that_does_not_run_without_numbers_is_planned_by_a_rule_of_thumb():
    with torch.device("meta"):
        skeletons = {"student": _Reads(_kind("llama"))}
    found = plan(_config(alpha_kd=0.0), skeletons, CPU, torch.float32)
    assert not found.rehearsed
    assert "rule of thumb" in found.lines()[0]
    tile = torch.empty(2**20, 2)
    assert list(vocab_blocks(tile))[-1].stop >= len(tile)  # a rehearsal that broke off leaves nothing behind


@pytest.mark.parametrize("names", [("llama", "llama"), ("gpt2", "gpt2"), ("moe", "moe")])
@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_rule_of_thumb_is_within_a_factor_of_two(names, flags, dtype):
    config, skeletons = _config(per_device_batch_size=16, **flags), _skeletons(*names)
    exact, rough = (
        max(moment.total for moment in found)
        for found in (dry_run(config, skeletons, CPU, dtype), estimate(config, skeletons, dtype))
    )
    assert exact / 2 <= rough <= exact * 2


# What is said and refused


def _fixed(needed: int, free: int | None) -> Plan:
    parts = dict.fromkeys(CATEGORIES, 0) | {"activations": needed}
    return Plan([Phase("forward", parts)], torch.device("cuda:0"), 0, free, True)


@pytest.mark.parametrize(
    ("needed", "free", "verdict"),
    [(100, 116, "fits"), (100, 114, "close"), (100, 86, "close"), (100, 84, "too large"), (100, None, "unknown")],
)
def test_the_verdict_leaves_the_plans_own_error_to_both_sides(needed, free, verdict):
    assert _fixed(needed, free).verdict == verdict


def test_too_little_memory_is_refused_with_what_would_fit(monkeypatch):
    monkeypatch.setattr(memory_plan, "_LIBRARIES", {"cpu": 0})
    flags = {"per_device_batch_size": 64, "block_size": 128}
    usual = _plan(**flags)
    monkeypatch.setattr(environment, "resident_memory", lambda: 0)
    monkeypatch.setattr(environment, "free_memory", lambda device: usual.peak.total // 2)
    config, skeletons = _config(**flags), _skeletons()
    found = plan(config, skeletons, CPU, torch.float32)
    lines, refusal = advice(found, config, skeletons, torch.float32)
    assert found.verdict == "too large"
    assert str(refusal).startswith("--per_device_batch_size 64: the run needs about ")
    assert "--force" in str(refusal)
    assert "\n" not in str(refusal)
    words = str(refusal).split("what fits: --per_device_batch_size ")[1].split()
    size, accum = int(words[0]), int(words[2])
    assert size * accum == 64
    fitted = plan(_config(**flags | {"per_device_batch_size": size}), skeletons, CPU, torch.float32)
    assert fitted.verdict == "fits"
    forced = dataclasses.replace(config, loss=dataclasses.replace(config.loss, force=True))
    lines, refusal = advice(found, forced, skeletons, torch.float32)
    assert refusal is None
    assert "may not be enough; what fits" in lines[-1]


def test_weights_that_are_too_large_alone_are_not_answered_with_a_smaller_batch(monkeypatch):
    monkeypatch.setattr(memory_plan, "_LIBRARIES", {"cpu": 0})
    monkeypatch.setattr(environment, "resident_memory", lambda: 0)
    monkeypatch.setattr(environment, "free_memory", lambda device: 2**20)
    config, skeletons = _config(), _skeletons()
    _, refusal = advice(plan(config, skeletons, CPU, torch.float32), config, skeletons, torch.float32)
    assert "take smaller models" in str(refusal)


def test_a_close_plan_and_a_verb_without_force_are_warned_only(monkeypatch):
    monkeypatch.setattr(environment, "resident_memory", lambda: 0)
    monkeypatch.setattr(environment, "free_memory", lambda device: 2**20)
    skeletons = {"student": _skeletons()["student"]}
    config = SftConfig()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, block_size=32))
    lines, refusal = advice(plan(config, skeletons, CPU, torch.float32), config, skeletons, torch.float32)
    assert refusal is None
    assert "may not be enough" in lines[-1]


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_student_with_an_adapter_is_rehearsed_with_what_learns_in_float32(recomputes):
    pytest.importorskip("peft")
    student = _skeletons()["student"]
    config = SftConfig(lora=LoraConfig(lora_rank=4, lora_targets=("q_proj",)))
    memory = dataclasses.replace(config.memory, gradient_checkpointing=recomputes)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, block_size=32), memory=memory)
    found = plan(config, {"student": student}, CPU, torch.float16)
    assert found.rehearsed
    projections = [module for name, module in student.named_modules() if name.endswith("q_proj")]
    learned = sum(4 * (module.in_features + module.out_features) for module in projections)
    weights = sum(parameter.numel() for parameter in student.parameters())
    (update,) = (moment for moment in found.moments if moment.name == "update")
    assert update.parts["student"] == pytest.approx(2 * weights + 4 * learned, rel=0.01)
    assert update.parts["optimizer"] == pytest.approx(8 * learned, rel=0.05)


def test_preflight_refuses_before_any_weight_is_read_and_shows_the_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(environment, "free_memory", lambda device: 2**24)
    monkeypatch.setattr(loading, "_load_model", lambda *a, **k: pytest.fail("weights were read"))
    flags = ["preflight", "--output_dir", str(tmp_path / "run"), "--per_device_batch_size", "512"]
    assert verbs(flags) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: --per_device_batch_size 512: the run needs about ")
    assert "  backward " in printed.out
    assert verbs([*flags, "--json"]) == 2
    record = json.loads(capsys.readouterr().out)
    assert record["ok"] is False
    assert record["memory"]["verdict"] == "too large"
    assert verbs(["train", *flags[1:], "--train_steps", "1"]) == 2
    assert "--per_device_batch_size 512" in capsys.readouterr().err


def test_a_control_groups_limit_counts_and_what_it_caches_does_not(monkeypatch, tmp_path):
    for name, text in (
        ("memory.max", "3000000"),
        ("memory.current", "2500000"),
        ("memory.stat", "anon 5\ninactive_file 700000\n"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(environment, "_CGROUPS", {tmp_path: ("memory.max", "memory.current", "inactive_file")})
    assert environment.free_memory(CPU) == 1_200_000
    (tmp_path / "memory.max").write_text("max\n")
    assert environment.free_memory(CPU) > 10_000_000


def test_the_embedded_pairs_plan_is_what_its_models_are():
    subject = MetaModels(parse(STABLE, ["--device", "cpu"]))
    found = plan(subject.config, subject.models, CPU, torch.float32)
    assert found.rehearsed
    assert found.peak.parts["student"] == pytest.approx(4 * 430752, rel=0.01)
    assert vocab_size_of(subject.models["student"]) == 1024
    assert found.verdict == "fits"


def test_routers_that_learn_and_a_teacher_that_leaves_are_refused_together(capsys):
    for flags in (["--offload_teacher_to_cpu"], ["--teacher_quantization", "nf4"]):
        assert verbs(["preflight", "--routing", "sar", *flags]) == 2
        assert "--routing sar: --" in capsys.readouterr().err


def test_an_offload_on_a_cpu_says_that_it_does_nothing(tmp_path):
    lines: list[str] = []
    flags = ["--offload_teacher_to_cpu", "--device", "cpu", "--output_dir", str(tmp_path / "run")]
    preflight(parse(STABLE, flags), lines.append)
    assert "--offload_teacher_to_cpu: has no effect, the run is on the CPU already" in lines


def test_a_missing_package_for_rounding_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sar_kd.models.memory_saving.is_installed", lambda package: False)
    assert verbs(["preflight", "--teacher_quantization", "nf4"]) == 2
    assert capsys.readouterr().err == "error: --teacher_quantization nf4: needs `pip install bitsandbytes accelerate`\n"
