"""After a bad step: say why, once; and, at an emergency, what a second try leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sar_kd.data.batch import Batch
from sar_kd.data.dataset import Dataset
from sar_kd.losses.objective import Objective
from sar_kd.runtime.precision import Precision
from sar_kd.training.nan_forensics import examine, unexamined, write_crash
from sar_kd.training.parallel import SINGLE_DEVICE, ParallelStrategy
from sar_kd.training.step import StepReport


class Recovery:
    """Remembers the NaN batches that followed one another, and examines them when that is due."""

    def __init__(
        self,
        folder: Path,
        train: Dataset,
        objective: Objective,
        precision: Precision,
        placement: ParallelStrategy = SINGLE_DEVICE,
    ):
        self.folder, self.train, self.objective, self.precision = folder / "crash", train, objective, precision
        self.placement, self.process_group = placement, placement.process_group
        self._row: list[list[Batch]] = []

    def note(self, step: int, report: StepReport, window: Callable[[], list[Batch]]) -> None:
        """Enter an attempt. The run's first NaN batch is explained at once in `crash/`; a good step costs nothing.

        window: gives the micro-batches that may have been bad
        """
        if report.verdict.cause in ("forward", "gradient"):
            self._row.append(window())
            if not self.process_group.broadcast((self.folder / "crash.json").exists()):
                self.explain(step, report, "The update was refused and nothing was changed; the run went on.")
        elif report.verdict.applied:
            self._row.clear()

    def explain(self, step: int, report: StepReport, outcome: str) -> dict:
        """Replay the last NaN batch, write `crash/`, and return what was found."""
        bad, findings = self._examine(self._row[-1], report.verdict.cause)
        record = {"step": step, "cause": report.verdict.cause, "outcome": outcome, **findings}
        record |= {"documents": self._documents(findings["bad_blocks"]), "loss_scale": report.loss_scale}
        record |= {name: getattr(report, name) for name in ("loss", "ce_loss", "kd_loss", "grad_norm")}
        self.process_group.on_rank_zero(lambda: write_crash(self.folder, bad, record))
        return record

    def in_short(self, record: dict) -> str:
        """Cause, place and remedy in one line, and where the page is."""
        module = record["first_bad_module"]
        where = f" First module that is not finite: {module['name']} ({module['output_dtype']})." if module else ""
        cause = f"(cause: {record['cause']}, {record['verdict']})"
        return f"{cause}.{where} What to try: {record['remedy']}. Details: {self.folder / 'crash.md'}"

    def _examine(self, micro_batches: list[Batch], cause: str | None) -> tuple[Batch, dict]:
        """The first micro-batch that is bad when replayed (the last, if none is), and what is found in it."""
        if self.placement.is_sharded:
            return micro_batches[-1], unexamined(micro_batches, cause)
        for batch in micro_batches:
            findings = examine(self.objective.student, batch, self.precision, cause, lambda b: self._total(b))
            if findings["verdict"] != "not reproduced" and (cause != "gradient" or findings["first_bad_module"]):
                break
        return batch, findings

    def _total(self, batch: Batch):
        return self.objective(batch.to(self.precision.device)).total

    def _documents(self, blocks: list[int]) -> list[str]:
        return list(dict.fromkeys(name for block in blocks for name in self.train.documents_of(block)))

    def offenders(self, cause: str | None) -> list[int]:
        """The blocks that a second try leaves out: every one of the documents that were bad in a row of NaN batches.

        Only the bad blocks themselves, where those documents are half of the text or more.
        """
        bad = {block for window in self._row for block in self._examine(window, cause)[1]["bad_blocks"]}
        self._row.clear()
        documents = set(self._documents(sorted(bad)))
        whole = [block for block in range(len(self.train)) if documents & set(self.train.documents_of(block))]
        return whole if 2 * len(whole) < len(self.train) else sorted(bad)
