"""The scripted model of the evaluation tests."""

from evaluation.conftest import scripted_model

__all__ = ["scripted_model"]
