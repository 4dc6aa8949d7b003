"""Settings of the whole test run."""

from __future__ import annotations

import signal
import sys

import pytest

# The four folders are collected as src/trimtab/<folder>, so that their doctests run under the one import name.
collect_ignore_glob = ["envs/*", "agents/*", "inner_training/*", "policies/*"]


# A shell starts what runs in its background with Ctrl-C ignored, and tests of Ctrl-C would then send it in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Give each test process one thread, without importing torch for tests that do not need it."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
