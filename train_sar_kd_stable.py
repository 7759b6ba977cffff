"""Distil a teacher into a student: the balanced mode in the best dtype the hardware has.

python train_sar_kd_stable.py --train_steps 500
"""

import sys

from sar_kd.commands.main import run
from sar_kd.config.presets import STABLE


def main(argv=None):
    from sar_kd.commands import train  # imports torch, for which `run` has prepared the CPU threads

    return train.main(argv, STABLE)


if __name__ == "__main__":
    sys.exit(run(main))
