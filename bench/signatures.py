"""What `static.py` compiles each kernel as: types, flags, the configurations of its own file.

A launch compiles a kernel for the dtypes, flags and tile it is called with. Every flag is on in one
variant and off in another; the tiles of a file are run through where logits are bfloat16, and the
widest one elsewhere. An argument that is None is a constant to Triton.
"""

from dataclasses import dataclass, field

from grpo_kernels import group_advantage, policy_loss, segment_reduce, token_logprob


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One compiled form of a kernel."""

    label: str
    types: dict[str, str]
    """Argument -> Triton type, as `*bf16` or `i64`."""
    constants: dict[str, object] = field(default_factory=dict)
    """constexpr arguments, without those of the configuration."""
    configs: tuple[dict[str, int], ...]
    """constexpr tiles and launch options (`num_warps`, ...), one compilation each."""


def _pointers(kind: str, *names: str) -> dict[str, str]:
    return {f"p_{name}": f"*{kind}" for name in names}


# V a multiple of 16, as every real vocabulary is padded, or any number.
ALIGNED, RAGGED = {"UNIT": 16}, {"UNIT": 1}
# Strides are i32 below 2^31 entries; i64 is the harder case for registers.
_ROWS = {"p_targets": "*i64", "v_units": "i32", "stride_logits": "i64", "temperature": "fp32"}
_FORWARD = _ROWS | _pointers("fp32", "logp", "lse")
_BACKWARD = _ROWS | {"stride_out": "i64"} | _pointers("fp32", "dlogp", "lse")
_POLICY = (
    _ROWS
    | _pointers("fp32", "advantages", "weights", "loss", "logp", "entropy", "ratio")
    | _pointers("fp32", "mass", "slope")
    | {"stride_dlogits": "i64"}
    | dict.fromkeys(("low", "high", "cap", "dual_clip", "beta", "log_ratio_clamp"), "fp32")
)
_CLIP = {
    "p_policy_weights": None,
    "p_entropy_weights": None,
    "OBJECTIVE": "clip",
    "ESTIMATOR": "k3",
    "K2_SLOPE": False,
    "BIAS_CORRECTED": False,
}
_EVERYTHING = _pointers(
    "fp32", "old_logp", "ref_logp", "kl", "policy_weights", "entropy_weights", "temperature"
)
_GROUP = _pointers("fp32", "rewards", "advantages", "mean", "std") | {
    "p_offsets": "*i64",
    "p_degenerate": "*u8",
    "eps": "fp32",
}


def _all(configs: list[dict[str, int]]) -> tuple[dict[str, int], ...]:
    return tuple(configs)


def _widest(configs: list[dict[str, int]]) -> tuple[dict[str, int], ...]:
    return (configs[0],)


TABLE: dict[str, tuple[Variant, ...]] = {
    "_token_logprob_fwd_kernel": (
        Variant(
            label="bf16 entropy",
            types=_FORWARD | _pointers("bf16", "logits") | _pointers("fp32", "entropy"),
            constants=ALIGNED | {"p_temperature": None, "p_other_squares": None},
            configs=_all(token_logprob.CONFIGS),
        ),
        Variant(
            label="bf16 entropy squares",
            types=_FORWARD
            | _pointers("bf16", "logits")
            | _pointers("fp32", "entropy", "other_squares"),
            constants=ALIGNED | {"p_temperature": None},
            configs=_widest(token_logprob.CONFIGS),
        ),
        Variant(
            label="fp32 temperatures ragged",
            types=_FORWARD | _pointers("fp32", "logits", "temperature"),
            constants=RAGGED | {"p_entropy": None, "p_other_squares": None},
            configs=_widest(token_logprob.CONFIGS),
        ),
    ),
    "_token_logprob_bwd_kernel": (
        Variant(
            label="bf16",
            types=_BACKWARD | _pointers("bf16", "logits", "out"),
            constants=ALIGNED | {"p_temperature": None, "p_dentropy": None, "p_entropy": None},
            configs=_all(token_logprob.GRADIENT_CONFIGS),
        ),
        Variant(
            label="fp32 entropy temperatures ragged",
            types=_BACKWARD
            | _pointers("fp32", "logits", "out", "temperature", "dentropy", "entropy"),
            constants=RAGGED,
            configs=_widest(token_logprob.GRADIENT_CONFIGS),
        ),
    ),
    "_policy_loss_kernel": (
        Variant(
            label="bf16 gradient kl",
            types=_POLICY
            | _pointers("bf16", "logits", "dlogits")
            | _pointers("fp32", "old_logp", "ref_logp", "kl"),
            constants=ALIGNED | _CLIP | {"p_temperature": None},
            configs=_all(policy_loss.CONFIGS),
        ),
        Variant(
            label="fp32 gradient",
            types=_POLICY | _pointers("fp32", "logits", "dlogits", "old_logp"),
            constants=ALIGNED | _CLIP | {"p_temperature": None, "p_ref_logp": None, "p_kl": None},
            configs=_widest(policy_loss.CONFIGS),
        ),
        Variant(
            label="fp32 sapo temperatures ragged loss-only",
            types=_POLICY | _pointers("fp32", "logits", "temperature", "ref_logp", "kl"),
            constants=RAGGED
            | _CLIP
            | {"OBJECTIVE": "sapo", "ESTIMATOR": "abs", "p_old_logp": None, "p_dlogits": None},
            configs=_widest(policy_loss.CONFIGS),
        ),
        Variant(
            label="bf16 everything dppo_kl",
            types=_POLICY | _EVERYTHING | _pointers("bf16", "logits", "dlogits"),
            constants=ALIGNED
            | {
                "OBJECTIVE": "dppo_kl",
                "ESTIMATOR": "k3",
                "K2_SLOPE": True,
                "BIAS_CORRECTED": True,
            },
            configs=_widest(policy_loss.CONFIGS),
        ),
    ),
    "_group_advantage_kernel": (
        Variant(
            label="std",
            types=_GROUP,
            constants={
                "p_order": None,
                "SCALE": "group",
                "BASELINE": "mean",
                "UNBIASED": True,
            },
            configs=_all(group_advantage.CONFIGS),
        ),
        Variant(
            label="order leave-one-out",
            types=_GROUP | {"p_order": "*i64"},
            constants={"SCALE": "none", "BASELINE": "leave_one_out", "UNBIASED": False},
            configs=_all(group_advantage.CONFIGS),
        ),
        Variant(
            label="mean pass-at-k",
            types=_GROUP,
            constants={
                "p_order": None,
                "SCALE": "mean",
                "BASELINE": "pass_at_k",
                "UNBIASED": True,
            },
            configs=_all(group_advantage.CONFIGS),
        ),
    ),
    "_segment_reduce_kernel": (
        Variant(
            label="fp32 sum",
            types=_pointers("fp32", "x", "out") | {"p_cu_seqlens": "*i64"},
            constants={"MEAN": False},
            configs=_all(segment_reduce.CONFIGS),
        ),
        Variant(
            label="bool mean",
            types={"p_x": "*u8", "p_out": "*fp32", "p_cu_seqlens": "*i32"},
            constants={"MEAN": True},
            configs=_all(segment_reduce.CONFIGS),
        ),
    ),
}
