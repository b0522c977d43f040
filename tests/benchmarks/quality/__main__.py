"""`python -m tests.benchmarks.quality`."""

from .run import main

if __name__ == "__main__":
    main()
