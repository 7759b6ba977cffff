"""Measuring, never acting: perplexity and bits per byte, answers to questions, tokenizer coverage.

In: a model and held-out batches. Out: totals in float64 over fixed text, unclamped and weighted by tokens.
May import: `losses` and what stands below it.
"""
