"""One step of a run on models without memory: what is alive at each moment of it, byte by byte.

The forwards, the loss and the backward are those of a run. What only numbers could tell is taken as it mostly is:
blocks are full, and the teacher's text has as many tokens as the vocabularies' sizes suggest.

What stands in for parts of a run that want numbers, while its memory is planned on tensors that have none.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sar_kd.alignment.segments import positions_per_tile
from sar_kd.config.fields import RunConfig
from sar_kd.data.batch import Batch, TokenBatch
from sar_kd.evaluation.perplexity import log_probs_of
from sar_kd.losses.distillation import Distillation
from sar_kd.losses.objective import Objective
from sar_kd.losses.tiled_loss import Compared, Slopes, Tile, stretches_of
from sar_kd.models.lm_head import LMHeads
from sar_kd.models.loading import num_rows
from sar_kd.models.logit_tiles import few_blocks
from sar_kd.models.lora import add_adapter
from sar_kd.models.memory_saving import (
    BYTES_A_WEIGHT,
    Offload,
    one_text_a_row,
    recompute_activations_,
    roundable,
    travelling,
)
from sar_kd.preflight.memory_estimate import CATEGORIES, Phase, Writing, alike, teacher_width, writing_sizes
from sar_kd.preflight.memory_tracker import OFF_DEVICE, MemoryTracker, hollow, imagined, tensors_of
from sar_kd.runtime.precision import Precision
from sar_kd.teacher.moe.discovery import find_routers, router_parameters
from sar_kd.teacher.moe.routing_hooks import Routing


def dry_run(
    config: RunConfig,
    skeletons: Mapping[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    keeps_gradients: bool = False,
) -> list[Phase]:
    """The moments of a step of this run on this device.

    skeletons: 'student', and 'teacher' if there is one; on the meta device, or real; without adapters
    keeps_gradients: their memory is kept from step to step, as DDP does

    Raises: whatever a model raises that does not run without numbers
    """
    if _adapts(config):  # before: peft moves modules, which those that are imagined cannot be
        bare = hollow(skeletons["student"], torch.device("meta"), dtype).requires_grad_(True)
        skeletons = {**skeletons, "student": add_adapter(bare, _lora(config))}
    with imagined() as ledger, one_text_a_row(), few_blocks():
        return _Rehearsal(config, skeletons, device, dtype, ledger, keeps_gradients).moments


def _lora(config: Any) -> Any:
    return getattr(config, "lora", None)


def _adapts(config: Any) -> bool:
    lora = _lora(config)
    return lora is not None and lora.lora_rank > 0


class _Rehearsal:
    """The parts of a run, and a step of it."""

    def __init__(
        self,
        config: Any,
        skeletons: Mapping[str, nn.Module],
        device: torch.device,
        dtype: torch.dtype,
        ledger: MemoryTracker,
        keeps_gradients: bool,
    ):
        self.config, self.ledger, self.device, self.keeps_gradients = config, ledger, device, keeps_gradients
        self.moments: list[Phase] = []
        self.precision = Precision(device, dtype, 1.0)
        self.student = self._student(skeletons["student"])
        self.teacher: Any = None
        if "teacher" in skeletons:
            self.teacher = self._teacher(skeletons["teacher"], dtype)
        self.heads = LMHeads(self.precision)
        for model in filter(None, (self.student, self.teacher)):
            self.heads.assume(model)
        rows = [num_rows(model or self.student) for model in (self.student, self.teacher)]
        self.width = config.data.block_size
        self.widths = self.width, teacher_width(self.width, *rows)
        same_token = torch.zeros(rows[1], dtype=torch.int64, device=device)
        pair = SimpleNamespace(student_vocab_size=rows[0], teacher_vocab_size=rows[1], teacher_tokens=rows[1], tables=None)
        aligner: Any = SimpleNamespace(pair=pair, same_token=same_token)
        projects = config.loss.alignment == "projection" or not alike(*rows)
        in_words = config.loss.alignment in ("auto", "projection")
        # Hidden states are compared in less than likelihoods are.
        stands_in = {"auto": "auto", "projection": "auto", "hidden": "alm"}
        how = dataclasses.replace(config.loss, alignment=stands_in.get(config.loss.alignment, config.loss.alignment))
        offloads = self.teacher is not None and config.memory.offloads_from(device)
        self.offload: Any = StubOffload(ledger, self.teacher) if offloads else None
        parts = self.teacher, self.student, how, aligner, self.precision, self.offload, self.heads
        self.objective = Objective(*parts)
        if self.objective.distillation is not None and in_words and projects:
            self.objective.distillation = StubProjection(config.loss, aligner)
        learned = [p for p in (*self.student.parameters(), *self.objective.parameters()) if p.requires_grad]
        self._optimizer = [torch.empty_like(parameter) for parameter in (*learned, *learned)]  # AdamW's two moments
        ledger.enter(self._optimizer, "optimizer")
        for parameter in learned:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.enter([p.grad], "gradients"))
        self.learned = learned
        # The loss is formed in tiles: a few show what any number of them takes.
        self._most_rows = positions_per_tile(config.loss.loss_workspace_mb, rows[0])
        self._write()
        with self._routing() as routers:
            self._step(routers)
        self._evaluate()

    def _student(self, skeleton: nn.Module) -> nn.Module:
        adapts = _adapts(self.config)
        student: Any = hollow(skeleton, self.device, None if adapts else torch.float32)
        student = student.train() if adapts else student.requires_grad_(True).train()
        if self.config.memory.gradient_checkpointing:
            recompute_activations_(student, same_dropout=True)
            if adapts:
                student.enable_input_require_grads()
        self.ledger.enter(tensors_of(student), "student")
        return student

    def _teacher(self, skeleton: nn.Module, dtype: torch.dtype) -> nn.Module:
        teacher = hollow(skeleton, self.device, dtype).requires_grad_(False).eval()
        self.ledger.enter(tensors_of(teacher), "teacher")
        if self.config.memory.teacher_quantization != "off":
            rounded = [layer.weight for layer in roundable(teacher)]
            size = round(BYTES_A_WEIGHT * sum(weight.numel() for weight in rounded))
            self._rounded = torch.empty(size, dtype=torch.uint8, device=self.device)
            self.ledger.enter([self._rounded], "teacher")
            self.ledger.enter(rounded, OFF_DEVICE)
            for layer in roundable(teacher):  # each is put together while it computes
                layer.register_forward_pre_hook(lambda layer, _: (torch.empty_like(layer.weight), None)[1])
        return teacher

    @contextlib.contextmanager
    def _routing(self) -> Iterator[Routing | None]:
        """The teacher's routing; the one given if its routers learn."""
        settings: Any = getattr(self.config, "routing", None)
        word = "native" if settings is None or self.objective.distillation is None else settings.routing
        specs = find_routers(self.teacher, settings.router_patterns) if word != "native" else []
        word = "sar" if word == "auto" and specs else word
        if not specs:
            yield None
            return
        rule = {"sar": "native" if settings.sar_routing == "native" else "all"}.get(word, word)
        with Routing(self.teacher, specs, rule, settings.ka_lambda) as routing:
            if word == "sar":
                for parameter in router_parameters(specs).values():
                    parameter.requires_grad_(True)
                if settings.activation_checkpointing:
                    recompute_activations_(self.teacher)
            yield routing if word == "sar" else None

    @contextlib.contextmanager
    def _moment(self, name: str, label: str) -> Iterator[None]:
        self.ledger.label = label
        self.ledger.forget_peak()
        yield
        self.moments.append(Phase(name, {part: self.ledger.at_peak.get(part, 0) for part in CATEGORIES}))

    def _batch(self) -> Batch:
        """Full blocks, every token of which is a target but the first. Of the targets there are as many as show what
        the others take; see `_others`.
        """
        sides = []
        for width in self.widths:
            shape = self.config.train.per_device_batch_size, width
            input_ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
            count = min(shape[0] * (width - 1), self._most_rows)
            rows = torch.zeros(count, dtype=torch.int64, device=self.device)
            sides.append(TokenBatch(input_ids, input_ids, rows, rows))
        student, teacher = sides
        own, others = student.rows, teacher.rows
        ends = min(own, others, key=len)
        alignment: Any = SimpleNamespace(
            student_rows=own, teacher_rows=own, strict=own.bool(), student_chunks=own, teacher_chunks=others,
            num_chunks=len(ends), student_ends=ends, teacher_ends=ends,
        )  # fmt: skip
        return Batch(student, teacher, alignment, ())

    def _others(self, states: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What the student's rows beyond those in `_batch` take, in the dtype of their states if no other."""
        count = self.config.train.per_device_batch_size * (self.width - 1) - len(states)
        return states.new_empty((count, states.shape[1]), dtype=dtype)

    def _write(self) -> None:
        train = self.config.train
        own: Any = getattr(self.config, "on_policy", None)
        sizes = own and writing_sizes(own, train.per_device_batch_size, train.grad_accum_steps, self.width)
        if not sizes:
            return
        writing = Writing(self.student.eval(), sizes, self.precision, own.sample_top_p < 1.0)
        self.ledger.label = "activations"
        cache = writing.full_cache()
        with self._moment("writing", "activations"):
            writing.end(cache)
            del cache
            writing.begin()
        self.student.train()

    def _step(self, routers: Routing | None) -> None:
        train, teacher_learns = self.config.train, False
        with self._moment("start", "other"):
            batch = self._batch()
        if routers is not None:
            teacher_learns = self.config.routing.sar_schedule == "joint"
            if not teacher_learns:
                self._routers_alone(batch)
        if train.grad_accum_steps > 1 or self.keeps_gradients:  # from the second micro-batch on
            for parameter in self.learned:
                parameter.grad = torch.empty_like(parameter)
                self.ledger.enter([parameter.grad], "gradients")
        heard = []
        if self.offload is not None:
            with self._moment("teacher", "activations"):
                heard.append(self._listen(batch))
        with self._moment("forward", "activations"):
            outputs = self.objective.read(batch, teacher_learns=teacher_learns)
            others = [self._others(outputs.student.states)]
        with self._moment("loss", "loss"):
            others.append(self._others(outputs.student.states, torch.float32))  # their gradients
            total = self.objective(batch, outputs, torch.ones((), device=self.device)).total
            if teacher_learns:
                total = total + self._router_loss(batch, outputs)
            del outputs
        with self._moment("backward", "activations"):
            self.precision.backward(total / max(1, batch.num_target_tokens))
            del total, others, heard
        with self._moment("update", "other"):
            pass

    def _listen(self, batch: Batch) -> Tensor:
        """The teacher reads and leaves; what it has said about the window's other micro-batches."""
        self.objective.listen([batch])
        ((readout, _),) = self.objective._heard.values()
        return readout.states.new_empty((self.config.train.grad_accum_steps - 1, *readout.states.shape))

    def _router_loss(self, batch: Batch, outputs) -> Tensor:
        distillation: Any = self.objective.distillation
        return distillation(batch, dataclasses.replace(outputs, student=outputs.student.detach())).loss

    def _routers_alone(self, batch: Batch) -> None:
        with self._moment("routers", "activations"):
            outputs = self.objective.read(batch, student_learns=False, teacher_learns=True)
            self.ledger.label = "loss"
            total = self._router_loss(batch, outputs)
            del outputs
            self.ledger.label = "activations"
            self.precision.backward(total)
            del total
        for parameter in self.teacher.parameters():
            parameter.grad = None

    def _evaluate(self) -> None:
        for parameter in () if self.keeps_gradients else self.learned:
            parameter.grad = None
        batch = self._batch()
        if self.offload is not None:
            self.offload.come()
        with self._moment("evaluation", "activations"):
            self._read(self.student, batch.student)
            if self.teacher is not None:
                self._read(self.teacher, batch.teacher)

    def _read(self, model: nn.Module, batch: TokenBatch) -> None:
        log_probs_of(model, batch, self.precision, self.heads, self.config.loss.loss_workspace_mb)


class StubOffload(Offload):
    """Moves in the ledger what another moves in memory."""

    def __init__(self, ledger: MemoryTracker, teacher: nn.Module):
        self._ledger, self._travelling = ledger, travelling(teacher)

    def come(self) -> None:
        """See `Offload`."""
        self._ledger.enter(self._travelling, "teacher")

    def leave(self) -> None:
        """See `Offload`."""
        self._ledger.enter(self._travelling, OFF_DEVICE)


class StubProjection(Distillation):
    """Stands in for `projected.Projected`, which wants to know the text: the same tiles, and as much beside them."""

    covers_text = True
    _BESIDE = 1.3
    """Of a pair of tiles, what comparing them takes beside the slopes; measured (`benchmarks/memory_plan.py`)"""

    def tiles(self, batch: Batch) -> list[Tile]:
        """See `Distillation`."""
        own, others = batch.student.rows, batch.teacher.rows
        parts = stretches_of(len(own), self.tile_rows)
        return [Tile(part, others[: (part.stop - part.start) * len(others) // len(own)], None, None) for part in parts]

    def compare(self, student: Tensor, teacher: Any, part: object, learner: str | None) -> Compared:
        """See `Distillation`."""
        zero = student.new_zeros(())
        beside = student.new_empty(round(self._BESIDE * (student.numel() + teacher.numel())))
        del beside
        slopes = torch.empty_like(teacher if learner == "teacher" else student)
        return Compared(zero, zero, zero, Slopes(((0, slopes),)))
