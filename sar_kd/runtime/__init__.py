"""The process that a run lives in: its ranks, its device and dtype, its files and its terminal.

In: settings of precision and of parallelism; paths. Out: `Precision` (device, autocast, loss scale), the process group,
atomic writes and digests, free memory and disk, lines for a terminal, a request to stop.
May import: `config` and what stands below it.
"""
