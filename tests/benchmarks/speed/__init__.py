"""The speed benchmark: whole models by `python -m tests.benchmarks.speed`, the kernels alone by `kernels.py`."""
