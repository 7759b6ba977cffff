"""The memory plan: its phases and categories, how far it is from what real steps allocate, what is refused."""

import dataclasses
import gc
import json
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import transformers

from sar_kd.commands.main import main
from sar_kd.config.command_line import parse
from sar_kd.config.lora import LoraConfig
from sar_kd.config.presets import MODES, STABLE
from sar_kd.config.runs import Config, SftConfig
from sar_kd.config.sections import TeacherMemoryConfig
from sar_kd.data.batch import Batch, TokenBatch
from sar_kd.evaluation.perplexity import evaluate
from sar_kd.losses.objective import Objective
from sar_kd.models import loading
from sar_kd.models.generation import generate
from sar_kd.models.half_precision import compute_in_range_
from sar_kd.models.loading import MetaModels, vocab_size_of
from sar_kd.models.logit_tiles import vocab_blocks
from sar_kd.models.lora import add_adapter
from sar_kd.models.memory_saving import recompute_activations_
from sar_kd.preflight import dry_run as dry_run_module
from sar_kd.preflight import memory_plan
from sar_kd.preflight.checks import preflight
from sar_kd.preflight.dry_run import CATEGORIES, Phase, largest_generation, teacher_block_size
from sar_kd.preflight.fitting import advice
from sar_kd.preflight.memory_plan import MARGIN, NotEstimated, Plan, plan
from sar_kd.preflight.memory_tracker import OFF_DEVICE, MemoryTracker, fake_copy, fake_tensors
from sar_kd.runtime import environment
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.runtime.environment import is_installed, resident_memory
from sar_kd.runtime.precision import Precision
from sar_kd.teacher.live import LiveTeacher
from sar_kd.training.guards import StepGuard
from sar_kd.training.optimizer import build_optimizer
from sar_kd.training.step import StepContext, train_step

pytestmark = pytest.mark.slow

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


def _meta_models(student="llama", teacher="llama", **overrides):
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


def _plan(models=None, dtype=torch.float32, **flags) -> Plan:
    return plan(_config(**flags), models or _meta_models(), CPU, dtype)


# The tracker


def test_the_tracker_counts_live_bytes_by_label_and_keeps_the_peak():
    held = torch.ones(1000)
    with MemoryTracker("first") as tracker:
        tracker.relabel([held], "held")
        a = torch.ones(100)
        view = a[10:].view(9, 10)  # no storage of its own
        tracker.label = "second"
        b = torch.ones(50)
        del a, b
        assert tracker.live == {"held": 4000, "first": 400, "second": 0}
        del view
        tracker.relabel([held], OFF_DEVICE)
    assert tracker.live["first"] == 0
    assert tracker.peak == 4600
    assert tracker.at_peak == {"held": 4000, "first": 400, "second": 200}


def test_a_fake_copy_has_shapes_ties_and_dtypes_and_no_memory():
    model = _build(_kind("gpt2"))
    with fake_tensors():
        found = fake_copy(model, CPU, torch.float16)
        assert found.lm_head.weight is found.transformer.wte.weight
        assert {p.dtype for p in found.parameters()} == {torch.float16}
        assert [p.shape for p in found.parameters()] == [p.shape for p in model.parameters()]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())


def test_a_model_of_7_billion_parameters_is_planned_in_no_memory():
    with torch.device("meta"):
        big = _build(
            transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, vocab_size=32000)
        )
    small = _meta_models(vocab_size=32000)["student"]
    count = sum(p.numel() for p in big.parameters())
    gc.collect()
    before = resident_memory()
    found = plan(_config(), {"teacher": big, "student": small}, CPU, torch.float16)
    assert resident_memory() - before < 0.02 * 2 * count
    assert count > 6.7e9
    assert found.peak.bytes["teacher"] == pytest.approx(2 * count, rel=1e-3)


# The plan, its phases and categories


def test_the_categories_of_a_phase_add_up_and_the_largest_phase_is_the_peak():
    found = _plan(grad_accum_steps=2)
    assert [phase.name for phase in found.phases] == ["start", "forward", "loss", "backward", "update", "evaluation"]
    for phase in found.phases:
        assert tuple(phase.bytes) == CATEGORIES
        assert phase.total == sum(phase.bytes.values())
    assert found.peak.total == max(phase.total for phase in found.phases)
    assert found.needed == found.peak.total + found.baseline
    record = json.loads(json.dumps(found.record()))
    assert record["needed_bytes"] == record["phases"][record["peak"]]["total"] + record["baseline_bytes"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "moe"])
def test_weights_gradients_and_optimizer_are_counted_exactly(name):
    models = _meta_models(name, "moe")
    student, teacher = (sum(p.numel() for p in models[whose].parameters()) for whose in ("student", "teacher"))
    found = _plan(models, torch.float16)
    (update,) = (phase for phase in found.phases if phase.name == "update")
    assert update.bytes["gradients"] == 4 * student
    assert update.bytes["optimizer"] == 8 * student
    # Beside them the buffers, and rotary frequencies are all that there is.
    assert update.bytes["student"] == pytest.approx(4 * student, abs=10_000)
    assert update.bytes["teacher"] == pytest.approx(2 * teacher, abs=10_000)


def test_a_sharded_student_has_its_share_and_the_layers_that_are_gathered():
    two = type("Two", (ProcessGroup,), {"size": 2})()
    alone, shared = (
        plan(_config(parallel="fsdp"), _meta_models(), CPU, torch.float32, process_group)
        for process_group in (SINGLE_PROCESS, two)
    )
    for part in ("gradients", "optimizer"):
        assert 2 * shared.peak.bytes[part] == alone.peak.bytes[part]
    assert shared.peak.bytes["student"] > alone.peak.bytes["student"] / 2
    free = [planned.available - planned.baseline for planned in (alone, shared)]
    assert free[1] <= free[0] * 0.51


def test_a_sharded_student_is_whole_on_each_device_while_it_samples():
    two, models = type("Two", (ProcessGroup,), {"size": 2})(), _meta_models(num_hidden_layers=6)
    config = _config(parallel="fsdp", on_policy_fraction=1.0)
    weights = sum(parameter.nbytes for parameter in models["student"].parameters())
    found = {phase.name: phase.bytes for phase in plan(config, models, CPU, torch.float32, two).phases}
    assert found["sampling"]["student"] == pytest.approx(1.5 * weights, rel=0.01)  # all, beside its own share
    assert max(sizes["student"] for name, sizes in found.items() if name != "sampling") < 1.3 * weights


def test_the_float32_residual_stream_of_a_half_teacher_is_counted(monkeypatch):
    flags = {"per_device_batch_size": 8, "block_size": 512}
    models = _meta_models(intermediate_size=16)
    found = {phase.name: phase.bytes for phase in _plan(models, torch.float16, **flags).phases}
    monkeypatch.setattr(dry_run_module, "compute_in_range_", lambda model: None)
    half = {phase.name: phase.bytes for phase in _plan(models, torch.float16, **flags).phases}
    states = 8 * 512 * 64  # the last hidden states, which the loss reads
    assert found["loss"]["activations"] - half["loss"]["activations"] == pytest.approx(2 * states, rel=0.1)


def test_with_ddp_gradients_stay_allocated_from_step_to_step():
    two = type("Two", (ProcessGroup,), {"size": 2})()
    found = plan(_config(), _meta_models(), CPU, torch.float32, two)
    assert len({phase.bytes["gradients"] for phase in found.phases[1:]}) == 1
    assert found.phases[1].bytes["gradients"] > 0


# Compared with measurements


NEEDS_BITSANDBYTES = pytest.mark.skipif(not is_installed("bitsandbytes"), reason="needs bitsandbytes")


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
    if config.lora.lora_rank:
        student.to(dtype)
    for model in (teacher, student) if dtype is torch.float16 else ():
        compute_in_range_(model)
    student = add_adapter(student, config.lora)
    if config.memory.gradient_checkpointing:
        recompute_activations_(student, same_dropout=True)
    sizes = dict.fromkeys(("student_vocab_size", "teacher_vocab_size", "num_teacher_tokens"), vocab_size)
    aligner = SimpleNamespace(pair=SimpleNamespace(**sizes, tables=None))
    objective = Objective(teacher, student, config.loss, aligner, precision)
    optimizer, guard = build_optimizer(student, config.optim), StepGuard(config.guards)
    live_teacher = LiveTeacher(config, objective, aligner)
    with live_teacher:
        for step in range(2):
            batches = [_batch(vocab_size, config) for _ in range(train.grad_accum_steps)]
            routers = live_teacher.router_trainer_at(step, lambda peak: peak)
            train_step(batches, StepContext(objective, optimizer, guard, precision, 1.0, routers))
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
        ("llama", "llama", torch.float32, 9000, {"optimizer": "adafactor", "block_size": 16}),
        ("llama", "llama", torch.float16, 500, {"optimizer": "adafactor", "grad_accum_steps": 2}),
        pytest.param("llama", "llama", torch.float32, 9000, {"optimizer": "adamw8bit"}, marks=NEEDS_BITSANDBYTES),
        ("llama", "llama", torch.float32, 500, {"lora_rank": 8}),
        ("llama", "llama", torch.float16, 9000, {"lora_rank": 8, "grad_accum_steps": 2}),
        ("llama", "llama", torch.float16, 500, {"lora_rank": 8, "gradient_checkpointing": True}),
        ("moe", "moe", torch.float32, 500, {"per_device_batch_size": 4}),
        ("llama", "moe", torch.float32, 500, {"routing": "sar"}),
        ("llama", "moe", torch.float32, 500, {"routing": "sar", "sar_schedule": "two_stage"}),
        ("llama", "moe", torch.float32, 500, {"routing": "sar", "activation_checkpointing": True}),
        ("llama", "moe", torch.float16, 500, {"routing": "all"}),
    ],
)
def test_the_plan_is_within_15_percent_of_what_real_steps_allocate(student, teacher, dtype, vocab_size, flags):
    config = _config(**flags)
    models = _meta_models(student, teacher, vocab_size=vocab_size)
    found = plan(config, models, CPU, dtype)
    measured = _measured(config, {whose: model.config for whose, model in models.items()}, dtype)
    assert found.peak.total == pytest.approx(measured, rel=MARGIN)


def _sampling_peak(kind, dtype, batch_size: int, prompt: int, total: int, top_p: float) -> int:
    """Bytes at the peak of a real model's generation, beyond its weights."""
    model, precision = _build(kind).eval(), Precision(CPU, dtype, 1024.0)
    prompts = [[1] * prompt] * (batch_size - 1) + [[1]]
    limits = [1] * (batch_size - 1) + [total - prompt + 1]
    options = {"stop_token_ids": [0], "max_new_tokens": limits, "temperature": 1.0, "top_p": top_p}
    with precision.autocast():
        return _allocated(lambda: generate(model, prompts, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("name", "vocab_size", "top_p", "changes"),
    [
        ("llama", 500, 1.0, {}),
        ("llama", 500, 1.0, {"num_key_value_heads": 1}),
        ("llama", 500, 1.0, {"num_hidden_layers": 24}),  # most is the KV cache
        ("gpt2", 500, 1.0, {}),
        ("moe", 500, 1.0, {}),
        ("llama", 9000, 0.9, {}),
    ],
)
def test_the_sampling_phase_is_within_15_percent_of_what_generation_allocates(name, vocab_size, top_p, changes, dtype):
    kind = _kind(name, vocab_size, **changes)
    with torch.device("meta"):
        models = {"student": _build(kind), "teacher": _build(kind)}
    config = _config(on_policy_fraction=0.5, grad_accum_steps=5, max_new_tokens=12, sample_top_p=top_p)
    found = plan(config, models, CPU, dtype)
    (sampling,) = (phase for phase in found.phases if phase.name == "sampling")
    batch_size, prompt, total = largest_generation(config.on_policy, config.train, 64)
    assert (batch_size, prompt, total) == (6, 63, 74)
    assert sampling.bytes["gradients"] == 0
    measured = _sampling_peak(kind, dtype, batch_size, prompt, total, top_p)
    assert sampling.bytes["activations"] == pytest.approx(measured, rel=MARGIN)
    width = 32 * getattr(kind, "num_key_value_heads", kind.num_attention_heads)
    keys_and_values = batch_size * total * kind.num_hidden_layers * 2 * width * torch.finfo(dtype).bits // 8
    assert sampling.bytes["activations"] > keys_and_values


FAMILIES = {
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=500, hidden_size=64, state_size=16, num_hidden_layers=3, pad_token_id=0
    ),
    "mistral": lambda: transformers.MistralConfig(**SMALL, vocab_size=500, intermediate_size=160, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL, vocab_size=500, intermediate_size=160, head_dim=32, sliding_window=8
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SMALL, vocab_size=500, intermediate_size=64, head_dim=32, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=8,
    ),
    "jamba": lambda: transformers.JambaConfig(
        **SMALL, vocab_size=500, intermediate_size=64, num_experts=2, num_experts_per_tok=1, attn_layer_period=2,
        attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_is_planned_whatever_the_cache_holds_windows_and_states_too(family, capfd):
    kind = FAMILIES[family]()
    with torch.device("meta"):
        models = {"student": _build(kind), "teacher": _build(_kind("llama"))}
    config = _config(on_policy_fraction=0.5, grad_accum_steps=5, max_new_tokens=12)
    (sampling,) = (phase for phase in plan(config, models, CPU, torch.float32).phases if phase.name == "sampling")
    assert capfd.readouterr().err == ""
    measured = _sampling_peak(kind, torch.float32, *largest_generation(config.on_policy, config.train, 64), 1.0)
    assert sampling.bytes["activations"] == pytest.approx(measured, rel=MARGIN)


@pytest.mark.long
def test_keys_and_values_grow_with_the_response_and_the_state_of_a_recurrent_model_does_not():
    def sampling(settings, max_new_tokens: int) -> int:
        with torch.device("meta"):
            models = {"student": _build(settings), "teacher": _build(_kind("llama"))}
        config = _config(on_policy_fraction=1.0, max_new_tokens=max_new_tokens)
        return next(p.bytes["activations"] for p in plan(config, models, CPU, torch.float32).phases)

    deep = _kind("llama", num_hidden_layers=24)
    grows, stays = (sampling(kind, 60) - sampling(kind, 20) for kind in (deep, FAMILIES["mamba"]()))
    assert grows == 2 * 40 * 24 * 2 * 64 * 4  # batch, tokens, layers, keys and values, width, bytes
    assert stays == 0


def test_without_on_policy_text_there_is_no_sampling_phase_and_one_prompt_stays_within_its_block():
    assert "sampling" not in [phase.name for phase in _plan().phases]
    for batch_size, expected in ((1, (1, 63, 63)), (2, (2, 63, 125))):
        config = _config(on_policy_fraction=1.0, max_new_tokens=500, per_device_batch_size=batch_size)
        assert largest_generation(config.on_policy, config.train, 64) == expected


def test_recomputing_and_a_smaller_batch_make_the_plan_smaller():
    usual, recomputed, smaller = (
        _plan(per_device_batch_size=size, gradient_checkpointing=again).peak.bytes["activations"]
        for size, again in ((8, False), (8, True), (4, False))
    )
    assert recomputed < 0.7 * usual
    assert smaller == pytest.approx(usual / 2, rel=0.05)


def test_an_offloaded_teacher_is_off_the_device_from_forward_to_backward(monkeypatch):
    monkeypatch.setattr(TeacherMemoryConfig, "offloads_from", lambda self, device: self.offload_teacher_to_cpu)
    models = _meta_models()
    stays, offloaded = (_plan(models, offload_teacher_to_cpu=offload, grad_accum_steps=3) for offload in (False, True))
    head = 4 * models["teacher"].lm_head.weight.numel()
    names = [phase.name for phase in offloaded.phases]
    assert names == ["start", "teacher", "forward", "loss", "backward", "update", "evaluation"]
    at = {phase.name: phase.bytes["teacher"] for phase in offloaded.phases}
    assert at["start"] == at["teacher"] == at["evaluation"] == stays.peak.bytes["teacher"]
    assert at["forward"] == at["backward"] == pytest.approx(head, abs=1000)


def test_a_quantized_teacher_takes_a_bit_more_than_4_bits_for_each_linear_weight():
    models = _meta_models()
    whole, quantized = (_plan(models, torch.float16, teacher_quantization=word) for word in ("off", "nf4"))
    linear = sum(
        layer.weight.numel() for layer in models["teacher"].model.modules() if isinstance(layer, torch.nn.Linear)
    )
    saved = whole.peak.bytes["teacher"] - quantized.peak.bytes["teacher"]
    assert saved == pytest.approx((2 - 0.5625) * linear, rel=1e-3)


def test_the_weights_behind_an_adapter_take_as_little_in_4_bits():
    models = _meta_models()
    whole, quantized = (
        _plan(models, torch.float16, lora_rank=4, lora_quantization=word, gradient_checkpointing=True)
        for word in ("off", "nf4")
    )
    linear = sum(
        layer.weight.numel() for layer in models["student"].model.modules() if isinstance(layer, torch.nn.Linear)
    )
    for before, after in zip(whole.phases, quantized.phases, strict=True):
        assert before.bytes["student"] - after.bytes["student"] == pytest.approx((2 - 0.5625) * linear, rel=1e-3)


def test_the_teachers_block_size_follows_the_vocabularies():
    assert teacher_block_size(256, 1000, 1000) == teacher_block_size(256, 50257, 50304) == 256
    assert teacher_block_size(256, 1024, 2048) == round(256 * 10 / 11)
    assert teacher_block_size(256, 2048, 1024) > 256


class _DoesNotFit(transformers.LlamaForCausalLM):
    """A model in which an operation fails on fake tensors, of which PyTorch logs a traceback."""

    def forward(self, *args, **kwargs):
        return torch.ones(3) * self.lm_head.weight

    @property
    def base_model(self):
        return self


def test_a_model_that_fails_on_fake_tensors_leaves_nothing_on_the_terminal(capfd, caplog):
    with torch.device("meta"):
        models = _meta_models() | {"student": _DoesNotFit(_kind("llama"))}
    with pytest.raises(NotEstimated):
        plan(_config(alpha_kd=0.0), models, CPU, torch.float32)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


class _NeedsValues(transformers.LlamaForCausalLM):
    """A model that reads its weights, which fake tensors do not have."""

    def forward(self, *args, **kwargs):
        if self.lm_head.weight.sum() > 1e30:
            raise AssertionError
        return super().forward(*args, **kwargs)

    @property
    def base_model(self):
        return self


def _models_that_need_values():
    with torch.device("meta"):
        return _meta_models() | {"student": _NeedsValues(_kind("llama"))}


def test_a_model_that_needs_tensor_values_is_not_estimated_and_the_reason_is_one_line():
    with pytest.raises(NotEstimated, match=r"^a model needs tensor values: \w+") as caught:
        plan(_config(alpha_kd=0.0), _models_that_need_values(), CPU, torch.float32)
    assert "\n" not in str(caught.value)
    tile = torch.empty(2**20, 2)
    assert list(vocab_blocks(tile))[-1].stop >= len(tile)  # a dry run that failed leaves nothing behind


def test_a_run_whose_memory_is_not_estimated_says_so_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(MetaModels, "models", _models_that_need_values())
    lines: list[str] = []
    preflight(
        parse(STABLE, ["--alpha_kd", "0", "--device", "cpu", "--output_dir", str(tmp_path / "run")]), lines.append
    )
    (line,) = (line for line in lines if line.startswith("Memory: "))
    assert line.startswith("Memory: not estimated (a model needs tensor values: ")


# What is printed and refused


def _fixed(needed: int, available: int | None) -> Plan:
    sizes = dict.fromkeys(CATEGORIES, 0) | {"activations": needed}
    return Plan([Phase("forward", sizes)], torch.device("cuda:0"), 0, available)


@pytest.mark.parametrize(
    ("needed", "available", "verdict"),
    [(100, 116, "fits"), (100, 114, "close"), (100, 86, "close"), (100, 84, "too large"), (100, None, "unknown")],
)
def test_the_verdict_allows_for_the_plans_error_on_both_sides(needed, available, verdict):
    assert _fixed(needed, available).verdict == verdict


def test_too_little_memory_is_refused_with_options_that_fit(monkeypatch):
    monkeypatch.setattr(memory_plan, "_LIBRARIES", {"cpu": 0})
    flags = {"per_device_batch_size": 64, "block_size": 128}
    usual = _plan(**flags)
    monkeypatch.setattr(environment, "resident_memory", lambda: 0)
    monkeypatch.setattr(environment, "free_memory", lambda device: usual.peak.total // 2)
    config, models = _config(**flags), _meta_models()
    found = plan(config, models, CPU, torch.float32)
    lines, refusal, _ = advice(found, config, models, torch.float32)
    assert found.verdict == "too large"
    assert str(refusal).startswith("--per_device_batch_size 64: the run needs about ")
    assert "--force" in str(refusal)
    assert "\n" not in str(refusal)
    values = str(refusal).split("what fits: --per_device_batch_size ")[1].split()
    size, accum = int(values[0]), int(values[2])
    assert size * accum == 64
    fitted = plan(_config(**flags | {"per_device_batch_size": size}), models, CPU, torch.float32)
    assert fitted.verdict == "fits"
    forced = dataclasses.replace(config, loss=dataclasses.replace(config.loss, force=True))
    lines, refusal, _ = advice(found, forced, models, torch.float32)
    assert refusal is None
    assert "may not be enough; what fits" in lines[-1]


def test_if_the_weights_alone_are_too_large_the_remedy_is_not_a_smaller_batch(monkeypatch):
    monkeypatch.setattr(memory_plan, "_LIBRARIES", {"cpu": 0})
    monkeypatch.setattr(environment, "resident_memory", lambda: 0)
    monkeypatch.setattr(environment, "free_memory", lambda device: 2**20)
    config, models = _config(), _meta_models()
    _, refusal, _ = advice(plan(config, models, CPU, torch.float32), config, models, torch.float32)
    assert "take smaller models" in str(refusal)


def test_a_close_plan_and_a_command_without_force_give_a_warning_only(monkeypatch):
    monkeypatch.setattr(environment, "resident_memory", lambda: 0)
    monkeypatch.setattr(environment, "free_memory", lambda device: 2**20)
    models = {"student": _meta_models()["student"]}
    config = SftConfig()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, block_size=32))
    lines, refusal, _ = advice(plan(config, models, CPU, torch.float32), config, models, torch.float32)
    assert refusal is None
    assert "may not be enough" in lines[-1]


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_adapter_of_a_student_is_planned_in_float32_and_the_rest_in_half(recomputes):
    pytest.importorskip("peft")
    student = _meta_models()["student"]
    config = SftConfig(lora=LoraConfig(lora_rank=4, lora_targets=("q_proj",)))
    memory = dataclasses.replace(config.memory, gradient_checkpointing=recomputes)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, block_size=32), memory=memory)
    found = plan(config, {"student": student}, CPU, torch.float16)
    projections = [module for name, module in student.named_modules() if name.endswith("q_proj")]
    trainable = sum(4 * (module.in_features + module.out_features) for module in projections)
    weights = sum(parameter.numel() for parameter in student.parameters())
    (update,) = (phase for phase in found.phases if phase.name == "update")
    assert update.bytes["student"] == pytest.approx(2 * weights + 4 * trainable, rel=0.01)
    assert update.bytes["optimizer"] == pytest.approx(8 * trainable, rel=0.05)


def test_preflight_refuses_before_weights_are_loaded_and_shows_the_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(environment, "free_memory", lambda device: 2**24)
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("weights were read"))
    flags = ["preflight", "--output_dir", str(tmp_path / "run"), "--per_device_batch_size", "512"]
    assert main(flags) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: --per_device_batch_size 512: the run needs about ")
    assert "  backward " in printed.out
    assert main([*flags, "--json"]) == 2
    record = json.loads(capsys.readouterr().out)
    assert record["ok"] is False
    assert record["memory"]["verdict"] == "too large"
    assert main(["train", *flags[1:], "--train_steps", "1"]) == 2
    assert "--per_device_batch_size 512" in capsys.readouterr().err


def test_a_control_groups_limit_counts_and_its_page_cache_does_not(monkeypatch, tmp_path):
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


def test_the_plan_of_the_embedded_pair_has_the_sizes_of_its_models():
    meta = MetaModels(parse(STABLE, ["--device", "cpu"]))
    found = plan(meta.config, meta.models, CPU, torch.float32)
    assert found.peak.bytes["student"] == pytest.approx(4 * 430752, rel=0.01)
    assert vocab_size_of(meta.models["student"]) == 1024
    assert found.verdict == "fits"


def test_trained_routers_and_an_offloaded_or_quantized_teacher_are_refused_together(capsys):
    for flags in (["--offload_teacher_to_cpu"], ["--teacher_quantization", "nf4"]):
        assert main(["preflight", "--routing", "sar", *flags]) == 2
        assert "--routing sar: --" in capsys.readouterr().err


def test_a_line_says_that_offloading_has_no_effect_on_a_cpu(tmp_path):
    lines: list[str] = []
    flags = ["--offload_teacher_to_cpu", "--device", "cpu", "--output_dir", str(tmp_path / "run")]
    preflight(parse(STABLE, flags), lines.append)
    assert "--offload_teacher_to_cpu: has no effect, the run is on the CPU already" in lines


def test_a_missing_package_for_quantization_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sar_kd.runtime.environment.is_installed", lambda package: False)
    assert main(["preflight", "--teacher_quantization", "nf4"]) == 2
    assert capsys.readouterr().err == "error: --teacher_quantization nf4: needs `pip install bitsandbytes accelerate`\n"


@pytest.mark.parametrize("size", [1, 10**6, 10**11], ids=["bytes", "megabytes", "hundreds_of_gigabytes"])
def test_the_table_fits_into_80_columns_with_its_numbers_apart(size):
    phases = [Phase(name, dict.fromkeys(CATEGORIES, size)) for name in ("start", "evaluation")]
    header, *rows = Plan(phases, CPU, 0, None).table()
    assert {len(row) for row in (header, *rows)} == {len(header)}
    assert len(header) + 2 <= 80
    assert all(len(row.split()) == 2 + len(CATEGORIES) for row in rows)
