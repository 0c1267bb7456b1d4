"""open-instruct's `forward_for_logprobs` and `compute_grpo_loss`, same arguments and results: no
logits, and this project's objectives.

Shapes: `S` rows, `L` tokens of a row.
"""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from ..model import hidden_states
from ..objective import Bounds, cispo, clip, kl_divergence
from ..ops import linear_logprob
from .hosts import Exchange, host_module, trained_head

INSTALL = "install open-instruct from its repository, commit e6c3044"
# open-instruct holds the log-ratio to the reference at it.
KL_LIMIT = 40.0
ESTIMATORS = ("k1", "k2", "k3")
_exchange = Exchange("open-instruct")


def forward_for_logprobs(
    model: nn.Module,
    query_responses: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    pad_token_id: int,
    temperature: float,
    return_entropy: bool = False,
    pass_olmo_core_doc_lens: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(log-probs, entropy) of query_responses[:, 1:], float32 [S, L - 1]; the entropy, None unless
    asked for, has no gradient."""
    if pass_olmo_core_doc_lens:
        raise ConfigError("pass_olmo_core_doc_lens is for OLMo-core models: call unregister()")
    layer = trained_head(model)
    hidden = hidden_states(model, query_responses, attention_mask, position_ids)
    labels = query_responses[:, 1:]
    found = linear_logprob(
        hidden[:, :-1].to(layer.weight.dtype),
        layer.weight,
        labels.masked_fill(labels == pad_token_id, 0),
        bias=layer.bias,
        temperature=temperature,
        softcap=layer.softcap,
        logit_scale=layer.logit_scale,
        return_entropy=return_entropy,
    )
    return found.logprobs, found.entropy.detach() if return_entropy else None


def compute_grpo_loss(
    new_logprobs: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    config: Any,
    rho_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(policy loss, whether clipped, KL) of every token, [S, L - 1]; loss_fn `dapo` or `cispo`.

    cispo's bound is 1 + clip_higher here, and epsilon_high itself in TRL.
    """
    kind, low, high = str(config.loss_fn), 1.0 - config.clip_lower, 1.0 + config.clip_higher
    tokens = SimpleNamespace(logprobs=new_logprobs, ratio=ratio, advantages=advantages)
    if kind == "dapo":
        loss = clip(tokens, Bounds(low, high))
        clipped = ratio.clamp(low, high) * advantages < ratio * advantages
    elif kind == "cispo":
        loss, clipped = cispo(tokens, Bounds(0.0, high)), ratio > high
    else:
        raise ConfigError(f"loss_fn = {kind!r} is not available: choose dapo or cispo")
    clipped = (clipped & (rho_weights != 0)).float()
    if ref_logprobs is None:
        return loss * rho_weights, clipped, loss.new_zeros(loss.shape)
    return loss * rho_weights, clipped, _kl(new_logprobs, ref_logprobs, ratio, config.kl_estimator)


def _kl(logp: Tensor, ref_logp: Tensor, ratio: Tensor, number: int) -> Tensor:
    if number in range(len(ESTIMATORS)):
        return kl_divergence(logp, ref_logp, estimator=ESTIMATORS[number], limit=KL_LIMIT)
    if number != len(ESTIMATORS):
        raise ConfigError(f"kl_estimator = {number!r} is not available: choose 0, 1, 2 or 3")
    return ratio * kl_divergence(logp, ref_logp, estimator="k1", limit=KL_LIMIT)


def register() -> None:
    """Exchange both functions in `open_instruct.grpo_utils`, where its trainers look them up."""
    host = host_module("open_instruct.grpo_utils", install=INSTALL)
    _exchange.apply(
        (host, "forward_for_logprobs", forward_for_logprobs),
        (host, "compute_grpo_loss", compute_grpo_loss),
    )


def unregister() -> None:
    """open-instruct has its own functions again."""
    _exchange.undo()
