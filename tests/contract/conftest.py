"""Marks the parts of the contract that are not built yet; a strict xfail turns red the moment one of them works.

Whoever builds a part removes its line here.
"""

import pytest

OPEN: dict[str, list[str]] = {}


def pytest_collection_modifyitems(items):
    for item in items:
        for part, prefixes in OPEN.items():
            if item.path.name == "test_seed_usage.py" and any(item.name.startswith(p) for p in prefixes):
                item.add_marker(pytest.mark.xfail(reason=f"not built yet: {part}", strict=True))
