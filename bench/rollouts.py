"""`grpo-fast bench --rollout`: sampling the completions of one group, beside transformers' own.

One prompt of P tokens, G completions of exactly C tokens, a random model. Each provider works in a
process of its own and they take turns. The greedy tokens of a first short call must be those with
the largest float64 logits, up to the rounding of the dtype; who is wrong has no number.

  tokens/s    completion tokens over the median time, prompt included
  x HF        times as many as transformers' generate
  of roof     the time that reading weights and cache takes at this machine's measured bandwidth,
              over the time it took: a decoding step reads all of both once
  extra       most memory at once beyond the weights"""

import statistics
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from grpo_fast.generate import generate
from grpo_fast.memory import Meter
from grpo_fast.model_shapes import MODELS

from . import isolated
from .compare import rounds_of
from .isolated import Call, Worker
from .options import Parser
from .provider import DTYPES, Gap, Provider
from .record import about, written
from .steps import StepMatch
from .timing import align, copy_ceiling, dtype_name, interleaved, one_thread, seconds_text, summary

SHAPE = (256, 32, 16)
BASE, OURS = "HF generate", "grpo-fast"
# Of the call that is checked: enough to have decoded with the cache a few times.
CHECKED = (16, 8, 2)
# Logits of order 1: what a dtype's rounding may put first.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
COPIED_BYTES = 2**28
END, PADDING = 1, 0


class Asked(NamedTuple):
    """One call."""

    prompt: list[int]
    count: int
    length: int
    greedy: bool


def ours():
    def sample(model, asked: Asked) -> list[list[int]]:
        (group,) = generate(
            model,
            [asked.prompt],
            group_size=asked.count,
            max_new_tokens=asked.length,
            temperature=0.0 if asked.greedy else 1.0,
        )
        return [sample.token_ids for sample in group]

    return sample


def transformers_generate():
    def sample(model, asked: Asked) -> list[list[int]]:
        ids = torch.tensor([asked.prompt] * asked.count, device=model.device)
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=not asked.greedy,
                top_k=0 if not asked.greedy else None,
                min_new_tokens=asked.length,
                max_new_tokens=asked.length,
                pad_token_id=PADDING,
            )
        return made[:, len(asked.prompt) :].tolist()

    return sample


PROVIDERS = (
    Provider(
        name=BASE,
        computes="model.generate: the prompt once a completion, eager decoding",
        load=transformers_generate,
        package="transformers",
    ),
    Provider(
        name=OURS,
        computes="grpo_fast.generate: the prompt once, its cache for the whole group",
        load=ours,
    ),
)


def prompt_of(match: StepMatch, length: int) -> list[int]:
    return list(replace(match, shape=(length, 1, 2)).group().prompt_ids)


class RolloutSeat:
    """One provider in its own process: what it can be asked."""

    def __init__(self, provider: Provider):
        self.sample = provider.calls()

    def open(self, match: StepMatch) -> int:
        """Make the model and check a short greedy call; bytes of one long one. Gap when wrong."""
        self.match, self.model = match, match.network()
        # The end would be a token like any other: everybody is to make C of them.
        self.model.generation_config.eos_token_id = None
        short, length, count = CHECKED
        asked = Asked(prompt_of(match, short), count, length, greedy=True)
        off = self._behind(asked, self.sample(self.model, asked))
        if not off <= TOLERANCE[match.dtype]:
            raise Gap(f"wrong result, not timed: a greedy token is {off:.1e} below the largest")
        meter = Meter(match.device)
        self._run()
        return meter.bytes()

    def _behind(self, asked: Asked, found: list[list[int]]) -> float:
        """How far the chosen tokens lie below the largest float64 logits, at most."""
        exact = self.match.network(torch.float64)
        ids = torch.tensor([asked.prompt + tokens for tokens in found], device=exact.device)
        with torch.inference_mode():
            logits = exact(ids).logits[:, len(asked.prompt) - 1 : -1]
        chosen = logits.gather(2, ids[:, len(asked.prompt) :, None])[..., 0]
        return float((logits.amax(-1) - chosen).max())

    def _run(self) -> None:
        prompt, length, count = self.match.shape
        asked = Asked(prompt_of(self.match, prompt), count, length, greedy=False)
        made = self.sample(self.model, asked)
        assert [len(tokens) for tokens in made] == [length] * count, "not C tokens each"

    def time(self) -> Call:
        """One group."""
        return isolated.measured(self._run, self.match.device)[0]


def decoding_bytes(match: StepMatch) -> int:
    """What decoding must read: layers and head once a step, keys and values of each of the G
    completions as far as they go."""
    model, (prompt, length, count) = MODELS[match.model], match.shape
    weights = model.body + model.hidden * model.vocabulary
    per_token = 2 * model.layers * model.kv_heads * model.head_dim
    tokens = count * (length * prompt + length * (length + 1) // 2)
    return torch.finfo(match.dtype).bits // 8 * (length * weights + per_token * tokens)


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a copy, read and written."""
    copy = copy_ceiling(COPIED_BYTES, device)
    with one_thread():
        times = interleaved({"copy": copy}, device, seconds=0.5)["copy"]
    return COPIED_BYTES / statistics.median(times)


def row(match: StepMatch, provider: Provider, found: Any, times: dict, roof: float) -> dict:
    """One line of a results file; `found` is a text when there is no number."""
    p, c, g = match.shape
    line = {
        "provider": provider.name,
        "version": provider.version,
        "computes": provider.computes,
        **{"P": p, "C": c, "G": g, "model": match.model, "dtype": dtype_name(match.dtype)},
        **dict.fromkeys(("seconds", "spread", "rounds", "tokens_per_second", "over_hf", "of_roof")),
        **dict.fromkeys(("extra_bytes", "error")),
    }
    if isinstance(found, str):
        return line | {"error": found}
    mine, base = times[provider.name], times.get(BASE)
    line |= summary(mine) | {"extra_bytes": found}
    line |= {"tokens_per_second": c * g / line["seconds"], "of_roof": roof / line["seconds"]}
    if base:
        line["over_hf"] = statistics.median(b / m for b, m in zip(base, mine, strict=True))
    return line


def rollout_table(rows: list[dict]) -> list[str]:
    def form(value: float | None, text: str) -> str:
        return "-" if value is None else text.format(value)

    table = [["provider", "version", "time", "spread", "tokens/s", "x HF", "of roof", "extra"]]
    for r in rows:
        extra = None if r["extra_bytes"] is None else r["extra_bytes"] / 2**20
        table.append(
            [
                *(r["provider"], r["version"] or "-", seconds_text(r["seconds"])),
                form(r["spread"], "{:.0%}"),
                form(r["tokens_per_second"], "{:,.0f}"),
                form(r["over_hf"], "{:.2f}"),
                form(r["of_roof"], "{:.2f}"),
                form(extra, "{:,.0f} MiB"),
            ]
        )
    return align(table) + [f"{r['provider']}: {r['error']}" for r in rows if r["error"]]


def measured(match: StepMatch, workers: list[Worker], roof: float, **rounds) -> list[dict]:
    """The rows of one match; `rounds` are `least` and `seconds`."""
    found: dict[str, int | str] = {}
    for worker in workers:
        name = worker.provider.name
        print(f"{match}: {name} ...", file=sys.stderr, flush=True)
        try:
            found[name] = worker.ask("open", match)
        except Gap as gap:
            found[name] = str(gap)
    right = [worker for worker in workers if isinstance(found[worker.provider.name], int)]
    calls, lost = rounds_of(right, label=str(match), **rounds)
    found |= lost
    times = {name: [call.seconds for call in made] for name, made in calls.items()}
    return [row(match, w.provider, found[w.provider.name], times, roof) for w in workers]


def parser() -> Parser:
    epilog = "\n".join(["who is asked:"] + [f"  {p.name:12}  {p.computes}" for p in PROVIDERS])
    parsed = Parser("grpo-fast bench --rollout", __doc__, epilog)
    parsed.add_argument(
        "--shape",
        type=int,
        nargs=3,
        metavar=("P", "C", "G"),
        default=SHAPE,
        help="tokens of the prompt and of a completion, completions (default: 256 32 16)",
    )
    parsed.add_argument("--rounds", type=int, default=3, help="fewest calls each (default: 3)")
    parsed.add_argument("--seconds", type=float, default=10.0, help="for more (default: 10)")
    parsed.add_model()
    parsed.add_place()
    return parsed


def main(argv: list[str]) -> int:
    """Exit code 0; 1 when ours has no number; 2 for a wrong option."""
    command = parser()
    options = command.parse_args(argv)
    device = command.device(options.device)
    if options.rounds < 2 or options.threads < 1 or min(options.shape) < 1:
        command.error("--rounds from 2, --threads and sizes from 1")
    facts = about(device, "--rollout", argv, threads=options.threads)
    if device.type == "cuda" or options.threads > 1:
        facts["clock"] = "wall clock"
    facts["bandwidth"] = bandwidth(device)
    print(f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}")
    match = StepMatch(
        shape=tuple(options.shape),
        model=options.model,
        dtype=DTYPES[options.dtype],
        device=device,
    )
    roof = decoding_bytes(match) / facts["bandwidth"]
    workers = [Worker(provider, options.threads, RolloutSeat) for provider in PROVIDERS]
    try:
        rows = measured(match, workers, roof, least=options.rounds, seconds=options.seconds)
    finally:
        for worker in workers:
            worker.close()
    written(options.json, "rollout", facts, rows)
    print("\n".join(rollout_table(rows)))
    return 1 if any(r["error"] for r in rows if r["provider"] == OURS) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
