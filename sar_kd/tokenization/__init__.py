"""The exact bytes of every token.

In: a tokenizer of any backend. Out: a `TokenTable` (bytes of each id, verified), a `TokenizerPair`, and `TokenStream`s:
the ids of a text, the byte at which each token ends, and which of them are targets.
May import: `runtime` and what stands below it.
"""
