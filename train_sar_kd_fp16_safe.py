"""Distil a teacher into a student: float16 and the ultra-conservative mode, on every device.

python train_sar_kd_fp16_safe.py --train_steps 500
"""

import sys

from sar_kd.commands.main import run, start
from sar_kd.config.presets import FP16_SAFE


def main(argv=None):
    return start(FP16_SAFE, argv)


if __name__ == "__main__":
    sys.exit(run(main, own_process=True))
