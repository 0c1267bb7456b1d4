"""Which advantage: the choices that `group_advantages` and `TrainConfig` share."""

from typing import Literal

Scale = Literal["group", "batch", "none", "mean", "nonzero"]
Baseline = Literal["mean", "leave_one_out", "pass_at_k"]
MultiReward = Literal["sum_then_normalize", "normalize_then_sum"]


def advantage_conflict(**options: str) -> str | None:
    """Why a scale, a baseline and a multi-reward rule make no advantage together, or None.

    The three come in this order, under the names by which the caller knows them.
    """
    (scale_name, scale), (base_name, baseline), (multi_name, multi) = options.items()
    if multi == "normalize_then_sum" and (scale, baseline) != ("group", "mean"):
        return (
            f"{multi_name} = {multi!r} (GDPO) takes mean and std of each reward's groups itself, "
            f"found {scale_name} = {scale!r} and {base_name} = {baseline!r}: leave both out"
        )
    if scale == "mean" and baseline != "mean":
        return (
            f"{scale_name} = 'mean' (MaxRL) divides by the mean it subtracts, found {base_name} = "
            f"{baseline!r}: leave {base_name} out"
        )
    if scale == "nonzero" and baseline == "pass_at_k":
        return (
            f"{scale_name} = 'nonzero' (GPG) makes up for completions that teach nothing, which "
            f"are meant with {base_name} = 'pass_at_k': choose {scale_name} group, batch or none"
        )
    return None
