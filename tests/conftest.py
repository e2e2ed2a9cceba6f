"""What every test shares: tests that start real processes run one after another, or two cores would be fought over."""

from __future__ import annotations

from pathlib import Path

import pytest

_WITH_PROCESSES = {"integration", "e2e"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep integration and end-to-end tests together on one pytest-xdist worker (`--dist loadgroup`)."""
    root = Path(__file__).parent
    for item in items:
        if item.path.relative_to(root).parts[0] in _WITH_PROCESSES:
            item.add_marker(pytest.mark.xdist_group("processes"))
