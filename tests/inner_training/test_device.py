"""Names of devices: those of this machine are taken, all others are refused by name."""

from __future__ import annotations

import pytest
import torch

from trimtab.errors import UnknownNameError, UserError
from trimtab.inner_training.device import check_device


@pytest.mark.parametrize("given", ["cpu", torch.device("cpu")], ids=repr)
def test_the_processor_is_always_there(given: object) -> None:
    assert check_device(given) == torch.device("cpu")


@pytest.mark.parametrize("given", ["", "tpu", "meta", "cpu:0x", "cuda:-1", None, 3], ids=repr)
def test_other_names_are_refused(given: object) -> None:
    with pytest.raises(UnknownNameError, match="unknown device .*allowed: cpu, cuda, cuda:0, mps"):
        check_device(given)


@pytest.mark.parametrize(("count", "fits"), [(0, False), (1, False), (2, True)])
def test_a_device_must_be_on_this_machine(count: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if fits:
        assert check_device("cuda:1") == torch.device("cuda", 1)
        return
    with pytest.raises(UserError, match="device 'cuda:1' is not present on this machine; use 'cpu'"):
        check_device("cuda:1")
