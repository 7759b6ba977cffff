"""The joint probabilities of all paths to a shared class."""

import torch

from sar_kd.losses.projection.joint import ContinuationPaths, add_continuation_paths


def _log_probs(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def test_the_paths_to_a_class_add_up_in_probability_and_gradient():
    after_end, log_probs = _log_probs(0, 3, 4), _log_probs(9, 5)
    token_end, ends = torch.tensor([1, -1, 0]), log_probs[[2, 4]]
    indices = torch.tensor([[0, 0, 2], [3, 1, 0], [3, 0, 1]])
    found = add_continuation_paths(after_end.T, ContinuationPaths(log_probs, ends, token_end, indices)).T
    wanted = torch.stack([ends[1].exp() * after_end[0].exp(), after_end[1].exp(), ends[0].exp() * after_end[2].exp()])
    for boundary, class_, continuation_class in indices.T.tolist():
        wanted[boundary, class_] += log_probs[continuation_class].exp()
    torch.testing.assert_close(found.exp(), wanted)

    def joint(a, b, c):
        return add_continuation_paths(a.T, ContinuationPaths(b, c, token_end, indices))

    assert torch.autograd.gradcheck(joint, [x.double().requires_grad_() for x in (after_end, log_probs, ends)])


def test_without_continuations_the_classes_keep_their_probabilities():
    after_end, none = _log_probs(0, 3, 12), torch.zeros(0)
    paths = ContinuationPaths(none, none, torch.full((3,), -1), torch.zeros(3, 0, dtype=torch.int64))
    assert torch.equal(add_continuation_paths(after_end.T, paths), after_end.T)
