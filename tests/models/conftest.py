from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("leaving_cases", "original_cases", "wavlm_cases", "test_losses")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state and leaves torch's global switches as they were."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models this small lose time to a thread pool, and the suite runs in several processes."""
    torch.set_num_threads(1)
