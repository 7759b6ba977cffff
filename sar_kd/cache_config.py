"""Settings of `python -m sar_kd cache`: which teacher, over which text, and how much of what it says is kept."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from sar_kd.config import EMBEDDED, DataConfig, PrecisionConfig
from sar_kd.settings import RunConfig, flag, require, require_at_least

_NUMBER = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Cache: which teacher, what is kept of it, and where."""

    teacher_model: str = flag(EMBEDDED, "directory or hub id; 'embedded' is the teacher shipped with the package")
    student_model: str = flag(
        "",
        "cut the text as a run with this student would, so that its blocks are as without a cache; other students can "
        "use the cache too. By default one that reads as the teacher does; with the embedded teacher, its student",
    )
    trust_remote_code: bool = flag(False, "run model code that comes with a checkpoint")
    teacher_cache: str = flag("teacher_cache", "folder of the cache; one that was interrupted goes on")
    teacher_top_k: int = flag(32, "of each teacher row so many tokens are kept, the likeliest")
    temperatures: tuple[str, ...] = flag(
        ("1", "1.5", "2"),
        "what a run's --temperature may be: at each the mass of all other tokens is kept",
        metavar="T",
    )
    per_device_batch_size: int = flag(4, "blocks that the teacher reads at once")
    loss_workspace_mb: int = flag(64, "memory for logits, which are made and used in tiles of so many MiB")
    overwrite: bool = flag(False, "start again in a --teacher_cache that holds one")

    def __post_init__(self):
        require(bool(self.teacher_model), "teacher_model", "''", "give a directory or a hub id")
        require(bool(self.teacher_cache), "teacher_cache", "''", "give a folder")
        require_at_least(self, 1, "teacher_top_k", "per_device_batch_size", "loss_workspace_mb")

        self.floats()

    def floats(self) -> list[float]:
        """The temperatures as numbers, each once, ascending."""
        found = set()
        for text in self.temperatures:
            value = float(text) if _NUMBER.fullmatch(text) else 0.0
            require(value > 0, "temperatures", " ".join(self.temperatures), "must be numbers above 0")
            found.add(value)
        return sorted(found)

    @property
    def tokenizer_of(self) -> str:
        """Whose tokenizer decides where the text is cut."""
        return self.student_model or (EMBEDDED if self.teacher_model == EMBEDDED else "")


@dataclass(frozen=True, kw_only=True)
class CachingConfig(RunConfig):
    """Everything that a teacher cache is made from."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    data: DataConfig = field(default_factory=DataConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    mode: str = ""
