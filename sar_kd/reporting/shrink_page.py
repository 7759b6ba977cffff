"""What `sar-kd shrink` says about a model that it has cut: a table for the terminal, `shrink.html`, the model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    perplexity: float
    bits_per_byte: float
    seconds_per_token: float
    """Of greedy generation"""

    def cells(self) -> dict[str, str]:
        """Each value as text, by its name."""
        return {
            "parameters": f"{self.parameters:,}",
            "bytes": format_bytes(self.bytes),
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
    cuts: Sequence[str] = ()
    """Each cut in words"""
    warnings: Sequence[str] = ()
    influence: Sequence[float] = ()
    """Of each layer; nothing where none was measured"""
    dropped_layers: Sequence[int] = ()

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, before, after."""
        assert self.after is not None
        after = self.after.cells()
        return [(name, cell, after[name]) for name, cell in self.before.cells().items()]

    def table(self) -> list[str]:
        """The rows in columns."""
        rows = [("", "before", "after"), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]


def build_shrink_page(shrunk: Shrunk) -> str:
    """The page. Raises: ModuleNotFoundError without matplotlib"""
    charts = [build_influence_chart(shrunk.influence, shrunk.dropped_layers)] if shrunk.influence else []
    return render(PAGE, shrunk=shrunk, name=public_name(shrunk.model), charts=charts, version=__version__)


def build_shrink_card(shrunk: Shrunk, folder: Path) -> str:
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
    return render("shrink_card.md", metadata=metadata.to_yaml(), title=folder.name, **values)
