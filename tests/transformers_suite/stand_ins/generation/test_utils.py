"""Stands in for a module that the source distribution lacks; `tests/model/test_generation.py` tests generation."""


class GenerationTesterMixin:
    """No tests."""
