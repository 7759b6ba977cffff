"""What is checked before a run: GPU, disk, memory, clamps, tokenizers.

In: the settings. Out: findings (lines and a record), a refusal where nothing could be learned, a batch size that fits.
Nothing is trained, no weight is changed.
May import: `teacher` and what stands below it.
"""
