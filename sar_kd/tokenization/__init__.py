"""The exact bytes of every token.

In: a tokenizer of any backend. Out: a `TokenTable` (the verified bytes of each id), a `TokenizerPair`, and
`TokenStream`s: the ids of a text, the byte at which each token ends, and which of them are targets.
May import: `runtime` and the packages below it.
"""
