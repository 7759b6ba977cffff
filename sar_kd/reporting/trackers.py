"""TensorBoard and Weights & Biases: where a run's metrics also go, if they are asked for."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from sar_kd.config.fields import RunConfig
from sar_kd.runtime.environment import require_packages


def find_trackers(config: RunConfig) -> list[Tracker]:
    """Those that the command line asks for.

    Raises: UsageError if the package for one is not installed
    """
    names = [name for name in _OPEN if getattr(config.train, name)]
    for name in names:
        require_packages(f"--{name}", [name])
    return [Tracker(name, config) for name in names]


class Tracker:
    """An observer of the run log that sends on the metrics of steps and validations; opened by the first of them."""

    def __init__(self, name: str, config: RunConfig):
        self.name, self._config = name, config
        self._run: Any = None  # a wandb run, or what has its methods `log` and `finish`

    def log_record(self, record: dict) -> None:
        if record["event"] == "rewind":
            return
        if self._run is None:
            self._run = _OPEN[self.name](self._config, Path(self._config.train.output_dir), record["step"])
        self._run.log(_metrics("train" if record["event"] == "step" else "validation", record), step=record["step"])

    def log_summary(self, summary: dict) -> None:
        if self._run is not None:
            self._run.log(_metrics("summary", summary), step=summary["steps"])

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


class _TensorBoard:
    """Event files in the run folder's `tensorboard/`; `tensorboard --logdir RUN_DIR` shows them."""

    def __init__(self, config: RunConfig, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder / "tensorboard", purge_step=step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


def _open_wandb(config: RunConfig, folder: Path, step: int) -> Any:
    """A run of the project `sar-kd`, named as the run folder; wandb's own environment variables hold (WANDB_MODE)."""
    import wandb

    name = folder.resolve().name
    run_id = re.sub(r"[^\w.-]", "-", name)[:64]  # a resumed run continues the one with its id
    settings = config.to_dict()
    return wandb.init(project="sar-kd", name=name, id=run_id, resume="allow", dir=str(folder), config=settings)


_OPEN = {"tensorboard": _TensorBoard, "wandb": _open_wandb}


def _metrics(group: str, record: dict) -> dict[str, float]:
    """The finite numbers of a record, named group/metric."""
    numbers = {name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "step"}
    return {f"{group}/{name}": float(value) for name, value in numbers.items() if math.isfinite(value)}
