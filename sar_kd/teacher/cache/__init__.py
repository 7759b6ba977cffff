"""A few tokens of each of a teacher's distributions on disk: written by `sar-kd cache`, read by the run of any student.

`builder` runs the teacher, `draws` chooses tokens at random, `format` defines the files, `lookup` finds the record of
each token of a run.
"""
