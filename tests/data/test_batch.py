"""The label shift: which position predicts which token."""

import pytest
import torch

from sar_kd.data.batch import IGNORE_INDEX, next_token_targets
from tests.helpers.lm_heads import cross_entropy

V = 11


def test_a_position_predicts_the_label_after_it():
    labels = torch.tensor([[IGNORE_INDEX, 5, 6, 7], [IGNORE_INDEX, 8, IGNORE_INDEX, 9]])
    positions, targets = next_token_targets(labels)
    assert positions.tolist() == [0, 1, 2, 4, 6]
    assert targets.tolist() == [5, 6, 7, 8, 9]


def test_the_shift_does_not_wrap_into_the_next_sequence():
    positions, targets = next_token_targets(torch.tensor([[1, 2], [3, 4]]))
    assert (positions.tolist(), targets.tolist()) == ([0, 2], [2, 4])


def test_labels_without_a_target_give_no_positions():
    positions, targets = next_token_targets(torch.full((2, 3), IGNORE_INDEX))
    assert len(positions) == len(targets) == 0


@pytest.mark.parametrize(("ahead", "is_near_zero"), [(0, False), (1, True), (2, False)])
def test_only_a_model_wired_to_the_next_token_scores_near_zero(ahead, is_near_zero):
    ids = torch.stack([torch.randperm(V) for _ in range(4)])
    logits = torch.zeros(*ids.shape, V)
    for t in range(ids.shape[1] - ahead):
        logits[torch.arange(4), t, ids[:, t + ahead]] = 30.0
    positions, targets = next_token_targets(ids)
    loss = cross_entropy(logits.flatten(0, 1)[positions], targets)[0] / len(positions)
    assert (loss < 1e-6) == is_near_zero
