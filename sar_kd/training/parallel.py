"""How the student is distributed over devices: on one, replicated (DDP), or sharded (FSDP2).

The forward and its loss run inside `ParallelStrategy.forward`; no other module sees a DDP or FSDP wrapper, the student
stays the model that it is. The gradient of a step is the sum over all ranks' micro-batches, of losses divided by the
target tokens of all ranks: that of one process with the joined batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sar_kd.config.sections import TrainConfig
from sar_kd.data.batch import Batch
from sar_kd.errors import UsageError
from sar_kd.losses.objective import LossTerms, Objective
from sar_kd.models.lora import load_trainable
from sar_kd.models.memory_saving import layers_of
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.training.optimizer import parameters_of


def build_strategy(objective: Objective, config: TrainConfig, process_group: ProcessGroup) -> ParallelStrategy:
    """Distribute the student as `--parallel` asks; call it before the optimizer is built.

    Raises: UsageError if the student cannot be sharded
    """
    if process_group.size == 1:
        objective.student.to(objective.precision.device)
        return SINGLE_DEVICE
    return (FSDP if config.parallel == "fsdp" else DDP)(process_group, objective)


class ParallelStrategy:
    """One process, one device: nothing is wrapped."""

    process_group = SINGLE_PROCESS
    is_sharded = False

    def __init__(self, *messages: str):
        """messages: to log at the start"""
        self.messages = messages

    def needs_forward(self, batch: Batch) -> bool:
        """Is this micro-batch run? Without targets it adds nothing to loss or gradient."""
        return batch.num_target_tokens > 0

    def accumulate(self, batches: list[Batch]) -> Iterator[Batch]:
        """Yield a step's micro-batches; the caller runs forward and backward of each before it takes the next. After
        the last one every rank holds the step's gradient.
        """
        return iter(batches)

    def forward(self, compute: Callable, batch: Batch, *args):
        """`compute(batch, *args)`: the loss with its graph, and anything beside it."""
        return compute(batch, *args)

    def inference(self, compute: Callable, whole: bool = False):
        """`compute()`, which runs the student outside a step and without a gradient.

        whole: with a forward for each token, whose number differs between ranks
        """
        return compute()

    def grad_norm(self, gradients: list[Tensor]) -> Tensor:
        """L2 norm over all gradients of all ranks: a scalar."""
        return torch.nn.utils.get_total_norm(gradients)

    def large_grad_norm(self, gradients: list[Tensor]) -> float:
        """`grad_norm` where float32 may not hold the sum of squares; inf or nan if a gradient is. A host read.

        norm = 2^100 * ||gradients / 2^100||
        """
        norms = [self.grad_norm([gradient / 2.0**100]) for gradient in gradients]
        return torch.stack(norms).norm().item() * 2.0**100

    def full_weights(self) -> dict[str, Tensor] | None:
        """The student's full weights by name, on the CPU, if it is sharded; else None."""
        return None

    def full_tensors(self, state):
        """A nest of dicts and lists with every sharded tensor in it gathered."""
        return state

    def load_student_(self, student: nn.Module, path: Path) -> None:
        """Load the weights in a safetensors file: all of them, or the trainable ones."""
        load_trainable(student, path)

    def load_optimizer_(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Load an optimizer's state dict of full tensors."""
        optimizer.load_state_dict(state)

    def shard_like(self, state, reference):
        """The inverse of `full_tensors`: shard each tensor as its counterpart in `reference`, a nest of the same form,
        is sharded.
        """
        return state


SINGLE_DEVICE = ParallelStrategy()


class DDP(ParallelStrategy):
    """The student replicated on every device, through `torch.nn.parallel.DistributedDataParallel`: gradients are summed
    bucket by bucket while the last backward runs.
    """

    def __init__(self, process_group: ProcessGroup, objective: Objective):
        super().__init__(f"{process_group.size} processes, the student replicated on each (DDP)")
        self.process_group = process_group
        trainable = [p for p in (*objective.student.parameters(), *objective.parameters()) if p.requires_grad]
        # An expert that no token of any rank chose gets no gradient, as with one process; finding such experts is slow.
        self._ddp = DistributedDataParallel(
            _TrainableParameters(trainable),
            find_unused_parameters=_has_separate_experts(objective.student),
            gradient_as_bucket_view=True,
        )
        self._ddp.register_comm_hook(None, _sum_bucket)
        # DDP rebuilds its buckets after the first backward. Let it do so now: sums in another order after a resume
        # would not be the same bit for bit.
        for _ in range(2):
            self._ddp().backward()
        self._ddp.zero_grad(set_to_none=True)

    def accumulate(self, batches: list[Batch]) -> Iterator[Batch]:
        for batch in batches[:-1]:
            with self._ddp.no_sync():
                yield batch
        if batches:
            yield batches[-1]
        else:  # a rank without a target in the whole step takes part in the sum with zeros
            self._ddp().backward()

    def forward(self, compute: Callable, batch: Batch, *args):
        return self._ddp(compute, batch, *args)


class _TrainableParameters(nn.Module):
    """The module that DDP wraps: the trainable parameters, and a forward that runs any function."""

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__()
        self.trainable = nn.ParameterList(parameters)

    def forward(self, compute: Callable | None = None, *args):
        if compute is None:  # the backward of this sum meets the parameters as a model's does, the last one first
            return sum(_ZeroWithoutGradient.apply(parameter) for parameter in self.trainable)
        total, *others = compute(*args)
        return total + _ZeroWithoutGradient.apply(*self.trainable), *others


class _ZeroWithoutGradient(torch.autograd.Function):
    """0 with a graph to every parameter, along which no gradient comes: DDP waits for each parameter."""

    @staticmethod
    def forward(ctx, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.count


def _sum_bucket(state, bucket):
    """The sum over ranks; DDP's own hook takes the mean, and here the losses are divided already."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


class FSDP(ParallelStrategy):
    """Weights, gradients and optimizer state sharded over all devices, through `torch.distributed.fsdp.fully_shard`
    (FSDP2), layer by layer, in float32.

    A layer is gathered while it computes; autocast casts it then, as elsewhere, so the numbers are those of one
    process. Parameters outside the layers (embeddings, head, those of the objective) are gathered while `forward` or
    `inference` runs; a `whole` inference gathers every layer once, before it begins.
    """

    is_sharded = True

    def __init__(self, process_group: ProcessGroup, objective: Objective):
        super().__init__(f"{process_group.size} processes, the student sharded over them (FSDP)")
        self.process_group, self._objective = process_group, objective
        student, device = objective.student, objective.precision.device
        if _has_separate_experts(student):
            raise UsageError(
                "--parallel fsdp: the student's experts are modules of their own, of which two ranks may use different "
                "ones, so that their sums do not match; use --parallel ddp"
            )
        mesh = init_device_mesh(device.type, (process_group.size,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        self._layers = [fully_shard(layer, mesh=mesh, mp_policy=policy) for layer in layers_of(student)]
        self._root = _Root(student, objective.distillation)
        self._fsdp_root = fully_shard(self._root, mesh=mesh, mp_policy=policy)  # the same module, typed as FSDPModule

    def needs_forward(self, batch: Batch) -> bool:
        return True  # every rank must gather every layer equally often

    def accumulate(self, batches: list[Batch]) -> Iterator[Batch]:
        yield from batches  # each backward reduces into the shards: no device ever holds a full gradient
        for parameter in self._root.parameters():
            if parameter.grad is not None:  # FSDP takes the mean over ranks; the losses are divided already
                parameter.grad.mul_(self.process_group.size)

    def forward(self, compute: Callable, batch: Batch, *args):
        return self._root(compute if batch.num_target_tokens else self._zero_loss, batch, *args)

    def _zero_loss(self, batch: Batch, *args) -> tuple[Tensor, LossTerms]:
        precision = self._objective.precision
        with precision.autocast():
            logits = self._objective.student(input_ids=batch.student.input_ids, use_cache=False).logits
        return _ZeroWithZeroGradient.apply(logits, *self._objective.parameters()), LossTerms.zero(precision.device)

    def inference(self, compute: Callable, whole: bool = False):
        with torch.no_grad():
            result = self._root(partial(self._with_all_layers, compute) if whole else compute)
        self._fsdp_root.reshard()  # else the next forward would use the weights of before the next update
        return result

    def _with_all_layers(self, compute: Callable):
        """`compute()` with every layer gathered, so that no forward in it waits for another rank."""
        for layer in self._layers:
            layer.set_reshard_after_forward(False)
            layer.unshard()
        try:
            return compute()
        finally:
            for layer in self._layers:
                layer.set_reshard_after_forward(True)
                layer.reshard()

    def grad_norm(self, gradients: list[Tensor]) -> Tensor:
        norm = torch.nn.utils.get_total_norm(gradients)
        assert isinstance(norm, DTensor)
        return norm.full_tensor()

    def full_weights(self) -> dict[str, Tensor]:
        """As the base class; empty tensors on every rank but rank 0."""
        return self.full_tensors(self._student_tensors())

    def _student_tensors(self) -> dict[str, Tensor]:
        """Parameters and saved buffers of the student; a parameter that two modules share stands once."""
        student = self._objective.student
        saved = student.state_dict().keys()
        tensors = (*student.named_parameters(), *student.named_buffers())
        return {name: tensor for name, tensor in tensors if name in saved}

    def full_tensors(self, state):
        """As the base class; on the CPU, and empty on every rank but rank 0."""
        if isinstance(state, dict):
            return {key: self.full_tensors(value) for key, value in state.items()}
        if isinstance(state, list):
            return [self.full_tensors(value) for value in state]
        if not isinstance(state, DTensor):
            return state
        tensor = state.full_tensor().detach()
        return tensor.cpu() if self.process_group.is_rank_zero else tensor.new_empty(0)

    @torch.no_grad()
    def load_student_(self, student: nn.Module, path: Path) -> None:
        weights = safetensors.torch.load_file(str(path))
        for name, tensor in self._student_tensors().items():
            tensor.copy_(self.shard_like(weights[name], tensor))

    def load_optimizer_(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        moments = [dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter) for parameter in parameters_of(optimizer)]
        optimizer.load_state_dict(self.shard_like(state, {"state": dict(enumerate(moments))}))

    def shard_like(self, state, reference):
        if isinstance(state, dict):
            return {
                key: self.shard_like(value, reference[key]) if key in reference else value
                for key, value in state.items()
            }
        if not isinstance(reference, DTensor) or state.shape != reference.shape:
            return state
        return distribute_tensor(state.to(reference.device), reference.device_mesh, reference.placements)


class _Root(nn.Module):
    """The module that FSDP wraps: everything trainable, and a forward that runs any function."""

    def __init__(self, student: nn.Module, distillation: nn.Module | None):
        super().__init__()
        self.student, self.distillation = student, distillation

    def forward(self, compute: Callable, *args):
        return compute(*args)


class _ZeroWithZeroGradient(torch.autograd.Function):
    """0, whose gradient is 0 whatever the tensors hold."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.zeros_like, ctx.saved_tensors))


def _has_separate_experts(student: nn.Module) -> bool:
    """Are there experts that are modules of their own, so that a step may leave one without any gradient?"""
    return any(isinstance(part, nn.ModuleList) and name.endswith("experts") for name, part in student.named_modules())
