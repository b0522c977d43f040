"""The quality benchmark: ternarize beside other tools, all on the same calibration tokens."""
