"""Where the student lies, as the step and the files see it: whole on one device; `several_devices` has the other ways.

A forward and the loss made of it run inside `ParallelStrategy.forward`, whatever they call in there, and nothing else knows of
a wrapper: the student stays the model that it is.

The student on several devices: whole on each of them, or in shards over them.

The gradient of a window is the sum over all ranks' micro-batches, of losses that were divided by the target tokens of
all ranks, so it is that of one process with the joined batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


class ParallelStrategy:
    """The student whole on one device, and no other process: nothing to do."""

    process_group = SINGLE_PROCESS
    is_sharded = False

    def __init__(self, *lines: str):
        """lines: what to say at the start"""
        self.lines = lines

    def takes_part(self, batch: Batch) -> bool:
        """Is this micro-batch to be run? One without targets adds nothing."""
        return batch.num_target_tokens > 0

    def window(self, batches: list[Batch]) -> Iterator[Batch]:
        """The micro-batches of a window, each to be run forward and backward before the next is asked for. At the end
        every rank has the window's gradient.
        """
        return iter(batches)

    def forward(self, compute: Callable, batch: Batch, *args):
        """`compute(batch, *args)`: what is minimised, with its graph, and anything beside it."""
        return compute(batch, *args)

    def read(self, compute: Callable):
        """`compute()`, which runs the student outside a step and without a gradient."""
        return compute()

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """L2 over all gradients, of the window of all ranks: a scalar."""
        return torch.nn.utils.get_total_norm(gradients)

    def weights(self) -> dict[str, Tensor] | None:
        """The student's weights by name, whole and on the CPU, if they are elsewhere in parts; else None."""
        return None

    def whole(self, state):
        """A nest of dicts and lists with every tensor in it whole."""
        return state

    def load_student_(self, student: nn.Module, path: Path) -> None:
        """Put the weights in a safetensors file back: all of them, or those that learn."""
        load_trainable(student, path)

    def load_optimizer_(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Put back what `whole` made of its state."""
        optimizer.load_state_dict(state)

    def like(self, state, model):
        """What `whole` made whole, in parts again where `model`, a nest of the same form, has parts."""
        return state


SINGLE_DEVICE = ParallelStrategy()


class DDP(ParallelStrategy):
    """The student whole on every device: DDP adds up the gradients bucket by bucket while the last backward runs."""

    def __init__(self, process_group: ProcessGroup, objective: Objective):
        super().__init__(f"{process_group.size} processes, the student whole on each (DDP)")
        self.process_group = process_group
        learned = [p for p in (*objective.student.parameters(), *objective.parameters()) if p.requires_grad]
        # An expert that no token of any rank chose keeps no gradient, as with one process; looking for such costs time.
        self._ddp = DistributedDataParallel(
            _Learned(learned),
            find_unused_parameters=_has_separate_experts(objective.student),
            gradient_as_bucket_view=True,
        )
        self._ddp.register_comm_hook(None, _sum_bucket)
        # DDP makes its buckets anew after the first backward. It is to do so now: what is added up in another order
        # after a resume is not the same bit for bit.
        for _ in range(2):
            self._ddp().backward()
        self._ddp.zero_grad(set_to_none=True)

    def window(self, batches: list[Batch]) -> Iterator[Batch]:
        """See `ParallelStrategy`. A rank without a target in its whole window takes part in the sum with nothing."""
        for batch in batches[:-1]:
            with self._ddp.no_sync():
                yield batch
        if batches:
            yield batches[-1]
        else:
            self._ddp().backward()

    def forward(self, compute: Callable, batch: Batch, *args):
        """See `ParallelStrategy`."""
        return self._ddp(compute, batch, *args)


class _Learned(nn.Module):
    """What DDP sees: the parameters that learn, and a forward in which anything may happen."""

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__()
        self.learned = nn.ParameterList(parameters)

    def forward(self, compute: Callable | None = None, *args):
        if compute is None:  # the backward of this sum meets the parameters as that of a model does, the last one first
            return sum(_Touch.apply(parameter) for parameter in self.learned)
        minimised, *others = compute(*args)
        return minimised + _Touch.apply(*self.learned), *others


class _Touch(torch.autograd.Function):
    """0, with a way back to every parameter on which no gradient comes: DDP waits for each of them."""

    @staticmethod
    def forward(ctx, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.count


def _sum_bucket(state, bucket):
    """The sum over ranks. DDP's own hook takes the mean; here the losses are divided already."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


class FSDP(ParallelStrategy):
    """Weights, gradients and optimizer state in equal shards over all devices: FSDP2, layer by layer, in float32.

    A layer is put together for as long as it computes; autocast casts it then, as it does elsewhere, so that the
    figures are those of one process. What no layer holds (embeddings, head, what is learned beside the student) is
    there whole while `forward` or `read` runs.
    """

    is_sharded = True

    def __init__(self, process_group: ProcessGroup, objective: Objective):
        super().__init__(f"{process_group.size} processes, the student in shards over them (FSDP)")
        self.process_group, self._objective = process_group, objective
        student, device = objective.student, objective.precision.device
        if _has_separate_experts(student):
            raise UsageError(
                "--parallel fsdp: the student's experts are modules of their own, of which two ranks may use different "
                "ones, so that their sums do not match; use --parallel ddp"
            )
        mesh = init_device_mesh(device.type, (process_group.size,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in layers_of(student):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        self._root = _Root(student, objective.distillation)
        self._shards = fully_shard(self._root, mesh=mesh, mp_policy=policy)  # the same module, by its other face

    def takes_part(self, batch: Batch) -> bool:
        """See `ParallelStrategy`. Every rank puts every layer together equally often."""
        return True

    def window(self, batches: list[Batch]) -> Iterator[Batch]:
        """See `ParallelStrategy`. Each backward adds to the shards, so that no device ever holds a whole gradient."""
        yield from batches
        for parameter in self._root.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(
                    self.process_group.size
                )  # FSDP takes the mean over ranks; the losses are divided already

    def forward(self, compute: Callable, batch: Batch, *args):
        """See `ParallelStrategy`."""
        return self._root(compute if batch.num_target_tokens else self._nothing, batch, *args)

    def _nothing(self, batch: Batch, *args) -> tuple[Tensor, LossTerms]:
        precision = self._objective.precision
        with precision.autocast():
            logits = self._objective.student(input_ids=batch.student.input_ids, use_cache=False).logits
        return _Nothing.apply(logits, *self._objective.parameters()), LossTerms.zero(precision.device)

    def read(self, compute: Callable):
        """See `ParallelStrategy`."""
        with torch.no_grad():
            found = self._root(compute)
        self._shards.reshard()  # else the next forward would meet the weights of before the next update
        return found

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See `ParallelStrategy`."""
        norm = torch.nn.utils.get_total_norm(gradients)
        assert isinstance(norm, DTensor)
        return norm.full_tensor()

    def weights(self) -> dict[str, Tensor]:
        """See `ParallelStrategy`. Empty on every rank but the first."""
        return self.whole(self._saved())

    def _saved(self) -> dict[str, Tensor]:
        """Each weight once, also one that two modules share, and what else belongs to the student."""
        student = self._objective.student
        belongs = student.state_dict().keys()
        tensors = (*student.named_parameters(), *student.named_buffers())
        return {name: tensor for name, tensor in tensors if name in belongs}

    def whole(self, state):
        """See `ParallelStrategy`. On the CPU, and empty on every rank but the first."""
        if isinstance(state, dict):
            return {key: self.whole(value) for key, value in state.items()}
        if isinstance(state, list):
            return [self.whole(value) for value in state]
        if not isinstance(state, DTensor):
            return state
        tensor = state.full_tensor().detach()
        return tensor.cpu() if self.process_group.is_rank_zero else tensor.new_empty(0)

    @torch.no_grad()
    def load_student_(self, student: nn.Module, path: Path) -> None:
        """See `ParallelStrategy`."""
        weights = safetensors.torch.load_file(str(path))
        for name, tensor in self._saved().items():
            tensor.copy_(self.like(weights[name], tensor))

    def load_optimizer_(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """See `ParallelStrategy`."""
        moments = [dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter) for parameter in parameters_of(optimizer)]
        optimizer.load_state_dict(self.like(state, {"state": dict(enumerate(moments))}))

    def like(self, state, model):
        """See `ParallelStrategy`."""
        if isinstance(state, dict):
            return {key: self.like(value, model[key]) if key in model else value for key, value in state.items()}
        if not isinstance(model, DTensor) or state.shape != model.shape:
            return state
        return distribute_tensor(state.to(model.device), model.device_mesh, model.placements)


class _Root(nn.Module):
    """What FSDP sees: all that learns, and a forward in which anything may happen."""

    def __init__(self, student: nn.Module, distillation: nn.Module | None):
        super().__init__()
        self.student, self.distillation = student, distillation

    def forward(self, compute: Callable, *args):
        return compute(*args)


class _Nothing(torch.autograd.Function):
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


def build_strategy(objective: Objective, config: TrainConfig, process_group: ProcessGroup) -> ParallelStrategy:
    """The student where `--parallel` wants it; before its optimizer is built.

    Raises: UsageError if it cannot lie so
    """
    if process_group.size == 1:
        objective.student.to(objective.precision.device)
        in_vain = "--parallel fsdp: has no effect on one process; start several with torchrun --nproc_per_node"
        return ParallelStrategy(in_vain) if config.parallel == "fsdp" else SINGLE_DEVICE
    return (FSDP if config.parallel == "fsdp" else DDP)(process_group, objective)
