"""What holds for all tests."""

import pytest

from wavlm_fast.backends.cpu import choices


@pytest.fixture(autouse=True)
def _nothing_is_left_to_torch(monkeypatch):
    """Our kernels train whatever tests train, on every processor; tests of the choice bring rows of their own."""
    monkeypatch.setattr(choices, "ROWS", ())
