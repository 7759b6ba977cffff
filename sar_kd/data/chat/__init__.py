"""Conversations, as each model's chat template writes them.

In: the messages of an example. Out: the token ids of both models, and which of them are targets.
`templates` renders within a limit, `layout` finds the messages' texts in what was rendered,
`encoding` makes tokens of it.
"""
