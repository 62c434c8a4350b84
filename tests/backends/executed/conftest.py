"""These tests need the driver that executes: tests/backends/test_executed.py runs them, in a
process of their own."""


def pytest_ignore_collect(collection_path, config):
    return None if hasattr(config, "ptx") else True
