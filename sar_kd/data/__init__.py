"""Documents to batches.

In: files, the `datasets` package, the embedded text, or texts in memory. Out: a `Dataset` whose `Batch`es hold the
token ids and labels of both models, and the alignment of their positions.
`files.sources.load_documents` -> `tokenize` -> `pack` -> `Dataset`; the last three are `dataset.build_dataset`. How
conversations become tokens is in `chat`.
May import: `alignment` and the packages below it; not `models` or `reporting`.
"""
