"""What the tests of the public losses share: a loss and its gradients against the oracle."""

import torch

from grpo_fast import LossConfig, linear_grpo_loss, reference
from grpo_fast.testing import assert_close_to_oracle, random_sequences

S, L, D, V = 4, 6, 8, 37
LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")
LEVELS = ("token", "sequence")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
IMPLS = ("torch", "triton")


def config_of(loss_type="dapo", level="token", beta=0.0, kl="k3", delta=None) -> LossConfig:
    return LossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        kl_estimator=kl,
        delta=delta,
        epsilon=0.15,
        epsilon_high=0.28,
        temperature=0.8,
        max_completion_length=9,
    )


def loss_arguments(batch: dict, config: LossConfig, *, old: bool, packed: bool) -> dict:
    """Keywords of the public call for a padded batch, or the same tokens packed."""
    names = ["mask"] + (["old_logprobs"] if old else []) + (["ref_logprobs"] if config.beta else [])
    kwargs = {name: batch[name] for name in names}
    if packed:
        kwargs = {name: value.reshape(-1) for name, value in kwargs.items()}
        kwargs["cu_seqlens"] = torch.arange(S + 1, device=batch["mask"].device) * L
    return kwargs | {"config": config}


def oracle(batch: dict, config: LossConfig, *, old: bool, dtype=torch.float64, denominator=None):
    """reference.linear_grpo_loss in `dtype`: (loss, rows, gradients of hidden and weight)."""
    hidden = batch["hidden"].to(dtype).reshape(-1, D).clone().requires_grad_()
    weight = batch["weight"].to(dtype).clone().requires_grad_()
    rows = reference.linear_grpo_loss(
        hidden,
        weight,
        batch["targets"].reshape(-1),
        batch["advantages"].to(dtype).repeat_interleave(L),
        mask=batch["mask"].reshape(-1),
        cu_seqlens=torch.arange(S + 1, device=hidden.device) * L,
        old_logp=batch["old_logprobs"].to(dtype).reshape(-1) if old else None,
        ref_logp=batch["ref_logprobs"].to(dtype).reshape(-1) if config.beta else None,
        denominator=denominator,
        config=config,
    )
    rows.loss.sum().backward()
    return rows.loss.sum(), rows, hidden.grad.reshape(S, L, D), weight.grad


def check_linear(config: LossConfig, dtype: torch.dtype, impl: str, device, *, old: bool, packed):
    # this seed has rows clipped on either side
    batch = random_sequences(S, L, D, V, dtype, device, seed=2)
    hidden, weight = batch["hidden"].clone().requires_grad_(), batch["weight"].clone()
    weight.requires_grad_()
    shape = (S * L,) if packed else (S, L)
    output = linear_grpo_loss(
        hidden.reshape(*shape, D),
        weight,
        batch["targets"].reshape(shape),
        batch["advantages"],
        impl=impl,
        **loss_arguments(batch, config, old=old, packed=packed),
    )
    # grad_output other than 1 must scale and nothing else
    (output.loss * 2).backward()
    truth = oracle(batch, config, old=old)
    eager = oracle(batch, config, old=old, dtype=dtype)
    found = (output.loss, None, hidden.grad / 2, weight.grad / 2)
    for name, got, base, true in zip(("loss", "", "dH", "dW"), found, eager, truth, strict=True):
        if name:
            assert_close_to_oracle(got, base, true, name=name)
    flat = output.logprobs.reshape(-1), output.entropy.reshape(-1)
    assert_close_to_oracle(flat[0], eager[1].logp, truth[1].logp, name="logprobs")
    assert_close_to_oracle(flat[1], eager[1].entropy, truth[1].entropy, name="entropy")
    assert output.logprobs.shape == shape
    return output, truth[1], batch
