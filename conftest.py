"""Settings of the whole test run."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

# The four folders are collected as src/trimtab/<folder>, so that their doctests run under the one import name.
collect_ignore_glob = ["envs/*", "agents/*", "inner_training/*", "policies/*"]


def _limit_threads() -> bool:
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    torch.set_num_threads(1)
    return True


def pytest_collection_finish() -> None:
    """Use one thread for each worker once collection has imported torch; light tests never import it."""
    _limit_threads()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Keep one thread for modules that import torch late."""
    _limit_threads()
    yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
