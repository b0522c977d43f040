"""GGUF, the files of llama.cpp: ternary weights in its block types, whole models with tokenizer, and back."""
