"""The process of a run: its ranks, device and dtype, files and terminal.

In: settings of precision; paths. Out: `Precision` (device, autocast, loss scale), the process group, atomic writes and
digests, free memory and disk space, numbers as text, a request to stop.
May import: `config` and what stands below it.
"""
