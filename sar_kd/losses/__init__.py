"""The objective: alpha_ce * CE(text) + alpha_kd * T^2 * D(teacher, student), formed in logit tiles.

In: a `Batch`, and hidden states with the LM heads of both models. Out: `LossTerms`: sums over target tokens in float32,
never means; the step divides once. Gradients are formed with the values, so no [B, T, V] tensor exists.
`projection/` is distillation across tokenizers.
May import: `data`, `models` and what stands below them.
"""
