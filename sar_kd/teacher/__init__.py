"""The teacher of a run: none, loaded (with its routing, `moe/`), or read from a cache (`cache/`).

In: models and the held-out text. Out: a `base.Teacher`: its perplexity, its routers for each step, their metrics and
their state.
May import: `evaluation` and the packages below it.
"""
