"""What becomes of the best student once its run has finished: the dtype that it is saved in, and an upload."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sar_kd.config.fields import Section, option, require

_REPOSITORY = re.compile(r"([\w-][\w.-]{0,95}/)?[\w-][\w.-]{0,95}", re.ASCII)

UPLOAD = "upload the student to this repository of the Hugging Face hub: NAME or OWNER/NAME"
"""The help of `--push_to_hub`."""

PUBLIC = "make a new repository of --push_to_hub public; by default it is private"
"""The help of `--public`."""


def check_repository(name: str) -> None:
    """Raise UsageError if `--push_to_hub` is given and is no name of a repository."""
    require(not name or bool(_REPOSITORY.fullmatch(name)), "push_to_hub", name,
            "must be NAME or OWNER/NAME, of letters, digits, '-', '_' and '.'")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HandOverConfig(Section):
    """Saving: what the best student is saved as, and where it is uploaded, once the run has finished."""

    save_dtype: str = option(
        "float32",
        "dtype of the weights in student/; checkpoints stay float32, and so does a student with a weight that this "
        "dtype cannot hold",
        choices=("float32", "float16", "bfloat16"),
    )
    push_to_hub: str = option("", UPLOAD)
    public: bool = option(False, PUBLIC)

    def __post_init__(self):
        super().__post_init__()
        check_repository(self.push_to_hub)

    @property
    def is_asked(self) -> bool:
        """Is there something to be done behind the run?"""
        return self.save_dtype != "float32" or bool(self.push_to_hub)
