"""Where a teacher is: the options that every command with a large teacher shares."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sar_kd.config.fields import Section, option, require
from sar_kd.errors import UsageError

_SIZED_DEVICE = re.compile(r"(cpu|cuda:[0-9]{1,3})=[0-9]{1,9}(\.[0-9]{1,6})?([MG]i?B)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class TeacherPlacementConfig(Section):
    """Memory: where the teacher is."""

    teacher_device: str = option("", "device on which the teacher computes: cpu or cuda:N; by default that of --device")
    teacher_device_map: str = option(
        "",
        "auto: spread the teacher's layers over GPUs, CPU memory and disk, through accelerate (`pip install "
        "accelerate`); for a cache of a teacher larger than the card",
        choices=("", "auto"),
    )
    teacher_max_memory: tuple[str, ...] = option(
        (), "most of the spread teacher on a device, such as cuda:0=6GB cpu=20GB; by default what is free",
        metavar="DEVICE=SIZE",
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        where = self.teacher_device
        known = where in ("", "cpu", "cuda") or bool(re.fullmatch("cuda:[0-9]{1,3}", where))
        require(known, "teacher_device", where, "must be cpu, cuda or cuda:N")
        if where and self.teacher_device_map:
            raise UsageError(f"--teacher_device {where}: --teacher_device_map chooses the devices; give one of them")
        sized = all(_SIZED_DEVICE.fullmatch(each) for each in self.teacher_max_memory)
        require(sized, "teacher_max_memory", " ".join(self.teacher_max_memory),
                "must be devices with sizes, such as cuda:0=6GB cpu=20GB")  # fmt: skip

    def placement(self) -> str:
        """The option that puts the teacher elsewhere than the student, with its value; '' if none does."""
        if self.teacher_device_map:
            return f"--teacher_device_map {self.teacher_device_map}"
        return f"--teacher_device {self.teacher_device}" if self.teacher_device else ""
