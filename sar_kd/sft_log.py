"""What a fine-tuning run tells, in the words that its users know."""

from __future__ import annotations

from sar_kd.metrics import RunLog


class SftLog(RunLog):
    """A run folder and the terminal of a run without a teacher.

    Every `--log_steps`: {'loss': 2.27, 'grad_norm': 1.55, 'learning_rate': 0.0002, 'epoch': 0.31}
    the loss as the mean since the last line, nan if one of them was; the rest as of this step
    """

    def say_start(self, start: dict, teacher: dict) -> None:
        """Say where the student starts; there is no teacher."""
        bits = start["val_bits_per_byte"]
        self.say(f"Validation PPL at the start = {start['val_ppl']:.2f} (bits per byte {bits:.3f})")

    def _postfix(self, record: dict, success_rate: float) -> str:
        return (
            f"loss={record['loss']:.3f} grad_norm={record['grad_norm']:.2f} ppl={self._perplexity:.2f} "
            f"success={success_rate:.0%} loss_scale={record['loss_scale']:.0f}"
        )

    def _line(self, step: int, success_rate: float) -> str:
        last = self._window[-1]
        losses = [record["loss"] for record in self._window if record["num_target_tokens"]]
        # No average that leaves anything out, and no zero for want of a figure: what is not finite shows.
        figures = {
            "loss": sum(losses) / len(losses) if losses else float("nan"),
            "grad_norm": last["grad_norm"],
            "learning_rate": last["learning_rate"],
        }
        rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
        return str({**rounded, "epoch": round(last["epoch"], 2)})
