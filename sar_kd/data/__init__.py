"""Text to batches: files and chat -> documents -> token streams -> blocks -> `Batch`.

In: files, `datasets`, the embedded text, or texts in memory. Out: a dataset whose `batch` gives `Batch`es: token ids
and labels of both models, the alignment of their positions, and the names of the documents.
May import: `alignment` and what stands below it; not `models` or `reporting`.
"""
