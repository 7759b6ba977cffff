"""The teacher of a run: none, loaded (with its routing, `moe/`), or read from a cache (`cache/`).

In: models and the held-out text. Out: what the training loop asks of a teacher: its perplexity, its routers for each
step, their metrics and their state; `base.py` has the list.
May import: `evaluation` and what stands below it.
"""
