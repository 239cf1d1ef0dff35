"""Kernel tests: memory that nobody wrote is NaN."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    """Make ``torch.empty`` and its kin return NaN, so that reading before writing shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with fill_uninitialized_memory, torch's default
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
