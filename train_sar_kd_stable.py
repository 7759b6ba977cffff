"""Distil a teacher into a student: the balanced mode in the best dtype the hardware has.

python train_sar_kd_stable.py --train_steps 500
"""

import sys

from sar_kd.commands.main import run, start
from sar_kd.config.presets import STABLE


def main(argv=None):
    return start(STABLE, argv)


if __name__ == "__main__":
    sys.exit(run(main, own_process=True))
