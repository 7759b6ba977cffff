"""What follows a NaN batch: an explanation in `crash/`, and with `--on_divergence rewind` a second try, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from sar_kd.config.fields import RunConfig
from sar_kd.data.batch import Batch
from sar_kd.data.dataset import Dataset
from sar_kd.training.callbacks import Callback, MicroBatches, StepResult
from sar_kd.training.nan_forensics import examine, unexamined, write_crash
from sar_kd.training.step import StepContext, StepReport

_LR_SCALE = 0.5


class Recovery(Callback):
    """Keeps the NaN batches since the last applied step, explains the first one of the run, and rewinds.

    A rewind goes back to the last checkpoint, at half the learning rate and without the documents of the NaN batches.
    state  rewound_from    the step at which the run diverged and was rewound; 0 if it was not
           lr_scale        factor on the learning rate since then
           skipped_blocks  blocks that are not read since then
    """

    def __init__(self, config: RunConfig, train: Dataset, context: StepContext):
        super().__init__()
        self.folder = Path(config.train.output_dir) / "crash"
        self._rewinds = config.guards.on_divergence == "rewind"
        self._train, self._context, self._process_group = train, context, context.strategy.process_group
        self._nan_steps: list[list[Batch]] = []
        self.state = {"rewound_from": 0, "lr_scale": 1.0, "skipped_blocks": []}

    def on_step_end(self, step: int, report: StepReport, micro_batches: MicroBatches) -> StepResult:
        if report.verdict.cause in ("forward", "gradient"):
            self._nan_steps.append(micro_batches())
            if not self._process_group.broadcast((self.folder / "crash.json").exists()):
                self.explain(step, report, "The update was refused and nothing was changed; the run went on.")
        elif report.verdict.applied:
            self._nan_steps.clear()
        return [], None

    def summary(self) -> dict:
        return {"rewound_from": self.state["rewound_from"]}

    def explain(self, step: int, report: StepReport, outcome: str) -> dict:
        """Replay the last NaN batch, write `crash/`, and return the findings."""
        batch, findings = self._examine(self._nan_steps[-1], report.verdict.cause)
        record = {"step": step, "cause": report.verdict.cause, "outcome": outcome, **findings}
        record |= {"documents": self._documents_of(findings["bad_blocks"]), "loss_scale": report.loss_scale}
        record |= {name: getattr(report, name) for name in ("loss", "ce_loss", "kd_loss", "grad_norm")}
        self._process_group.on_rank_zero(lambda: write_crash(self.folder, batch, record))
        return record

    def summary_line(self, record: dict) -> str:
        """Cause, module, remedy, and the path of the page, in one line."""
        module = record["first_bad_module"]
        where = f" First module that is not finite: {module['name']} ({module['output_dtype']})." if module else ""
        cause = f"(cause: {record['cause']}, {record['verdict']})"
        return f"{cause}.{where} What to try: {record['remedy']}. Details: {self.folder / 'crash.md'}"

    def _examine(self, micro_batches: list[Batch], cause: str | None) -> tuple[Batch, dict]:
        """The first micro-batch that is not finite when replayed (the last, if none is), and the findings about it."""
        context = self._context
        if context.strategy.is_sharded:
            return micro_batches[-1], unexamined(micro_batches, cause)
        for batch in micro_batches:
            findings = examine(context.objective.student, batch, context.precision, cause, self._total_loss)
            if findings["verdict"] != "not reproduced" and (cause != "gradient" or findings["first_bad_module"]):
                break
        return batch, findings

    def _total_loss(self, batch: Batch) -> Tensor:
        return self._context.objective(batch.to(self._context.precision.device)).total

    def _documents_of(self, blocks: list[int]) -> list[str]:
        return list(dict.fromkeys(name for block in blocks for name in self._train.documents_of(block)))

    # The rewind

    @property
    def can_rewind(self) -> bool:
        """May the run still go back to its last checkpoint?"""
        return self._rewinds and not self.state["rewound_from"]

    def rewind(self, step: int, report: StepReport, load: Callable[[], int]) -> dict:
        """Go back, once; returns the record of it for the log. load: loads the last checkpoint, returns its step"""
        documents = self.explain(step, report, "The run went back to its last checkpoint, once.")["documents"]
        skipped_blocks = self._blocks_to_skip(report.verdict.cause)
        last_step = load()
        self.state = {"rewound_from": step, "lr_scale": _LR_SCALE, "skipped_blocks": skipped_blocks}
        return {"step": last_step, "rewound_from": step, "skipped_blocks": skipped_blocks, "documents": documents}

    def _blocks_to_skip(self, cause: str | None) -> list[int]:
        """Every block of the documents whose loss was not finite in the last NaN batches; only the bad blocks
        themselves, if those documents are half of the text or more.
        """
        bad = {block for batches in self._nan_steps for block in self._examine(batches, cause)[1]["bad_blocks"]}
        self._nan_steps.clear()
        documents = set(self._documents_of(sorted(bad)))
        blocks = [block for block in range(len(self._train)) if documents & set(self._train.documents_of(block))]
        return blocks if 2 * len(blocks) < len(self._train) else sorted(bad)

    def replace_skipped(self, blocks: list[int]) -> list[int]:
        """Each skipped block of a batch replaced by the next one that is not; unchanged if all blocks are skipped."""
        skipped, count = set(self.state["skipped_blocks"]), len(self._train)
        if len(skipped) == count or not skipped.intersection(blocks):
            return blocks
        replaced = []
        for block in blocks:
            while block in skipped:
                block = (block + 1) % count
            replaced.append(block)
        return replaced
