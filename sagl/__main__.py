"""`python -m sagl`: the `sagl` command of this interpreter."""

from sagl.cli import run

if __name__ == "__main__":
    run()
