"""One step of a run on fake tensors: the live bytes of each phase, by category.

Forwards, objective and backward are those of a run. Where only the data could tell, typical values are assumed: blocks
are full, and the number of teacher tokens follows from the vocabulary sizes. Stubs replace what needs tensor values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sar_kd.alignment.segments import positions_per_tile, split_range
from sar_kd.config.fields import RunConfig
from sar_kd.config.runs import OnPolicyConfig
from sar_kd.config.sections import SELF
from sar_kd.data.batch import Batch, TokenBatch
from sar_kd.evaluation.perplexity import log_probs_of
from sar_kd.losses.distillation import Distillation
from sar_kd.losses.objective import Objective
from sar_kd.losses.tiled_loss import Tile, TileGrad, TileLoss
from sar_kd.models.half_precision import compute_in_range_
from sar_kd.models.lm_head import LMHeads, backbone_of
from sar_kd.models.logit_tiles import limit_blocks
from sar_kd.models.memory_saving import Offload, assume_unpacked_sequences, offloaded_parameters, recompute_activations_
from sar_kd.models.model_checks import vocab_size_of
from sar_kd.models.optimizer_state import state_of, update_bytes
from sar_kd.models.own_base import WithoutAdapter
from sar_kd.preflight.memory_tracker import (
    OFF_DEVICE,
    MemoryTracker,
    fake_copy,
    fake_tensors,
    quantize_fake_,
    spread_fake_teacher_,
    with_adapter,
)
from sar_kd.preflight.repeated_layers import stand_in_
from sar_kd.runtime.precision import Precision
from sar_kd.teacher.moe.discovery import find_routers, router_parameters
from sar_kd.teacher.moe.routing_hooks import Routing

CATEGORIES = ("teacher", "student", "gradients", "optimizer", "activations", "loss")


@dataclass(frozen=True)
class Phase:
    """A phase of a step, and the live bytes at its peak."""

    name: str
    bytes: Mapping[str, int]
    """By category"""

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self.bytes.values())


def dry_run(
    config: RunConfig,
    models: Mapping[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    keeps_gradients: bool = False,
    runs_every_layer: bool = False,
) -> list[Phase]:
    """The phases of a step of this run on this device, and of an evaluation.

    models: 'student', and 'teacher' if there is one; on the meta device, or real; without adapters
    keeps_gradients: gradients stay allocated from step to step, as with DDP
    runs_every_layer: without `stand_in_`

    Raises: whatever a model raises that needs tensor values
    """
    models = {**models, "student": with_adapter(models["student"], config.lora, dtype)}
    with fake_tensors() as tracker, assume_unpacked_sequences(), limit_blocks(), _without_library_output():
        tracker.device = device
        run = _DryRun(config, models, Precision(device, dtype, 1.0), tracker, keeps_gradients)
        run.sample()
        if not runs_every_layer:
            run.shorten_()
        with run.routing() as trains_routers:
            run.step(trains_routers)
        run.evaluate()
    return run.phases


@contextlib.contextmanager
def _without_library_output() -> Iterator[None]:
    """Without what PyTorch logs where an operation fails on fake tensors, and libraries warn of."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _DryRun:
    """Models, objective and optimizer state of a run, and its phases one after another."""

    def __init__(
        self,
        config: Any,
        models: Mapping[str, nn.Module],
        precision: Precision,
        tracker: MemoryTracker,
        keeps_gradients: bool,
    ):
        self.config, self.precision, self.tracker = config, precision, tracker
        self.keeps_gradients, self.phases = keeps_gradients, list[Phase]()
        self.student = self._student(models["student"])
        self.is_own_teacher = getattr(config.models, "teacher_model", "") == SELF
        self.teacher: Any = self._teacher(models["teacher"]) if "teacher" in models else None
        self.teacher = WithoutAdapter(self.student) if self.is_own_teacher else self.teacher
        self.heads = LMHeads(precision)
        for model, label in ((self.student, "student"), (self.teacher, "teacher")):
            if model is not None:
                self.tracker.label = label
                self.heads.assume(model)
                self.heads.of(model)  # of a teacher on another device, a copy
        loss, block_size = config.loss, config.data.block_size
        vocab_size, teacher_size = vocab_size_of(self.student), vocab_size_of(self.teacher or self.student)
        self.block_sizes = block_size, teacher_block_size(block_size, vocab_size, teacher_size)
        self.tile_size = positions_per_tile(loss.loss_workspace_mb, vocab_size)
        pair = SimpleNamespace(
            student_vocab_size=vocab_size, teacher_vocab_size=teacher_size, num_teacher_tokens=teacher_size, tables=None
        )
        aligner: Any = SimpleNamespace(pair=pair, same_token=self._empty(torch.int64, teacher_size))
        offloads = self.teacher is not None and loss.alpha_kd > 0 and config.memory.offloads_from(precision.device)
        self.offload = StubOffload(tracker, self.teacher) if offloads else None
        # A stub replaces projection; hidden states take less memory than chunk likelihoods.
        alignment = {"projection": "auto", "hidden": "alm"}.get(loss.alignment, loss.alignment)
        runnable = dataclasses.replace(loss, alignment=alignment)
        self.objective = Objective(self.teacher, self.student, runnable, aligner, precision, self.offload, self.heads)
        projects = loss.alignment == "projection" or not _alike(vocab_size, teacher_size)
        if loss.alpha_kd > 0 and alignment == "auto" and projects:
            self.objective.distillation = StubProjection(loss, aligner)
        parameters = (*self.student.parameters(), *self.objective.parameters())
        self.trainable = [parameter for parameter in parameters if parameter.requires_grad]
        states = [state_of(parameter, config.optim.optimizer) for parameter in self.trainable]
        self.optimizer_state = [self._empty(dtype, *shape) for each in states for shape, dtype in each.values()]
        tracker.relabel(self.optimizer_state, "optimizer")
        for parameter in self.trainable:
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.relabel([p.grad], "gradients"))

    def _student(self, model: nn.Module) -> nn.Module:
        has_adapter = hasattr(model, "peft_config")
        student: Any = fake_copy(model, self.precision.device, None if has_adapter else torch.float32).train()
        if not has_adapter:
            student.requires_grad_(True)
        if self.precision.dtype is torch.float16:
            compute_in_range_(student)
        if self.config.memory.gradient_checkpointing:
            recompute_activations_(student, same_dropout=True)
        self.tracker.relabel([*student.parameters(), *student.buffers()], "student")
        self.held = [quantize_fake_(student, self.tracker, "student")] if self.config.lora.is_quantized else []
        return student

    def _teacher(self, model: nn.Module) -> nn.Module:
        memory, dtype = self.config.memory, self.precision.dtype
        device = torch.device(memory.teacher_device or self.precision.device)
        teacher = fake_copy(model, device, dtype).requires_grad_(False).eval()
        if dtype is torch.float16:
            compute_in_range_(teacher)
        self.tracker.relabel([*teacher.parameters(), *teacher.buffers()], "teacher")
        if memory.teacher_quantization != "off":
            self.held.append(quantize_fake_(teacher, self.tracker, "teacher"))
        if memory.teacher_device_map:
            spread_fake_teacher_(self.tracker, teacher, memory, self.precision)
        return teacher

    def shorten_(self) -> None:
        """Run few of the layers that are alike, from now on; of a teacher whose routing is watched, all."""
        is_watched = getattr(getattr(self.config, "routing", None), "routing", "native") != "native"
        for model in filter(None, (self.student, None if is_watched or self.is_own_teacher else self.teacher)):
            stand_in_(model, self.tracker)

    @contextlib.contextmanager
    def routing(self) -> Iterator[bool]:
        """Open the teacher's routing; yields whether its routers are trained."""
        settings: Any = getattr(self.config, "routing", None)
        kind = "native" if settings is None or self.objective.distillation is None else settings.routing
        specs = find_routers(self.teacher, settings.router_patterns) if kind != "native" else []
        if not specs:
            yield False
            return
        trains = kind in ("sar", "auto")
        rule = kind if not trains else "native" if settings.sar_routing == "native" else "all"
        with Routing(self.teacher, specs, rule, settings.ka_lambda):
            if trains:
                for parameter in router_parameters(specs).values():
                    parameter.requires_grad_(True)
                if settings.activation_checkpointing:
                    recompute_activations_(self.teacher)
            yield trains

    @contextlib.contextmanager
    def _phase(self, name: str, label: str) -> Iterator[None]:
        """Record a phase, in which new storages count as `label`."""
        self.tracker.label = label
        self.tracker.reset_peak()
        yield
        self.phases.append(Phase(name, {category: self.tracker.at_peak.get(category, 0) for category in CATEGORIES}))

    @torch.no_grad()
    def sample(self) -> None:
        """Generate on-policy responses: the prefill is run, and the cache of the last new token is added to it."""
        settings: Any = getattr(self.config, "on_policy", None)
        if settings is None or not settings.on_policy_fraction:
            return
        batch_size, prompt, total = largest_generation(settings, self.config.train, self.block_sizes[0])
        student: Any = self.student.eval()
        with self.precision.autocast():
            cache_bytes = self._prefill(student, batch_size, total)[1]
            with self._phase("sampling", "activations"):
                last_states = self._prefill(student, batch_size, prompt)[0]
                held = [self._empty(torch.uint8, cache_bytes)]
                shape = batch_size, vocab_size_of(student)
                num_sorted = _LOGITS_SORTED if settings.sample_top_p < 1 else 1
                held += [self._empty(torch.float32, *shape) for _ in range(_LOGITS_HELD)]
                student.get_output_embeddings()(last_states)
                held += [self._empty(torch.float32, *shape) for _ in range(num_sorted)]
        student.train()

    def _prefill(self, student: nn.Module, batch_size: int, length: int) -> tuple[Tensor, int]:
        """Run padded prompts: the hidden states of their last tokens, and the bytes of the cache for the next one.

        The cache is all that the output keeps alive beside the hidden states: keys and values (in a sliding window too
        those of the whole prompt, until the next token), or the state of a recurrent model, which does not grow.
        """
        before = self.tracker.num_live_bytes
        mask, ids = (self._empty(torch.int64, batch_size, length) for _ in range(2))
        out = backbone_of(student)(input_ids=ids, attention_mask=mask, use_cache=True)
        last_states, num_bytes = out.last_hidden_state[:, -1:].clone(), out.last_hidden_state.nbytes
        num_bytes += mask.nbytes + ids.nbytes + last_states.nbytes
        return last_states, max(0, self.tracker.num_live_bytes - before - num_bytes)

    def step(self, trains_routers: bool) -> None:
        """A micro-batch from forward to backward, the last of several where there are several."""
        accum_steps = self.config.train.grad_accum_steps
        joint = trains_routers and self.config.routing.sar_schedule == "joint"
        with self._phase("start", "other"):
            batch, num_rest = self._batch()
        if trains_routers and not joint:
            self._train_routers(batch)
        if accum_steps > 1 or self.keeps_gradients:
            for parameter in self.trainable:
                parameter.grad = torch.empty_like(parameter)
                self.tracker.relabel([parameter.grad], "gradients")
        teacher_outputs: list[Any] = [None]
        rest = []
        if self.offload is not None:
            with self._phase("teacher", "activations"):
                teacher_outputs = [*self.objective.precompute_teacher([batch])]
                states = teacher_outputs[0][0].states
                rest.append(states.new_empty((accum_steps - 1, *states.shape)))  # of the other micro-batches
                del states
        with self._phase("forward", "activations"):
            outputs = self.objective.forward_models(batch, teacher_outputs.pop(), teacher_grad=joint)
            states = outputs.student.states
            rest.append(states.new_empty((num_rest, states.shape[1])))
        with self._phase("loss", "loss"):
            rest.append(states.new_empty((num_rest, states.shape[1]), dtype=torch.float32))  # their gradients
            total = self.objective(batch, outputs, torch.ones((), device=self.precision.device)).total
            if joint:
                total = total + self._router_loss(batch, outputs)
            del outputs, states
        with self._phase("backward", "activations"):
            self.precision.backward(total / max(1, batch.num_target_tokens))
            del total, rest
        with self._phase("update", "optimizer"):
            self._empty(torch.uint8, update_bytes(self.trainable, self.config.optim.optimizer))  # and freed

    def _batch(self) -> tuple[Batch, int]:
        """Full blocks with as many targets as fit one tile, as the loss of one tile takes as much as that of many; and
        the number of the other targets, whose hidden states are to be added.
        """
        batch_size, sides = self.config.train.per_device_batch_size, []
        for block_size in self.block_sizes:
            input_ids = self._empty(torch.int64, batch_size, block_size)
            positions = self._empty(torch.int64, min(batch_size * (block_size - 1), self.tile_size))
            sides.append(TokenBatch(input_ids, input_ids, positions, positions))
        student, teacher = (side.positions for side in sides)
        ends = min(student, teacher, key=len)
        alignment: Any = SimpleNamespace(
            student_positions=student, teacher_positions=student, strict=student.bool(), student_chunks=student,
            teacher_chunks=teacher, num_chunks=len(ends), student_ends=ends, teacher_ends=ends,
        )  # fmt: skip
        return Batch(sides[0], sides[1], alignment, ()), batch_size * (self.block_sizes[0] - 1) - len(student)

    def _train_routers(self, batch: Batch) -> None:
        """The routers' own pass of `--sar_schedule two_stage`."""
        with self._phase("routers", "activations"):
            outputs = self.objective.forward_models(batch, student_grad=False, teacher_grad=True)
            self.tracker.label = "loss"
            total = self._router_loss(batch, outputs)
            del outputs
            self.tracker.label = "activations"
            self.precision.backward(total)
            del total
        for parameter in self.teacher.parameters():
            parameter.grad = None

    def _router_loss(self, batch: Batch, outputs) -> Tensor:
        distillation: Any = self.objective.distillation
        return distillation(batch, dataclasses.replace(outputs, student=outputs.student.detach())).loss

    def evaluate(self) -> None:
        """The evaluation of both models."""
        for parameter in () if self.keeps_gradients else self.trainable:
            parameter.grad = None
        batch, _ = self._batch()
        if self.offload is not None:
            self.offload.to_device_()
        with self._phase("evaluation", "activations"):
            for model, side in ((self.student, batch.student), (self.teacher, batch.teacher)):
                if model is not None:
                    log_probs_of(model, side, self.precision, self.heads, self.config.loss.loss_workspace_mb)

    def _empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.precision.device)


class StubOffload(Offload):
    """Moves the teacher's weights in the tracker only."""

    def __init__(self, tracker: MemoryTracker, teacher: nn.Module):
        self._tracker, self._parameters = tracker, offloaded_parameters(teacher)

    def to_device_(self) -> None:
        self._tracker.relabel(self._parameters, "teacher")

    def to_cpu_(self) -> None:
        self._tracker.relabel(self._parameters, OFF_DEVICE)


class StubProjection(Distillation):
    """Stands in for `losses.projection.loss.Projection`, which needs the text: as many tiles, and as much memory."""

    covers_text = True
    _SCRATCH = 1.3
    """Memory of comparing two tiles, beside the gradient, over that of the tiles; measured"""

    def tiles(self, batch: Batch) -> list[Tile]:
        student, teacher = batch.student.positions, batch.teacher.positions
        tiles = []
        for part in split_range(len(student), self.positions_per_tile):
            count = (part.stop - part.start) * len(teacher) // len(student)
            tiles.append(Tile(part, teacher[:count], None, None))
        return tiles

    def loss_and_grad(self, student: Tensor, teacher: Any, part: object, grad_side: str | None) -> TileLoss:
        zero = student.new_zeros(())
        student.new_empty(round(self._SCRATCH * (student.numel() + teacher.numel())))  # and freed
        grad = torch.empty_like(teacher if grad_side == "teacher" else student)
        return TileLoss(zero, zero, zero, zero, zero, TileGrad(((0, grad),)))


def teacher_block_size(block_size: int, student_vocab_size: int, teacher_vocab_size: int) -> int:
    """Teacher tokens in a student's block, as the vocabularies suggest: bytes per token grow with log V."""
    if _alike(student_vocab_size, teacher_vocab_size):
        return block_size
    return max(2, round(block_size * math.log(student_vocab_size) / math.log(teacher_vocab_size)))


def _alike(*vocab_sizes: int) -> bool:
    """Apart from padding, the sizes are those of one tokenizer."""
    return max(vocab_sizes) <= 1.02 * min(vocab_sizes)


_LOGITS_HELD, _LOGITS_SORTED = 3, 7
"""32-bit tensors of [B, V] that `generate` holds to sample a token: in its forward (logits, these without what is not
finite, probabilities), and beside them with --sample_top_p below 1 (sorted logits, their indices in 64 bits, both once
more while they are sorted, probabilities)"""


def largest_generation(config: OnPolicyConfig, train: Any, block_size: int) -> tuple[int, int, int]:
    """The largest batch that a step generates: prompts, tokens of the longest one, tokens in the KV cache at the end.

    All on-policy micro-batches of a step are generated at once. Prompts are padded to the longest, and as many tokens
    follow as the shortest has room for; the last new token does not enter the cache.
    """
    batch_size = train.per_device_batch_size * math.ceil(train.grad_accum_steps * config.on_policy_fraction)
    prompt = block_size - 1  # start token included, and room for one new token
    new_tokens = min(config.max_new_tokens, block_size - 1) if batch_size > 1 else 1
    return batch_size, prompt, prompt + new_tokens - 1
