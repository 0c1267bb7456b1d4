"""A batch in which nothing is bad."""

import pytest
import torch
from changed_call import D, L, S, V

from grpo_fast.testing import random_sequences


@pytest.fixture
def batch(device) -> dict:
    return random_sequences(S, L, D, V, device=device) | {
        "mask": torch.ones(S, L, dtype=torch.bool, device=device),
        "targets": torch.arange(S * L, device=device).reshape(S, L),
        "old_logprobs": torch.full((S, L), -2.0, device=device),
        "ref_logprobs": torch.full((S, L), -2.5, device=device),
    }
