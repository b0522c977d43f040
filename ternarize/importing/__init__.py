"""Models that are ternary already become ternarize folders: nothing is fitted, every weight stays what it is.

folders    Hugging Face checkpoints: BitNet's, and floats of which each group holds two or three levels
gguf       GGUF files
weight     one weight's ternary form
writing    the folder, which both end with
card       its README.md
"""
