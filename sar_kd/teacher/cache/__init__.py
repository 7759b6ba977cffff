"""A teacher's top-k logits on disk: written once by `sar-kd cache`, read by the run of any student.

`builder` runs the teacher, `format` defines the files, `lookup` finds the record of each token of a run.
"""
