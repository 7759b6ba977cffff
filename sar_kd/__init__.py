"""SAR-KD: distil a large causal language model into a small one in fp16, without NaN.

Shapes, everywhere: B batch, T positions, V vocabulary (rows of the head), D hidden size, N flattened tokens that
count, K of them that a teacher row speaks about, M and E entries of a vocabulary map, E experts where there is a
router; `_s` student, `_t` teacher.

Reading order: `train_sar_kd_stable.py`, `step.train_step`, `objective`, `losses`, `guards`; then the way of the
data, `data`, `alignment`, `tokens`.
"""

__version__ = "0.1.0"
