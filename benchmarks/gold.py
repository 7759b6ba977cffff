"""A run in which TRL's GOLD stands in for our distillation term; everything else is `train_sar_kd_stable.py`.

    PYTHON_WITH_TRL benchmarks/gold.py --mode precise --student_model DIR ...

Takes the script's flags: same text, same batches, same optimizer, same evaluation. The loss is
`alpha_ce * CE + alpha_kd * GOLD` with `ULDLoss` of `trl.experimental.gold` as its author wrote it: alignment by byte
offsets, and the hybrid of generalised JSD (beta 0.5) on tokens spelled alike and sorted L1 on the others, mixed by
their share of the vocabulary. The offsets are made from the exact bytes of each token, so a SentencePiece tokenizer is
aligned too; its tokens are rarely spelled as those of byte-level BPE. Our blocks do not close with an end-of-text
token, so there is none to skip at their end. Needs `trl` beside this package's requirements; with
`benchmarks/real_models.py --trl_python PYTHON_WITH_TRL` it can be an environment of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402
from trl.experimental.gold import GOLDConfig  # noqa: E402
from trl.experimental.gold.gold_trainer import ULDLoss  # noqa: E402

import train_sar_kd_stable  # noqa: E402
from sar_kd.commands import train  # noqa: E402
from sar_kd.commands.main import run  # noqa: E402
from sar_kd.data.batch import Batch, TokenBatch  # noqa: E402
from sar_kd.losses.objective import LossTerms, Objective  # noqa: E402
from sar_kd.losses.tiled_loss import Tile, TiledLossSpec, tiled_loss  # noqa: E402
from sar_kd.models.lm_head import LazyLogits  # noqa: E402


class GoldObjective(Objective):
    """alpha_ce * CE + alpha_kd * GOLD, per target token."""

    def __init__(self, teacher, student, config, aligner, *parts, gold: GOLDConfig):
        super().__init__(teacher, student, config, aligner, *parts)
        tokenizers = [transformers.AutoTokenizer.from_pretrained(m.name_or_path) for m in (student, teacher)]
        self.lengths = [torch.tensor([len(piece) for piece in table.pieces]) for table in aligner.pair.token_tables]
        self.gold = ULDLoss(gold, *tokenizers)

    def __call__(self, batch: Batch, outputs=None, grad_scale=1.0) -> LossTerms:
        with self.precision.autocast():
            logits = self.student(input_ids=batch.student.input_ids, use_cache=False).logits
            with torch.no_grad():
                teacher_logits = self.teacher(input_ids=batch.teacher.input_ids, use_cache=False).logits
        predicting = logits.flatten(0, 1)[batch.student.positions]
        tiles = [Tile(slice(None), slice(0), None, None)]
        text = TiledLossSpec(tiles, batch.student.targets, None, 1.0, 0.0, self.logit_clamp)
        text = tiled_loss(text, LazyLogits(predicting, None, self.precision), None)
        gold = self.gold(
            logits.float(),
            teacher_logits.float(),
            batch.student.labels,
            batch.teacher.labels,
            batch.student.input_ids,
            batch.teacher.input_ids,
            _byte_offsets(batch.student, self.lengths[0]),
            _byte_offsets(batch.teacher, self.lengths[1]),
        )
        kd = gold * batch.num_target_tokens  # GOLD's is a mean
        return dataclasses.replace(
            LossTerms.zero(logits.device),
            total=self.alpha_ce * text.total + self.alpha_kd * kd,
            ce=text.unclamped_ce,
            kd=kd.detach(),
            nonfinite_positions=text.nonfinite,
        )


def _byte_offsets(tokens: TokenBatch, lengths: Tensor) -> Tensor:
    """int64 [B, T, 2]: the bytes of each predicted token within its block, as GOLD's trainer counts them."""
    sizes = torch.where(tokens.labels >= 0, lengths[tokens.input_ids], 0)
    ends = sizes.cumsum(1)
    return torch.stack([ends - sizes, ends], dim=-1)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gold_merge", choices=("observed", "bayesian"), default="observed")
    parser.add_argument("--gold_pure", action="store_true", help="sorted L1 on the whole vocabulary, no hybrid")
    options, argv = parser.parse_known_args(argv)
    gold = GOLDConfig(
        output_dir="unused",
        bf16=False,
        use_uld_loss=True,
        uld_use_hybrid_loss=not options.gold_pure,
        uld_token_merge_strategy=options.gold_merge,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
    )
    train.Objective = functools.partial(GoldObjective, gold=gold)
    return train_sar_kd_stable.main(argv)


if __name__ == "__main__":
    sys.exit(run(main))
