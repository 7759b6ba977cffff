"""A saved model as a GGUF file, for llama.cpp and Ollama, through llama.cpp's own converter.

`export` runs the converter, in a process of `driver`; `vocabulary` makes what it needs of a tokenizer; `check` compares
the file with the model, and `tokens` cuts text as llama.cpp does.
"""
