"""The output of a run: the terminal, metrics.jsonl, summary.json, report.html, the model card, trackers.

In: records of steps and evaluations, a run folder, or a log of another program. Out: lines, files and pages. Nothing
here changes a run.
May import: `runtime` and what stands below it; not `data` or `models`.
"""
