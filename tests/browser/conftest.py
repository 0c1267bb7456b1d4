"""Pages are driven in Chromium; without it, or Playwright, these tests are deselected with a count.

Steps of a token log are made here from random log-probs, with what the loss would have stored.
"""

import dataclasses
import importlib.util
import json
import math
import shutil
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from grpo_fast.loss_config import LossConfig
from grpo_fast.records import open_records
from grpo_fast.reference_advantage import group_advantage
from grpo_fast.reference_loss import (
    Tokens,
    kl_divergence,
    objective_of,
    policy_factor,
    token_weights,
)
from grpo_fast.report import report_page

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
EOS = 1
CONFIG = LossConfig(loss_type="dapo", epsilon_high=0.28, beta=0.04)
LONGEST = 64
EVIL = "<script>window.stolen = 1</script><img src=x onerror=stolen=1>\u202eltr\u2028\u0007\ud800"
WORDS = ("<pad>", "<eos>", "\n", " ", " the", " answer", " is", "4", "2", " 17", "\t", EVIL, " no")


def pytest_collection_modifyitems(config, items):
    if CHROMIUM and importlib.util.find_spec("playwright"):
        return
    gone = [item for item in items if item.get_closest_marker("browser")]
    items[:] = [item for item in items if not item.get_closest_marker("browser")]
    if gone:
        config.hook.pytest_deselected(items=gone)


class TokenStep(NamedTuple):
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]


@dataclasses.dataclass
class TokenLog:
    """A token log in memory."""

    kept: dict[int, TokenStep]
    words: Sequence[str] = WORDS

    def steps(self) -> list[int]:
        return sorted(self.kept)

    def read(self, step: int) -> TokenStep:
        return self.kept[step]

    def vocabulary(self) -> dict[int, str]:
        return dict(enumerate(self.words))


def totals_of(meta: dict, config: LossConfig, lengths: Sequence[int]) -> float:
    """The step's denominator without dropped completions of these lengths."""
    totals, kind = meta["totals"], config.adds_up
    if kind == "token_mean":
        return totals["tokens"] - sum(lengths)
    if kind == "prompt_mean":
        return totals["groups"]
    sequences = totals["sequences"] - len(lengths)
    return sequences * (totals["max_completion_length"] if kind == "constant" else 1)


def oracle(
    step: TokenStep,
    group: dict,
    config: LossConfig,
    advantages: Sequence[float] | None = None,
    dropped: Sequence[int] = (),
) -> dict[str, Any]:
    """The group's part of the loss by `reference_loss` and autograd, in float64."""
    completions = [c for place, c in enumerate(group["completions"]) if place not in dropped]
    if advantages is None:
        advantages = [c["advantage"] for c in group["completions"]]
    advantages = [a for place, a in enumerate(advantages) if place not in dropped]
    index = np.concatenate([np.arange(c["start"], c["stop"]) for c in completions])
    spans = torch.tensor([c["stop"] - c["start"] for c in completions])
    arrays = step.arrays
    mask = torch.tensor(arrays["mask"][index] > 0)

    def row(name: str) -> torch.Tensor | None:
        if name not in arrays:
            return None
        return torch.where(mask, torch.tensor(arrays[name][index]).double().nan_to_num(-1.0), 0.0)

    sampler = row("sampler_logprobs")
    if sampler is not None:
        sampler = torch.where(mask, torch.tensor(arrays["sampler_logprobs"][index]).double(), 0.0)
    logp = row("logprobs").requires_grad_()
    old = row("old_logprobs")
    ends = torch.cat([torch.zeros(1, dtype=torch.long), spans.cumsum(0)])
    tokens = Tokens(
        logprobs=logp,
        old_logprobs=logp.detach() if old is None else old,
        ref_logprobs=row("ref_logprobs"),
        sampler_logprobs=sampler,
        advantages=torch.tensor(advantages, dtype=torch.float64).repeat_interleave(spans),
        mask=mask,
        entropy=torch.zeros(len(index), dtype=torch.float64),
        cu_seqlens=ends,
        level=config.level,
        log_ratio_clamp=config.log_ratio_clamp,
    )
    lengths = [
        int(arrays["mask"][c["start"] : c["stop"]].sum())
        for place, c in enumerate(group["completions"])
        if place in dropped
    ]
    denominator = totals_of(step.meta, config, lengths)
    one_group = torch.zeros(len(completions), dtype=torch.long)
    weights = token_weights(mask, ends, config, denominator, one_group)
    # The quantile is one of the whole step, whose outcome is stored.
    local = dataclasses.replace(config, top_entropy_quantile=1.0)
    term = policy_factor(tokens, local) * objective_of(config)(tokens)
    if "keep" in arrays:
        term = term * torch.tensor(arrays["keep"][index])
    kl = None
    if tokens.ref_logprobs is not None:
        limit = config.log_ratio_clamp
        kl = kl_divergence(logp, tokens.ref_logprobs, estimator=config.kl_estimator, limit=limit)
        kl = kl * tokens.ratio if config.use_bias_correction_kl else kl
        term = term + config.beta * kl if config.beta else term
    loss = (torch.where(mask, weights * term, 0.0)).sum()
    (slope,) = torch.autograd.grad(loss, logp)
    known = mask & ~torch.tensor(np.isnan(arrays["logprobs"][index]))
    return {
        "loss": loss.item(),
        "mass": slope.abs().sum().item(),
        "gaining": slope.abs()[tokens.advantages > 0].sum().item(),
        "slope": slope,
        "ratio": tokens.ratio.detach(),
        "kl": None if kl is None else kl.detach(),
        "advantages": tokens.advantages,
        "known": known,
    }


def make_step(
    config: LossConfig,
    *,
    step: int = 1,
    groups: int = 3,
    size: int = 5,
    length: int = 12,
    on_policy: bool = False,
    ref: bool = True,
    sampler: bool = True,
    scale: str = "group",
    baseline: str = "mean",
    rewards: Sequence[float] | None = None,
    seed: int = 0,
    words: int = len(WORDS),
    keep: bool = False,
) -> TokenStep:
    """A step of which every group is stored, its last token masked in every second completion."""
    random = np.random.default_rng(seed + 1000 * step)
    described, ids, at = [], [], 0
    for number in range(groups):
        scores = list(rewards or random.choice([0.0, 0.5, 1.0], size)) if number else [1.0] * size
        advantages = group_advantage(
            torch.tensor(scores, dtype=torch.float64),
            torch.zeros(size, dtype=torch.long),
            scale=scale,
            baseline=baseline,
        ).advantages
        completions = []
        shared = random.integers(2, words, length)
        for index in range(size):
            n = length - int(random.integers(0, length // 2))
            own = np.where(
                np.arange(n) < random.integers(0, n), shared[:n], random.integers(2, words, n)
            )
            own[-1] = EOS if index % 3 else own[-1]
            ids.append(own)
            completions.append(
                {
                    "index": index,
                    "reward": scores[index],
                    "rewards": {"exact": scores[index], "short": 0.25},
                    "advantage": float(np.float32(advantages[index])),
                    "finish_reason": "stop" if index % 3 else "length",
                    "text": "",
                    "start": at,
                    "stop": at + n,
                }
            )
            at += n
        described.append(
            {
                "index": number * 7,
                "row": number + 100,
                "prompt": f"What is {number} + 4?\n{EVIL}",
                "prompt_ids": [4, 5],
                "chosen_by": ["degenerate"] if number == 0 else ["best", "highest_kl"],
                "size": size,
                "rewards": scores,
                "advantages": [c["advantage"] for c in completions],
                "completions": completions,
            }
        )
    meta = {
        "schema": 1,
        "step": step,
        "iteration": 0,
        "loss": {f.name: getattr(config, f.name) for f in dataclasses.fields(config)},
        "temperature": 1.0,
        "eos_token_id": EOS,
        "advantage": {"scale_rewards": scale, "baseline": baseline},
        "totals": {
            "groups": 64,
            "completions": 64 * size,
            "sequences": 64 * size,
            "tokens": 40312,
            "max_completion_length": LONGEST,
        },
        "denominator": None,
        "push": {"up": [[7, 3.25], [EOS, 0.5]], "down": [[11, -2.5], [4, -0.25]], "eos": 0.5},
        "kept": f"{groups} of 64 groups: best, worst, degenerate",
        "groups": described,
    }
    arrays = numbers(
        np.concatenate(ids), random, on_policy=on_policy, ref=ref, sampler=sampler, keep=keep
    )
    for one in (c for group in described for c in group["completions"][::2]):
        arrays["mask"][one["stop"] - 1] = 0
        arrays["logprobs"][one["stop"] - 1] = 0
    return by_the_kernel(TokenStep(meta, arrays), config)


def numbers(ids: np.ndarray, random: Any, **have: bool) -> dict[str, np.ndarray]:
    def noise(size: float) -> np.ndarray:
        return random.normal(0, size, len(ids))

    def least(x: np.ndarray) -> np.ndarray:
        return np.minimum(x, -1e-4).astype(np.float32)

    logp = -np.abs(noise(1.5))
    found = {"token_ids": ids.astype(np.int32), "logprobs": logp.astype(np.float32)}
    found["entropy"] = np.abs(noise(1.0)).astype(np.float16)
    found["mask"] = np.ones(len(ids), np.uint8)
    if not have["on_policy"]:
        found["old_logprobs"] = least(logp + noise(0.3))
    if have["keep"]:
        found["keep"] = (random.random(len(ids)) < 0.4).astype(np.uint8)
    if have["ref"]:
        found["ref_logprobs"] = least(logp + noise(0.2))
    if have["sampler"]:
        sampler = least(logp + noise(0.1))
        sampler[3] = math.nan
        found["sampler_logprobs"] = sampler
    return found


def by_the_kernel(step: TokenStep, config: LossConfig) -> TokenStep:
    """The step with ratio, KL and gradient mass as the loss makes them; a group that teaches
    nothing was not forwarded."""
    arrays, count = step.arrays, len(step.arrays["token_ids"])
    arrays |= {"ratio": np.ones(count, np.float32), "gradient_mass": np.zeros(count, np.float32)}
    if "ref_logprobs" in arrays:
        arrays["kl"] = np.zeros(count, np.float32)
    for group in step.meta["groups"]:
        span = slice(group["completions"][0]["start"], group["completions"][-1]["stop"])
        told = oracle(step, group, config)
        arrays["ratio"][span] = told["ratio"]
        arrays["gradient_mass"][span] = 0.7 * told["slope"].abs()
        if told["kl"] is not None:
            arrays["kl"][span] = told["kl"]
        if not config.beta and not any(group["advantages"]):
            for name in ("logprobs", "ratio", "gradient_mass", "kl", "entropy"):
                if name in arrays:
                    arrays[name][span] = math.nan
    return step


def write_run(folder, rows: Sequence[dict] | None = None) -> Any:
    folder.mkdir()
    rows = rows or [{"step": k, "reward": k / 10, "kl": 0.01 * k} for k in range(1, 11)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_page(folder, tokens: TokenLog | None = None) -> Any:
    path = folder / "report.html"
    page = report_page(open_records(folder)._replace(tokens=tokens))
    path.write_bytes(page.encode("utf-8"))
    return path


@pytest.fixture(scope="session")
def make():
    """make.step, log, oracle, run, page and config: nobody imports a conftest."""
    return types.SimpleNamespace(
        step=make_step, log=TokenLog, oracle=oracle, run=write_run, page=write_page, config=CONFIG
    )


@pytest.fixture(scope="module")
def browser():
    """For one file: as long as it is there its event loop runs, and no test has one of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visit(NamedTuple):
    """An open page, what its console said, and what it asked for beside its own file."""

    page: Any
    said: list[str]
    asked: list[str]


@pytest.fixture
def visit(browser):
    """`visit(path, fragment="", **context)` -> Visit; afterwards nothing may have gone wrong."""
    visits: list[Visit] = []

    def go(path, fragment: str = "", **options: Any) -> Visit:
        context = browser.new_context(
            viewport={"width": 1280, "height": 900} | options.pop("viewport", {}), **options
        )
        page = context.new_page()
        opened = Visit(page, [], [])
        page.on("console", lambda message: opened.said.append(message.text))
        page.on("pageerror", lambda error: opened.said.append(str(error)))
        page.on("request", lambda request: opened.asked.append(request.url))
        page.goto(f"{path.as_uri()}{fragment}")
        if page.locator("#xray-data").count():
            page.locator("#xray[data-ready]").wait_for()
        visits.append(opened)
        return opened

    yield go
    for opened in visits:
        opened.page.context.close()
        assert not opened.said
        assert {url.partition("#")[0] for url in opened.asked if not url.startswith("blob:")} == {
            opened.asked[0].partition("#")[0]
        }


@pytest.fixture(scope="module")
def report(make, tmp_path_factory):
    """(a page of three kept steps, the steps)."""
    steps = {step: make.step(make.config, step=step) for step in (1, 5, 10)}
    folder = make.run(tmp_path_factory.mktemp("runs") / "demo")
    return make.page(folder, make.log(steps)), steps
