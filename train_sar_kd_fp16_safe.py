"""Distil a teacher into a student: float16 and the ultra-conservative mode, on every device.

python train_sar_kd_fp16_safe.py --train_steps 500
"""

import sys

from sar_kd.commands.main import run
from sar_kd.config.presets import FP16_SAFE


def main(argv=None):
    from sar_kd.commands import train  # imports torch, for which `run` has prepared the CPU threads

    return train.main(argv, FP16_SAFE)


if __name__ == "__main__":
    sys.exit(run(main))
