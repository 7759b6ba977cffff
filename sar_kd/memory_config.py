"""Settings of memory: what is kept, what is computed again or moved instead, how small the teacher's weights are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sar_kd.settings import flag

AUTO_BATCH = "{what} in a micro-batch of each device; auto: as many as fit, with --grad_accum_steps to match"
"""The help of `--per_device_batch_size`."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory: what is computed anew, moved or rounded so that a run fits; `sar-kd preflight` says what fits."""

    gradient_checkpointing: bool = flag(
        False, "compute the student's activations anew in backward: less memory, a third more time"
    )


@dataclass(frozen=True, kw_only=True)
class TeacherMemoryConfig(MemoryConfig):
    """Memory: what is computed anew, moved or rounded so that a run fits; `sar-kd preflight` says what fits."""

    offload_teacher_to_cpu: bool = flag(
        False,
        "the teacher reads a step's whole text first and then lies in the CPU's memory while the student learns: less "
        "memory, a copy of its weights to the GPU in every step",
    )
    teacher_quantization: str = flag(
        "off",
        "nf4: the teacher's linear layers in 4 bits, through bitsandbytes (pip install 'sar-kd[quant]')",
        choices=("off", "nf4"),
    )

    def offloads_from(self, device: Any) -> bool:
        """Does the teacher leave this device? Not a CPU, where it lies already."""
        return self.offload_teacher_to_cpu and device.type != "cpu"

    @property
    def why_routers_stand_still(self) -> str:
        """Why the teacher's routers cannot learn beside these settings; empty if they can."""
        if self.offload_teacher_to_cpu:
            return "--offload_teacher_to_cpu takes the teacher away before its routers could learn from the student"
        if self.teacher_quantization != "off":
            return f"--teacher_quantization {self.teacher_quantization} lets no exact gradient through the teacher"
        return ""
