"""`sar-kd cache`: which teacher, what is kept of it and where; or log-probabilities that another program computed, in
files or asked of a server.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from sar_kd.config.fields import RunConfig, Section, option, require
from sar_kd.config.placement import TeacherPlacementConfig
from sar_kd.config.sections import EMBEDDED, DataConfig, DeviceConfig, OutputConfig, model_option
from sar_kd.errors import UsageError

API_KEY = "SAR_KD_API_KEY"
"""The environment variable with the key of a server that wants one"""

ELSEWHERE = {"keep": "topk", "teacher_top_k": 20, "temperatures": ("1",)}
"""Values of a cache's options: what a server gives, as many tokens as vLLM's allows, at the one temperature it has"""


_NUMBER = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Section):
    """Cache: which teacher, what is stored, and where."""

    teacher_model: str = model_option("teacher")
    student_model: str = option(
        "",
        "student whose tokenizer cuts the text into blocks: its runs then have the same blocks as without a cache, and "
        "other students can still use it; by default the teacher's tokenizer, or for the embedded teacher its "
        "student's",
    )
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")
    teacher_cache: str = option(
        "teacher_cache", "folder of the cache; an interrupted one is continued", not_empty="give a folder"
    )
    keep: str = option(
        "mixed",
        "what is kept of the teacher's distribution. topk: the most likely tokens and the mass of all others; sampled: "
        "tokens drawn at random, with replacement; mixed: tokens drawn without, the most likely ones always",
        choices=("topk", "sampled", "mixed"),
    )
    teacher_top_k: int = option(
        11, "tokens kept at each position; by default 32 with --keep topk, 20 with a teacher elsewhere, else 11",
        at_least=1,
    )  # fmt: skip
    temperatures: tuple[str, ...] = option(
        ("1", "1.5", "2"),
        "values of --temperature that runs may use; for each, a sum over all tokens is stored",
        metavar="T",
    )
    seed: int = option(0, "seed of the draws", at_least=0)
    per_device_batch_size: int = option(4, "blocks in one forward of the teacher", at_least=1)
    loss_workspace_mb: int = option(
        0,
        "MiB for the teacher's logits, computed in tiles of this size; 0: 64, or what 256 positions take",
        at_least=0,
    )
    overwrite: bool = option(False, "delete the cache in --teacher_cache and start again")

    def __post_init__(self):
        super().__post_init__()
        self.temperature_values()
        within = self.keep == "topk" or self.teacher_top_k <= 255
        require(within, "teacher_top_k", self.teacher_top_k, f"must be at most 255 with --keep {self.keep}")

    def temperature_values(self) -> list[float]:
        """The temperatures as numbers, each once, ascending. Raises: UsageError"""
        found = set()
        for text in self.temperatures:
            value = float(text) if _NUMBER.fullmatch(text) else 0.0
            within = 1e-3 <= value <= 1e3
            require(within, "temperatures", " ".join(self.temperatures), "must be numbers from 0.001 to 1000")
            found.add(value)
        return sorted(found)

    @property
    def block_tokenizer(self) -> str:
        """The model whose tokenizer cuts the text into blocks; '' for the teacher."""
        return self.student_model or (EMBEDDED if self.teacher_model == EMBEDDED else "")


@dataclass(frozen=True, kw_only=True)
class ElsewhereConfig(Section):
    """Teacher elsewhere: another program runs it, and gives the log-probabilities."""

    from_logprobs: tuple[str, ...] = option(
        (), "log-probabilities of the text: .jsonl or .jsonl.gz files, a document a line, as vLLM's prompt_logprobs or "
        "/v1/completions give them",
    )  # fmt: skip
    teacher_url: str = option(
        "", "a server to ask for them, such as http://HOST:8000/v1; of several models that it has, --teacher_model "
        f"names one; a key is read from the environment variable {API_KEY}",
    )  # fmt: skip
    teacher_tokenizer: str = option("", "folder or hub id with the tokenizer and the config.json of that model")
    server_timeout: float = option(300.0, "seconds that the server may take for an answer", positive=True)

    def __post_init__(self):
        super().__post_init__()
        if not self.is_given:
            require(not self.teacher_tokenizer, "teacher_tokenizer", self.teacher_tokenizer, "is that of a teacher "
                    "elsewhere; give --teacher_url or --from_logprobs too, or --teacher_model for one that is loaded "
                    "here")  # fmt: skip
            return
        if self.from_logprobs and self.teacher_url:
            raise UsageError(f"--teacher_url {self.teacher_url}: give it or --from_logprobs, not both")
        for name in self.from_logprobs:
            require(name.endswith((".jsonl", ".jsonl.gz")), "from_logprobs", name, "must be .jsonl or .jsonl.gz")
        if self.teacher_url:
            self._check_url()
        require(bool(self.teacher_tokenizer), *self.source, "give --teacher_tokenizer, the folder with that model's "
                "tokenizer and config.json")  # fmt: skip

    @property
    def is_given(self) -> bool:
        """Does another program run the teacher?"""
        return bool(self.from_logprobs or self.teacher_url)

    @property
    def source(self) -> tuple[str, str]:
        """The option that says where the log-probabilities are, and its value."""
        return (
            ("teacher_url", self.teacher_url) if self.teacher_url else ("from_logprobs", " ".join(self.from_logprobs))
        )

    def _check_url(self) -> None:
        try:
            parts = urlsplit(self.teacher_url)
            is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            raise UsageError("--teacher_url: is no address; it must be like http://HOST:8000/v1") from None
        has_key = "@" in parts.netloc or bool(parts.query)  # not to be printed
        if has_key:
            raise UsageError(f"--teacher_url: holds a password or a key; give it in the environment variable {API_KEY}")
        require(is_whole, "teacher_url", self.teacher_url, "must be like http://HOST:8000/v1")


@dataclass(frozen=True, kw_only=True)
class CachingConfig(RunConfig):
    """Everything a teacher cache is made from."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    elsewhere: ElsewhereConfig = field(default_factory=ElsewhereConfig)
    data: DataConfig = field(default_factory=DataConfig)
    precision: DeviceConfig = field(default_factory=DeviceConfig)
    memory: TeacherPlacementConfig = field(default_factory=TeacherPlacementConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self):
        if not self.elsewhere.is_given:
            return
        keep, temperatures = self.cache.keep, self.cache.temperature_values()
        given = f"--{self.elsewhere.source[0]}"
        require(keep == "topk", "keep", keep, f"draws need the whole distribution, and {given} gives the most likely "
                "tokens; leave it out")  # fmt: skip
        require(temperatures == [1.0], "temperatures", " ".join(self.cache.temperatures), f"{given} gives the mass of "
                "all other tokens at temperature 1 alone; leave it out")  # fmt: skip

    @property
    def teacher(self) -> CacheConfig:
        """The cache's settings in which `teacher_model` is where the teacher's tokenizer and config are."""
        where = self.elsewhere.teacher_tokenizer if self.elsewhere.is_given else self.cache.teacher_model
        return dataclasses.replace(self.cache, teacher_model=where)
