"""A model made smaller: which of its parts are found, and how those that stay are kept.

`whole_model` loads what is cut and compares what was saved with it. `layers` finds and keeps decoder layers, with
`layer_settings` for the lists in a config that have one entry a layer; `feed_forward` keeps channels, `token_rows` the
rows of a smaller vocabulary. `sar_kd/commands/shrink.py` chooses.
"""
