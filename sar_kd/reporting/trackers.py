"""TensorBoard and Weights & Biases: where a run's figures also go, if they are asked for."""

from __future__ import annotations

import abc
import math
import re
from pathlib import Path
from typing import Any

from sar_kd.config.fields import RunConfig
from sar_kd.errors import UsageError
from sar_kd.runtime.environment import is_installed


def find_trackers(config: RunConfig) -> list[Tracker]:
    """Those that the command line asks for.

    Raises: UsageError if the package for one is not installed
    """
    kinds = {"tensorboard": TensorBoard, "wandb": Wandb}
    asked = [name for name in kinds if getattr(config.train, name)]
    for name in asked:
        if not is_installed(name):
            raise UsageError(f"--{name}: needs `pip install {name}`")
    return [kinds[name](config) for name in asked]


class Tracker(abc.ABC):
    """Sends the figures of steps and validations on; opened with the first of them."""

    def __init__(self, config: RunConfig):
        self.config = config
        self._target: Any = None

    def record(self, record: dict) -> None:
        """Send the numbers of one line of `metrics.jsonl`."""
        if record["event"] == "rewind":
            return
        if self._target is None:
            self._target = self._open(Path(self.config.train.output_dir), record["step"])
        self._send(_figures("train" if record["event"] == "step" else "validation", record), record["step"])

    def finish(self, summary: dict) -> None:
        """Send the summary's numbers."""
        if self._target is not None:
            self._send(_figures("summary", summary), summary["steps"])

    def close(self) -> None:
        """Let what was sent arrive."""
        if self._target is not None:
            self._end()
            self._target = None

    @abc.abstractmethod
    def _open(self, folder: Path, step: int):
        """What takes the figures, from this step on."""

    @abc.abstractmethod
    def _send(self, figures: dict[str, float], step: int) -> None:
        """Hand over the figures of a step."""

    @abc.abstractmethod
    def _end(self) -> None:
        """Nothing more follows."""


class TensorBoard(Tracker):
    """Event files in the run folder's `tensorboard/`; `tensorboard --logdir RUN_DIR` shows them."""

    def _open(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(folder / "tensorboard", purge_step=step)

    def _send(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._target.add_scalar(name, value, step)

    def _end(self) -> None:
        self._target.close()


class Wandb(Tracker):
    """A run of the project `sar-kd`, named as the run folder; wandb's own environment variables hold (WANDB_MODE)."""

    def _open(self, folder: Path, step: int):
        import wandb

        name = folder.resolve().name
        same = re.sub(r"[^\w.-]", "-", name)[:64]  # what a resumed run must be called to be the same
        settings = self.config.to_dict()
        return wandb.init(project="sar-kd", name=name, id=same, resume="allow", dir=str(folder), config=settings)

    def _send(self, figures: dict[str, float], step: int) -> None:
        self._target.log(figures, step=step)

    def _end(self) -> None:
        self._target.finish()


def _figures(group: str, record: dict) -> dict[str, float]:
    """The finite numbers of a record, by the name that the charts have."""
    numbers = {name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "step"}
    return {f"{group}/{name}": float(value) for name, value in numbers.items() if math.isfinite(value)}
