"""A teacher's top-k logits on disk: written once by `sar-kd cache`, read by any student's run.

`builder` runs the teacher, `format` is what the files look like, `lookup` finds the record of each token of a run.
"""
