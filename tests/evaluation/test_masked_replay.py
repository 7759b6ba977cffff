"""A replay that looks for what is not finite does not take a masked token for it."""

import math

import pytest
import torch

from sar_kd.evaluation.nonfinite import replay
from sar_kd.runtime.precision import Precision
from tests.evaluation.test_masked_tokens import EVERY_KIND, _model
from tests.helpers.lm_heads import FLOAT32

HALF = Precision(torch.device("cpu"), torch.float16, 1.0)


@EVERY_KIND
@pytest.mark.parametrize("precision", [FLOAT32, HALF], ids=["float32", "float16"])
def test_a_replay_finds_no_fault_in_a_masked_token(kind, precision):
    model = _model(kind)
    found, logits, _ = replay(model, torch.arange(10, 20)[None], precision)
    assert (logits == -math.inf).any()
    assert (found["verdict"], found["first_bad_module"]) == ("not reproduced", None)
    model.get_output_embeddings().weight.data[3, 4] = math.nan
    found, _, _ = replay(model, torch.arange(10, 20)[None], precision)
    assert (found["verdict"], found["first_bad_module"]["name"]) == ("weights", "lm_head")
