"""What is checked before a run: GPU, disk, memory, clamps, tokenizers.

In: the config. Out: findings (lines and a record), a refusal of a run that would fail, a batch size that fits.
Nothing is trained, no weight is changed.
May import: `teacher` and what stands below it.
"""
