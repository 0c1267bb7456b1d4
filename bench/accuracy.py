"""`grpo-fast bench --accuracy`: how far everybody's log-probs and gradients are from float64.

The inputs are numbers of the given dtype, the truth is the oracle's in float64 on those very
numbers. Logits are peaked as a trained policy's: targets 0 to 16 nats above all others together.

  log-prob   largest error of a token's log-prob, in nats (a clip range of 0.2 is 0.2 nats wide)
  entropy    the same of its entropy
  dH, dW     relative L2 error of the gradient in hidden states and head, as stored, on policy
  ratio 1    whether exp(log-prob - old log-prob) is exactly 1 for every token when the provider's
             log-prob op has made the old ones
  confident  relative L2 error of dH over tokens 16 nats above all others, log-prob -1e-7
  NaN        whether one of those, or of tokens 200 nats above, gives NaN or inf anywhere

A `-` is something the provider does not give. The last row is the truth rounded to the dtype: no
gradient stored there can be closer."""

import math
import os
import sys
import warnings

import torch
from torch import Tensor

from .bench_linear_grpo import Exact, exact_gradients
from .options import Parser
from .peers import PROVIDERS, Batch, Calls, gradients, random_batch
from .provider import DTYPES, SEQUENCES, Gap, Provider, said
from .record import about, written
from .timing import align, checked_rows, dtype_name

SHAPE = (128, 256, 8192)
# Interpreted, this many logits take a minute on one core.
INTERPRETED_LOGITS = 2**21
# Nats between the target and all other entries together.
CONFIDENT, CERTAIN = (15.5, 16.5), (199.0, 201.0)
CONFIDENT_TOKENS = 8
MEASURES = ("logp", "entropy", "dhidden", "dweight", "confident_dhidden")


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def largest(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max())


class Truth:
    """The three batches of a table and what float64 says about them."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device):
        n, d, v = shape

        def batch(tokens: int, **margin) -> Batch:
            made = random_batch((tokens, d, v), dtype, device, **margin)
            return made._replace(old_logprobs=None)

        self.batch = batch(n)
        self.confident = batch(CONFIDENT_TOKENS, margin=CONFIDENT, seed=1)
        self.certain = batch(CONFIDENT_TOKENS, margin=CERTAIN, seed=2)
        self.exact: Exact = exact_gradients(self.batch.rows())
        self.exact_confident: Exact = exact_gradients(self.confident.rows())


def logp_error_of_loss(calls: Calls, truth: Truth) -> float:
    """The log-prob error of a provider that shows its loss alone, over CHECKED_ROWS tokens.

    One token with advantage -1 and the exact log-prob as its old one: the loss is the ratio, and
    its logarithm the error (an error below log(1 - epsilon) shows as that).
    """
    rows, worst = truth.batch.rows(), 0.0
    for row in checked_rows(len(rows["targets"]), rows["targets"].device).tolist():
        one = Batch(
            rows["hidden"][row].view(1, 1, -1),
            rows["weight"],
            rows["targets"][row].view(1, 1),
            torch.full_like(rows["advantages"][:1], -1.0),
            truth.exact.logp[row].float().view(1, 1),
        )
        worst = max(worst, abs(math.log(float(calls.loss(one).loss))))
    return worst


def measured(calls: Calls, truth: Truth) -> dict:
    """Everything the table says about one provider."""
    found: dict = {}
    got = gradients(calls, truth.batch)
    parts = [got]
    if calls.logprobs is None:
        found |= {"logp": logp_error_of_loss(calls, truth), "entropy": None, "ratio_is_1": None}
    else:
        rows = truth.batch.rows()
        with torch.no_grad():
            own = calls.logprobs(rows["hidden"], rows["weight"], rows["targets"], entropy=True)
        exact, entropy = truth.exact, own.entropy
        found["logp"] = largest(own.logp, exact.logp)
        found["entropy"] = None if entropy is None else largest(entropy, exact.entropy)
        found["ratio_is_1"] = bool(((got.logp - own.logp).exp() == 1).all())
        parts.append(own)
    found["dhidden"] = relative(got.dhidden, truth.exact.dhidden)
    found["dweight"] = relative(got.dweight, truth.exact.dweight)
    confident = gradients(calls, truth.confident)
    found["confident_dhidden"] = relative(confident.dhidden, truth.exact_confident.dhidden)
    parts += [confident, gradients(calls, truth.certain)]
    tensors = [x for part in parts for x in part if x is not None]
    found["not_finite"] = not all(bool(x.isfinite().all()) for x in tensors)
    return found


def provider_row(provider: Provider, truth: Truth) -> dict:
    """One line of a results file; a provider that cannot be measured has its `gap`."""
    n, v = truth.batch.targets.numel(), truth.batch.weight.shape[0]
    row = {"provider": provider.name, "version": provider.version, "computes": provider.computes}
    row |= dict.fromkeys((*MEASURES, "ratio_is_1", "not_finite", "gap"))
    device = truth.batch.hidden.device
    interpreted = provider.name == "grpo-fast triton" and device.type == "cpu"
    try:
        if provider.bound:
            raise Gap("a bound on time, not the loss")
        if device.type in provider.compiled_on:
            raise Gap("not asked here: it would be compiled for each batch")
        if interpreted and n * v > INTERPRETED_LOGITS:
            raise Gap(f"interpreted, at most {INTERPRETED_LOGITS} logits: take a smaller --shape")
        calls = provider.calls()
        try:
            return row | measured(calls, truth)
        except Exception as error:  # whatever a peer does here; ours has no excuse
            if provider.package == "grpo-fast":
                raise
            raise Gap(f"fails: {said(error)}") from error
    except Gap as gap:
        return row | {"gap": str(gap)}


def floor_row(truth: Truth) -> dict:
    """The truth itself, rounded as gradients are stored."""
    dtype, exact, confident = truth.batch.hidden.dtype, truth.exact, truth.exact_confident
    row = {"provider": "float64, rounded", "version": None, "computes": "the oracle"}
    row |= dict.fromkeys((*MEASURES, "ratio_is_1", "not_finite", "gap"))
    return row | {
        "dhidden": relative(exact.dhidden.to(dtype), exact.dhidden),
        "dweight": relative(exact.dweight.to(dtype), exact.dweight),
        "confident_dhidden": relative(confident.dhidden.to(dtype), confident.dhidden),
    }


def accuracy_rows(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> list[dict]:
    truth = Truth(shape, dtype, device)
    rows = []
    for provider in PROVIDERS:
        if provider.half_only and dtype == torch.float32:
            continue
        print(f"{provider.name} {dtype_name(dtype)} ...", file=sys.stderr, flush=True)
        rows.append(provider_row(provider, truth))
    common = dict(zip("NDV", shape, strict=True)) | {"dtype": dtype_name(dtype)}
    return [common | row for row in [*rows, floor_row(truth)]]


def accuracy_table(rows: list[dict]) -> list[str]:
    """Rows of one dtype as lines to print, the gaps named below."""
    table = [["provider", "version", "log-prob", "entropy", "dH", "dW", "ratio 1", "confident"]]
    table[0] += ["NaN"]
    words = {None: "-", True: "yes", False: "no"}
    for row in rows:
        number = {name: "-" if row[name] is None else f"{row[name]:.1e}" for name in MEASURES}
        table.append(
            [row["provider"], row["version"] or "-"]
            + [number[name] for name in MEASURES[:4]]
            + [words[row["ratio_is_1"]], number["confident_dhidden"], words[row["not_finite"]]]
        )
    return align(table) + [f"{row['provider']}: {row['gap']}" for row in rows if row["gap"]]


def parser() -> Parser:
    parsed = Parser("grpo-fast bench --accuracy", __doc__)
    parsed.add_shape(SHAPE)
    parsed.add_argument(
        "--dtype", choices=DTYPES, action="append", help="of the inputs; may be given again"
    )
    parsed.add_place()
    return parsed


def main(argv: list[str]) -> int:
    """Exit code 0, 2 for a wrong option. What is missing or wrong is in the table, not in the
    code."""
    command = parser()
    options = command.parse_args(argv)
    shape, device = command.shape(options.shape, SEQUENCES), command.device(options.device)
    if device.type == "cpu":
        # Before a kernel is defined; its interpreter evaluates both sides of every tl.where.
        os.environ["TRITON_INTERPRET"] = "1"
        warnings.filterwarnings("ignore", r".*encountered in", RuntimeWarning, r"triton\.runtime")
    facts = about(device, "--accuracy", argv)
    print(f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}")
    rows = []
    for name in options.dtype or DTYPES:
        rows += (fresh := accuracy_rows(shape, DTYPES[name], device))
        sizes = " ".join(f"{letter}={size}" for letter, size in zip("NDV", shape, strict=True))
        print(f"\n{sizes} {name}, against float64")
        print("\n".join(accuracy_table(fresh)))
    written(options.json, "accuracy", facts, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
