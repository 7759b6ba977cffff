"""The optimizers in a checkpoint, bit for bit; what is damaged, missing or does not fit is one line."""

import sys
from types import SimpleNamespace

import pytest
import torch

from sar_kd.config.command_line import parse
from sar_kd.config.commands import SFT
from sar_kd.config.presets import ADAFACTOR_LR_FACTOR, STABLE
from sar_kd.config.sections import GuardConfig, OptimConfig
from sar_kd.errors import UsageError
from sar_kd.runtime.environment import is_installed
from sar_kd.runtime.files import file_digest
from sar_kd.runtime.precision import Precision
from sar_kd.training import checkpoint
from sar_kd.training.guards import StepGuard
from sar_kd.training.optimizer import build_optimizer, parameters_of
from sar_kd.training.step import StepContext
from tests.helpers.runs import equal_weights

NEEDS_BITSANDBYTES = pytest.mark.skipif(not is_installed("bitsandbytes"), reason="needs bitsandbytes")
OPTIMIZER = pytest.mark.parametrize("name", ["adamw", "adafactor", pytest.param("adamw8bit", marks=NEEDS_BITSANDBYTES)])
CPU = torch.device("cpu")


def _context(make_student, name):
    student, part = make_student(128, num_hidden_layers=1), torch.nn.Linear(3, 2)
    objective = SimpleNamespace(student=student, state_dict=part.state_dict, load_state_dict=part.load_state_dict)
    optimizer = build_optimizer(student, OptimConfig(optimizer=name, student_lr=1e-2))
    return StepContext(objective, optimizer, StepGuard(GuardConfig()), Precision(CPU, torch.float16, 1024.0), 1.0)


def _step(context, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters_of(context.optimizer):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    context.optimizer.step()


@pytest.fixture
def saved(make_student, tmp_path):
    """saved(name): a checkpoint after two steps, and the context that goes on."""

    def save(name):
        context, teacher = _context(make_student, name), torch.nn.Linear(2, 3)
        for seed in range(2):
            _step(context, seed)
        checkpoint.save_checkpoint(tmp_path, context, teacher, checkpoint.TrainerState(step=2))
        return SimpleNamespace(path=tmp_path / "step-00000002", context=context, teacher=teacher)

    return save


@OPTIMIZER
def test_a_resumed_optimizer_goes_on_bit_for_bit(saved, make_student, name):
    former = saved(name)
    resumed = _context(make_student, name)
    checkpoint.load_checkpoint(former.path, resumed, former.teacher)
    for context in (former.context, resumed):
        for seed in (7, 8):
            _step(context, seed)
    weights = [[parameter.data for parameter in parameters_of(each.optimizer)] for each in (former.context, resumed)]
    assert equal_weights(*weights)
    states = [
        [{key: torch.as_tensor(value) for key, value in context.optimizer.state[parameter].items()}
         for parameter in parameters_of(context.optimizer)]
        for context in (former.context, resumed)
    ]  # fmt: skip
    assert equal_weights(*states)


def _damaged(path, change) -> None:
    tensors = torch.load(path / "state.pt", weights_only=True)
    change(tensors["optimizer"]["state"][0])
    torch.save(tensors, path / "state.pt")
    digests = (path / "digests.json").read_text().split('"')
    digests[digests.index("state.pt") + 2] = file_digest(path / "state.pt")
    (path / "digests.json").write_text('"'.join(digests))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda state: state.pop("row_var"), "is not Adafactor's"),
        (lambda state: state.update(row_var=torch.zeros(3, 1)), "row_var of parameter 0 has another shape"),
        (lambda state: state["col_var"].fill_(float("nan")), "col_var of parameter 0 is not finite"),
        (lambda state: state["row_var"].fill_(-1.0), "row_var of parameter 0 is below 0"),
    ],
)
def test_a_damaged_state_is_refused_by_name(saved, make_student, change, line):
    former = saved("adafactor")
    _damaged(former.path, change)
    with pytest.raises(UsageError, match=line):
        checkpoint.load_checkpoint(former.path, _context(make_student, "adafactor"), former.teacher)


def test_another_optimizers_state_is_refused(saved, make_student):
    former = saved("adamw")
    with pytest.raises(UsageError, match="is not Adafactor's"):
        checkpoint.load_checkpoint(former.path, _context(make_student, "adafactor"), former.teacher)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_matrices_decay_and_vectors_do_not(make_student, name):
    optimizer = build_optimizer(make_student(64), OptimConfig(optimizer=name, weight_decay=0.125))
    for group in optimizer.param_groups:
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] == 0.125}


# What cannot work


def test_without_bitsandbytes_there_is_one_line(make_student, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"--optimizer adamw8bit: needs `pip install bitsandbytes`"):
        build_optimizer(make_student(64), OptimConfig(optimizer="adamw8bit"))


def test_a_device_that_bitsandbytes_has_no_kernel_for_is_one_line(make_student, monkeypatch):
    class Unable(torch.optim.SGD):
        def step(self):
            raise NotImplementedError("no kernel\nfor this")

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=Unable))
    line = r"--optimizer adamw8bit: this bitsandbytes cannot run on cpu \(no kernel\); use adamw or adafactor"
    with pytest.raises(UsageError, match=line):
        build_optimizer(make_student(64), OptimConfig(optimizer="adamw8bit"))


@pytest.mark.parametrize(
    ("command", "line", "expected"),
    [
        (STABLE, "--optimizer adafactor --parallel fsdp", "--optimizer adafactor: its state is not sharded"),
        (STABLE, "--optimizer adamw8bit --parallel fsdp", "--optimizer adamw8bit: its state is not sharded"),
        (STABLE, "--optimizer adafactor --lora_rank 4", "--optimizer adafactor: its steps are relative"),
        (SFT, "--optimizer adafactor --lora_rank 4", "--optimizer adafactor: its steps are relative"),
    ],
)
def test_what_does_not_fit_together_is_one_line(command, line, expected):
    with pytest.raises(UsageError, match=expected):
        parse(command, line.split())


@pytest.mark.parametrize(
    ("command", "models", "rate"),
    [(STABLE, "", 1e-5 * 200), (STABLE, "--student_model s --teacher_model t", 1e-5), (SFT, "--student_model s", 2e-4)],
)
def test_the_rate_of_a_mode_is_made_one_for_adafactor_unless_given(command, models, rate):
    config = parse(command, f"--optimizer adafactor {models}".split())
    assert config.optim.student_lr == pytest.approx(ADAFACTOR_LR_FACTOR * rate)
    (line,) = (line for line in config.notices if line.startswith("--student_lr: "))
    assert line.endswith("for Adafactor, which takes it relative to the size of the weights, unless given")
    assert parse(command, f"--optimizer adafactor --student_lr 0.5 {models}".split()).optim.student_lr == 0.5
    assert parse(command, models.split()).optim.student_lr == pytest.approx(rate)
