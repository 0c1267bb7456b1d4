"""The releases of TRL that `trl` is written for, and in what their losses differ."""

from typing import Any

from ..errors import ConfigError

OLDEST, TOO_NEW = (1, 9), (1, 17)
SUPPORTED = "trl >= 1.9, < 1.17"
TOKEN_SUMS = ("cispo", "dapo", "vespo")


def host() -> tuple[Any, type]:
    """The installed TRL and its GRPOTrainer; ConfigError for a release that was not tested."""
    advice = f"pip install '{SUPPORTED.replace(' ', '')}'"
    try:
        import trl
        from trl import GRPOTrainer
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"grpo_fast.integrations.trl needs {SUPPORTED}, which cannot be imported here "
            f"({str(error).splitlines()[-1]}): {advice}"
        ) from error
    if not OLDEST <= _release(trl.__version__) < TOO_NEW:
        raise ConfigError(
            f"trl is {trl.__version__}, grpo_fast.integrations.trl is written for {SUPPORTED}: "
            f"{advice}, or take TRL's own GRPOTrainer"
        )
    return trl, GRPOTrainer


def _release(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def of_the_generation(version: str, loss_type: str) -> bool:
    """Whether a loss and its entropy bonus are over the tokens of the whole generation batch.

    From 1.10 on the tokens count for the optimizer step, and the bonus is a mean of the
    micro-batch, as of every other loss type.
    """
    return loss_type in TOKEN_SUMS and _release(version) < (1, 10)


def counts_padding(version: str, args: Any) -> bool:
    """Whether TRL's loss is a mean over padding too: `luspo` up to 1.9, where it is by token."""
    by_token = (
        args.importance_sampling_level == "token"
        or args.beta != 0
        or args.top_entropy_quantile < 1
        or args.use_vllm
    )
    return args.loss_type == "luspo" and by_token and _release(version) < (1, 10)
