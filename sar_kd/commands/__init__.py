"""One module for each `sar-kd` command; `train.py` is the program's table of contents.

In: a command line. Out: a summary, or an error that `main.run` turns into an exit code.
May import: everything but `api`.
"""
