"""`launcher` of policy_loss, whose tests are three files; files of other kernels have their own."""

import pytest
from policy_loss_cases import SMALL_TILES

from grpo_kernels import policy_loss as module


@pytest.fixture
def launcher(monkeypatch, guard):
    """policy_loss in small tiles, each argument between canaries."""
    monkeypatch.setattr(module, "CONFIGS", SMALL_TILES)
    return guard(module.policy_loss)
