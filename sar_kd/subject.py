"""What is looked at before a run: its settings, and its models without their weights."""

from __future__ import annotations

from functools import cached_property

import torch

from sar_kd.loading import NOTHING_GIVEN, Given, load_skeleton
from sar_kd.settings import RunConfig


class Subject:
    """What the checks look at: the settings, and the models without their weights, built when first asked for."""

    def __init__(self, config: RunConfig, given: Given = NOTHING_GIVEN):
        self.config, self.given = config, given
        self.sides = [whose for whose in ("teacher", "student") if hasattr(config.models, f"{whose}_model")]

    @cached_property
    def models(self) -> dict[str, torch.nn.Module]:
        """'teacher', if there is one, and 'student': shapes only, or the model itself where it is in memory already."""
        names, found = self.config.models, {}
        for whose in self.sides:
            flag = f"{whose}_model"
            model = self.given.model(flag)
            found[whose] = model or load_skeleton(flag, getattr(names, flag), names.trust_remote_code)
        return found
