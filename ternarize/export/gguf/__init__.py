"""GGUF, the files of llama.cpp.

blocks       a ternary weight in the block types of ggml, and back
package      the optional package gguf
model        a model's architecture, settings and tensors by llama.cpp's names
vocabulary   its tokenizer
llama        llama.cpp itself, to compare with
target       the formats gguf-tq1_0, gguf-tq2_0, gguf-q2_0, gguf-q4_0, gguf-q4_1, gguf-q2_k
"""
