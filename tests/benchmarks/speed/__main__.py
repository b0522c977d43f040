"""`python -m tests.benchmarks.speed`."""

from .run import main

if __name__ == "__main__":
    main()
