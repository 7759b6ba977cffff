"""What `sar-kd shrink` says about a model that it has cut: a table for the terminal, `shrink.html`, the model card."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from sar_kd.reporting.charts import build_influence_chart
from sar_kd.reporting.model_card import public_name
from sar_kd.reporting.rendering import render
from sar_kd.runtime.console import format_bytes, format_perplexity
from sar_kd.version import __version__

PAGE = "shrink.html"


@dataclass(frozen=True)
class Measured:
    """A model's size, and what it is worth on the held-out text."""

    parameters: int
    bytes: int
    tokens_per_byte: float
    perplexity: float
    bits_per_byte: float
    seconds_per_token: float
    """Of greedy generation"""

    def cells(self) -> dict[str, str]:
        """Each value as text, by its name."""
        return {
            "parameters": f"{self.parameters:,}",
            "bytes": format_bytes(self.bytes),
            "tokens a byte": f"{self.tokens_per_byte:.4f}",
            "perplexity": format_perplexity(self.perplexity),
            "bits per byte": f"{self.bits_per_byte:.4f}",
            "ms a token, generating": f"{1000 * self.seconds_per_token:.1f}",
        }


@dataclass(frozen=True)
class Shrunk:
    """A model that was cut: of what, how, and what it was worth before and after."""

    model: str
    text: str
    """What it was measured on, in words"""
    before: Measured
    after: Measured | None = None
    """None until the cut model was written"""
    healed: Measured | None = None
    """After distillation; None without"""
    run: str = ""
    """The folder of the distilled student, in that of the cut model"""
    cuts: Sequence[str] = ()
    """Each cut in words"""
    warnings: Sequence[str] = ()
    influence: Sequence[float] = ()
    """Of each layer; nothing where none was measured"""
    dropped_layers: Sequence[int] = ()
    rounds: Sequence[tuple[Measured, Measured]] = ()
    """After the cut and after distillation, of each round before the last"""

    def next_round(self) -> Shrunk:
        """The same model at the start of the round behind one that has ended."""
        assert self.after is not None
        assert self.healed is not None
        rounds = [*self.rounds, (self.after, self.healed)]
        return dataclasses.replace(self, after=None, healed=None, run="", rounds=rounds, warnings=())

    def columns(self) -> list[tuple[str, Measured]]:
        """What was measured, by name, in order."""
        assert self.after is not None
        if self.healed is None and not self.rounds:
            return [("before", self.before), ("after", self.after)]
        numbers = [f" {number}" for number in range(1, len(self.rounds) + 2)] if self.rounds else [""]
        stages = [*self.rounds, (self.after, self.healed)]
        pairs = ((f"{name}{number}", measured) for number, pair in zip(numbers, stages, strict=True)
                 for name, measured in zip(("cut", "distilled"), pair, strict=True))  # fmt: skip
        return [("before", self.before), *((name, measured) for name, measured in pairs if measured)]

    def rows(self) -> list[tuple[str, ...]]:
        """The names of the columns; then name and values of each row."""
        columns = self.columns()
        cells = [measured.cells() for _, measured in columns]
        return [("", *(name for name, _ in columns)), *((name, *(each[name] for each in cells)) for name in cells[0])]

    def table(self) -> list[str]:
        """The rows in columns."""
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (zip(row, widths, strict=True) for row in rows)
        return ["  ".join(f"{cell:>{width}}" if i else f"{cell:<{width}}" for i, (cell, width) in enumerate(line))
                for line in lines]  # fmt: skip


def build_shrink_page(shrunk: Shrunk) -> str:
    """The page. Raises: ModuleNotFoundError without matplotlib"""
    charts = [build_influence_chart(shrunk.influence, shrunk.dropped_layers)] if shrunk.influence else []
    return render(PAGE, shrunk=shrunk, name=public_name(shrunk.model), charts=charts, version=__version__)


def build_shrink_card(shrunk: Shrunk, title: str) -> str:
    """The model card, Markdown with the metadata that the Hugging Face hub reads."""
    from huggingface_hub import ModelCardData

    name = public_name(shrunk.model)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "sar-kd"],
        base_model=name if "/" in name else None,
    )
    values = {"shrunk": shrunk, "name": name, "version": __version__}
    return render("shrink_card.md", metadata=metadata.to_yaml(), title=title, **values)
