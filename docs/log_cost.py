"""What the log of tokens costs: `python docs/log_cost.py`, one thread, about two minutes.

The update of a step (forward, backward, optimizer; no sampling, no rewards) and the log of that
step take turns; medians of processor time, which other programs of the machine do not change.
`here` is the log's share in the thread that trains, `all` with deflating and writing, which another
thread does meanwhile; `not kept` is a step beyond the budget's share, of which metrics are made.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import torch

from grpo_fast import LossConfig
from grpo_fast.config import TrainConfig
from grpo_fast.optimizer import make_optimizer
from grpo_fast.rollout import Completion, ScoredGroup, training_groups
from grpo_fast.step import group_logprobs, grpo_backward
from grpo_fast.tiny import tiny_model
from grpo_fast.token_log import TokenLog
from grpo_fast.token_step import Told, log_tokens

LOSS = LossConfig(beta=0.001)
TOLD = Told(seed=0, eos_token_ids=(1,), advantage={}, text_of=str)
WIDE = {"hidden_size": 128, "num_hidden_layers": 4, "head_dim": 32, "intermediate_size": 256}
DEMO = {"hidden_size": 192, "head_dim": 48, "intermediate_size": 512}
# (name, what of the tiny model is changed, prompts, completions of each, their tokens,
# updates of a step, rounds)
CASES = (
    ("the demo's, 0.8M parameters", DEMO, 32, 16, 4, 2, 9),
    ("25k parameters, a tiny step", {}, 32, 16, 4, 1, 9),
    ("25k parameters", {}, 64, 16, 128, 1, 5),
    ("4 layers x 128", WIDE, 16, 16, 128, 1, 5),
)


class Spent(NamedTuple):
    wall: float
    thread: float
    process: float


def spent(run: Callable[[], object]) -> Spent:
    """Milliseconds."""
    clocks = (time.perf_counter, time.thread_time, time.process_time)
    before = [clock() for clock in clocks]
    run()
    return Spent(*((clock() - b) * 1e3 for clock, b in zip(clocks, before, strict=True)))


def scored_groups(prompts: int, size: int, length: int) -> list[ScoredGroup]:
    """Random tokens and rewards, a group in seven without a spread."""
    source = torch.Generator().manual_seed(0)
    made = []
    for row in range(prompts):
        rewards = torch.randint(2, (size,), generator=source).float() * (row % 7 != 3)
        advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()
        completions = []
        for reward, advantage in zip(rewards.tolist(), advantages, strict=True):
            ids = torch.randint(3, 50, (length,), generator=source).tolist()
            given = {"reward": reward, "rewards": {"right": reward}, "advantage": advantage}
            completions.append(Completion(ids, [-3.9] * length, "x" * length, "length", **given))
        prompt = SimpleNamespace(row=row, text="12+34=", token_ids=tuple(range(20, 26)))
        made.append(ScoredGroup(prompt, completions, degenerate=not any(advantages)))
    return made


def measure(
    changes: dict, prompts: int, size: int, length: int, updates: int, rounds: int
) -> list[str]:
    """The row of a case, without its name."""
    torch.manual_seed(0)
    model = tiny_model(**changes).eval()
    config = TrainConfig(model="-", dataset="-", reward=("-",), output_dir="-")
    optimizer = make_optimizer(model.parameters(), config)
    scored = scored_groups(prompts, size, length)
    groups = training_groups(scored, config)
    own = group_logprobs(model, groups)
    parts = [own[g * size : (g + 1) * size] for g in range(prompts)]
    pairs = zip(groups, parts, strict=True)
    # Every column that a step can have.
    groups = [replace(group, old_logprobs=part, ref_logprobs=part) for group, part in pairs]
    outputs = []

    def update() -> None:
        for _ in range(updates):
            optimizer.zero_grad(set_to_none=True)
            outputs[:] = [grpo_backward(model, groups, loss=LOSS)]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    def logged(log: TokenLog | None, step: int) -> None:
        log_tokens(log, TOLD, scored, groups, outputs[0], LOSS, step=step, iteration=0)

    with tempfile.TemporaryDirectory() as folder:
        whole = TokenLog(folder, budget_mb=1e6, max_steps=10**6, background=True)
        update()
        logged(whole, 1)
        found = []
        for step in range(2, rounds + 2):
            off = spent(update)
            whole.flush()
            kept = spent(lambda step=step: logged(whole, step))
            waited = spent(whole.flush)
            assert whole.steps == step
            found.append((off, kept, waited, spent(lambda step=step: logged(None, step))))
        whole.close()
    own_share = [100 * kept.thread / off.process for off, kept, _, _ in found]
    share = [100 * (k.process + w.process) / off.process for off, k, w, _ in found]
    beyond = [100 * less.process / off.process for off, _, _, less in found]
    columns = (
        [off.process for off, *_ in found],
        [kept.thread for _, kept, *_ in found],
        [kept.process + waited.process for _, kept, waited, _ in found],
        [less.process for *_, less in found],
    )
    times = [f"{statistics.median(column):,.1f}" for column in columns]
    shares = [f"{statistics.median(values):.2f} %" for values in (own_share, share, beyond)]
    return [f"{prompts * size * length:,}", *times, *shares]


def print_row(*cells: str) -> None:
    print("|", " | ".join(cells), "|", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    names = ("update", "log here", "log all", "not kept", "here", "all", "not kept")
    times, shares = (f"{name} ms" for name in names[:4]), (f"{name} / update" for name in names[4:])
    print_row("model", "tokens", *times, *shares)
    print_row(*["---"] * 9)
    for name, *case in CASES:
        print_row(name, *measure(*case))


if __name__ == "__main__":
    main()
