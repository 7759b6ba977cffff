"""Measurements on held-out text: perplexity and bits per byte, accuracy on questions, tokenizer coverage.

In: a model and held-out batches. Out: totals in float64 over fixed text, without clamps, weighted by tokens.
May import: `losses` and the packages below it.
"""
