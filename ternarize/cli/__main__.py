"""`python -m ternarize.cli`."""

from ternarize.cli import run

if __name__ == "__main__":
    run()
