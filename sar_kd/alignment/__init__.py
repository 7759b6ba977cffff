"""Where two tokenizations of the same bytes meet: index arrays, no arithmetic on logits.

In: a `TokenizerPair`, the byte ends of two token streams, and the blocks of a batch. Out: the arrays that say which
teacher position belongs to which student position, and which tokens of two vocabularies form one shared class. They are
made in the collator, before the step.
May import: `tokenization` and what stands below it. Source: research notes in docs/tokenizers.md.
"""
