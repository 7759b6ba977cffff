"""The version of the package, and that of the files of a run folder."""

__version__ = "0.1.0"

RUN_FORMAT = 3
"""Written into config.json, summary.json and a checkpoint's progress.json. A run of another format is not resumed."""

TOKEN_FORMAT = 6
"""Part of the key of every entry of a token cache: entries of another format are not read."""
