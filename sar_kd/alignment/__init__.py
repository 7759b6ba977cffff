"""Alignment of two tokenizations of the same bytes, in index arrays; no arithmetic on logits.

In: a `TokenizerPair`, the byte ends of two token streams, and the blocks of a batch. Out: which positions of the two
models are compared, over which classes of tokens that the vocabularies share, and segments to do so one at a time.
Made in the collator, before the step.
May import: `tokenization` and what is below it. Source: research notes in docs/tokenizers.md.
"""
