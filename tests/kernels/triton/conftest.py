import pytest


def pytest_collection_modifyitems(items):
    # A tile may reach rows of no expert, which nobody writes; the interpreter's numpy multiplies what is masked later.
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"))
