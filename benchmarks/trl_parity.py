"""Are our divergences TRL's? Value and gradient against `generalized_jsd_loss` of its GKD trainer, T = 1, float32.

    PYTHON_WITH_TRL benchmarks/trl_parity.py

Equal vocabularies, the same positions, both divided by the number of target tokens; a gradient's difference counts by
the largest gradient. Needs `trl` beside this package's own requirements, in whichever environment. Exit code 1 if
anything differs by more than 1e-5.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import trl
from trl.experimental.gkd import GKDTrainer

from sar_kd.data.batch import IGNORE_INDEX, next_token_targets
from sar_kd.losses.divergence import Divergence

TOLERANCE = 1e-5
BATCH, LENGTH, VOCAB = 4, 64, 2048


DIRECTIONS = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}
"""Our `--kd_direction`, and the `beta` that means the same to TRL; ours is 0.5 by default too."""


def differences(direction: str, beta: float, scale: float) -> tuple[float, float]:
    """Of the value, and the largest of the gradient by the largest gradient; at logits of this spread."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, LENGTH, VOCAB)
    student_logits, teacher_logits = (scale * torch.randn(shape, generator=generator) for _ in range(2))
    labels = torch.randint(0, VOCAB, shape[:2], generator=generator)
    labels[0, : LENGTH // 2] = IGNORE_INDEX
    labels[1, LENGTH // 2 :] = IGNORE_INDEX
    rows, targets = next_token_targets(labels)

    mine = student_logits.clone().requires_grad_()
    log_probs = (logits.flatten(0, 1)[rows].log_softmax(-1) for logits in (mine, teacher_logits))
    our_loss = Divergence(direction)(*log_probs)[0] / len(targets)
    our_loss.backward()

    theirs = student_logits.clone().requires_grad_()
    trl_loss = GKDTrainer.generalized_jsd_loss(
        theirs[:, :-1], teacher_logits[:, :-1], labels=labels[:, 1:], beta=beta, temperature=1.0
    )
    trl_loss.backward()
    gap = (mine.grad - theirs.grad).abs().max() / theirs.grad.abs().max()
    return abs(our_loss - trl_loss).item(), gap.item()


def main() -> int:
    print(f"| divergence, against TRL {trl.__version__} | spread of the logits | value | gradient |")
    print("|---|---:|---:|---:|")
    worst = 0.0
    for direction, beta in DIRECTIONS.items():
        for scale in (1.0, 3.0, 10.0):
            value, gradient = differences(direction, beta, scale)
            worst = max(worst, value, gradient)
            print(f"| {direction} (beta {beta:g}) | {scale:g} | {value:.1e} | {gradient:.1e} |")
    print(f"\nLargest difference {worst:.1e}, tolerance {TOLERANCE:.0e}.")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
