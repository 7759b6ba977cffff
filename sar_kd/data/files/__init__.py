"""Text from files, from the `datasets` package and from Python: documents and conversations, one at a time.

`sources.load_documents` chooses, `samples` reads the examples of a file, `tables` those of .csv, .json and .parquet.
"""
