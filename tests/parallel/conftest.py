"""Runs to sample from, as the tests of `generate/` make them."""

from tests.generate.conftest import make_run, run

__all__ = ["make_run", "run"]
