"""The step and the loop around it: guards, optimizer, checkpoints, DDP and FSDP, on-policy sampling.

In: models, datasets and the objective. Out: a run folder. `step.train_step` is one attempted update, `guards` decides
whether it is applied, `trainer` is the loop.
May import: `preflight` and what stands below it.
"""
