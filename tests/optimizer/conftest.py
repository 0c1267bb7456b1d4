"""A tiny model in bfloat16, as a run loads it."""

import pytest
import torch

from grpo_fast.model import load_model
from grpo_fast.tiny import save_tiny


@pytest.fixture
def model(tmp_path):
    """Loaded as a resumed one is, for what `bfloat16()` would round besides the parameters."""
    torch.manual_seed(0)
    save_tiny(tmp_path / "base")
    return load_model(tmp_path / "base", dtype=torch.bfloat16, device="cpu").eval()
