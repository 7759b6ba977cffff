"""One step of a run on models without memory: what is alive at each moment of it, byte by byte.

The forwards, the loss and the backward are those of a run. What only numbers could tell is taken as it mostly is:
blocks are full, and the teacher's text has as many tokens as the vocabularies' sizes suggest.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sar_kd.data import Batch, TokenBatch
from sar_kd.evaluate import log_probs_of
from sar_kd.heads import Heads
from sar_kd.hollow import AWAY, Ledger, hollow, imagined, tensors_of
from sar_kd.layers import one_text_a_row, recompute_activations_
from sar_kd.lora import add_adapter
from sar_kd.models import num_rows
from sar_kd.moments import PARTS, Moment, teacher_width
from sar_kd.objective import Objective
from sar_kd.offload import Offload, travelling
from sar_kd.precision import Precision
from sar_kd.quantised import BYTES_A_WEIGHT, roundable
from sar_kd.routers import find_routers, router_parameters
from sar_kd.routing import Routing
from sar_kd.settings import RunConfig


def rehearse(
    config: RunConfig,
    skeletons: Mapping[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    keeps_gradients: bool = False,
) -> list[Moment]:
    """The moments of a step of this run on this device.

    skeletons: 'student', and 'teacher' if there is one; on the meta device, or real
    keeps_gradients: their memory is kept from step to step, as DDP does

    Raises: whatever a model raises that does not run without numbers
    """
    with imagined() as ledger, one_text_a_row():
        return _Rehearsal(config, skeletons, device, dtype, ledger, keeps_gradients).moments


class _Pretended(Offload):
    """Moves in the ledger what another moves in memory."""

    def __init__(self, ledger: Ledger, teacher: nn.Module):
        self._ledger, self._travelling = ledger, travelling(teacher)

    def come(self) -> None:
        """See `Offload`."""
        self._ledger.enter(self._travelling, "teacher")

    def leave(self) -> None:
        """See `Offload`."""
        self._ledger.enter(self._travelling, AWAY)


class _Rehearsal:
    """The parts of a run, and a step of it."""

    def __init__(
        self,
        config: Any,
        skeletons: Mapping[str, nn.Module],
        device: torch.device,
        dtype: torch.dtype,
        ledger: Ledger,
        keeps_gradients: bool,
    ):
        self.config, self.ledger, self.device, self.keeps_gradients = config, ledger, device, keeps_gradients
        self.moments: list[Moment] = []
        self.precision = Precision(device, dtype, 1.0)
        self.student = self._student(skeletons["student"], dtype)
        self.teacher: Any = None
        if "teacher" in skeletons:
            self.teacher = self._teacher(skeletons["teacher"], dtype)
        self.heads = Heads(self.precision)
        for model in filter(None, (self.student, self.teacher)):
            self.heads.assume(model)
        rows = [num_rows(model or self.student) for model in (self.student, self.teacher)]
        self.width = config.data.block_size
        self.widths = self.width, teacher_width(self.width, *rows)
        pairing: Any = SimpleNamespace(pair=SimpleNamespace(student_rows=rows[0], teacher_rows=rows[1], tables=None))
        how = dataclasses.replace(config.loss, alignment="hidden" if config.loss.alignment == "hidden" else "auto")
        offloads = self.teacher is not None and config.memory.offload_teacher_to_cpu and device.type != "cpu"
        self.offload: Any = _Pretended(ledger, self.teacher) if offloads else None
        parts = self.teacher, self.student, how, pairing, self.precision, self.offload, self.heads
        self.objective = Objective(*parts)
        learned = [p for p in (*self.student.parameters(), *self.objective.parameters()) if p.requires_grad]
        self._optimizer = [torch.empty_like(parameter) for parameter in (*learned, *learned)]  # AdamW's two moments
        ledger.enter(self._optimizer, "optimizer")
        for parameter in learned:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.enter([p.grad], "gradients"))
        self.learned = learned
        with self._routing() as routers:
            self._step(routers)
        self._evaluate()

    def _student(self, skeleton: nn.Module, dtype: torch.dtype) -> nn.Module:
        lora = getattr(self.config, "lora", None)
        adapts = lora is not None and lora.lora_rank > 0
        student: Any = hollow(skeleton, self.device, dtype if adapts else torch.float32)
        student = student.requires_grad_(True).train()
        if self.config.memory.gradient_checkpointing:
            recompute_activations_(student, same_dropout=True)
        if adapts:
            if self.config.memory.gradient_checkpointing:
                student.enable_input_require_grads()
            student = add_adapter(student, lora)
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
            self.ledger.enter(rounded, AWAY)
            for layer in roundable(teacher):  # each is put together while it computes
                layer.register_forward_pre_hook(lambda layer, _: (torch.empty_like(layer.weight), None)[1])
        return teacher

    @contextlib.contextmanager
    def _routing(self) -> Iterator[Routing | None]:
        """The teacher's routing; the one given if its routers learn."""
        settings = getattr(self.config, "routing", None)
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
        self.moments.append(Moment(name, {part: self.ledger.at_peak.get(part, 0) for part in PARTS}))

    def _batch(self) -> Batch:
        """Full blocks, every token of which is a target but the first."""
        sides = []
        for width in self.widths:
            shape = self.config.train.per_device_batch_size, width
            input_ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
            rows = torch.zeros(shape[0] * (width - 1), dtype=torch.int64, device=self.device)
            sides.append(TokenBatch(input_ids, input_ids, rows, rows))
        student, teacher = sides
        ends = rows[: len(student.rows)]
        # As long as the student's: a stand-in for whatever is compared with its rows.
        spoken = torch.zeros_like(student.rows)
        alignment: Any = SimpleNamespace(teacher_rows=spoken, teacher_ends=ends, student_ends=ends)
        return Batch(student, teacher, alignment, ())

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
        if self.offload is not None:
            with self._moment("teacher", "activations"):
                others = self._listen(batch)  # noqa: F841  # what it says about the other micro-batches
        with self._moment("forward", "activations"):
            outputs = self.objective.read(batch, teacher_learns=teacher_learns)
        with self._moment("loss", "loss"):
            total = self.objective(batch, outputs, torch.ones((), device=self.device)).total
            if teacher_learns:
                total = total + self._router_loss(batch, outputs)
            del outputs
        with self._moment("backward", "activations"):
            self.precision.backward(total / max(1, batch.num_target_tokens))
            del total
        with self._moment("update", "other"):
            pass

    def _listen(self, batch: Batch) -> Tensor:
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
