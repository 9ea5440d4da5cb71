"""Stands in for a module that the source distribution lacks; `tests/model/test_export.py` tests export."""


class ExportTesterMixin:
    """No tests."""
