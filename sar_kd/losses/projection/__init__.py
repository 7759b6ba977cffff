"""Byte-prefix projection: distillation between models with different tokenizers.

At each position the distribution of the finer tokenizer, conditioned on the bytes already written, is summed into
classes that both vocabularies share; there the two models are compared over the whole vocabulary.
`marginals` sums and conditions, `joint` adds continuations of a longer token, `truncated` does the same from a
teacher's top k, `loss` forms values and gradients.
"""
