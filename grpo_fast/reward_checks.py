"""The doctor's rules about rewards, groups and completions.

Each is a function of the run so far and the limits: what it sees now, or None.
"""

import bisect
import math
import statistics

from .history import (
    SEVERITIES,
    SLOW_LEAST,
    WINDOW,
    History,
    Limits,
    Seen,
    held_out_rose,
    level,
    reward_flat,
    slow,
    solved,
)


def all_equal(p: float, group_size: int) -> float:
    """`p**G + (1 - p)**G`: the probability that all completions of a group succeed, or all fail."""
    return p**group_size + (1 - p) ** group_size


def needed_group(p: float, bound: float) -> int | None:
    """The smallest G that brings `all_equal` to `bound`; None above 1024."""
    return next((g for g in range(2, 1025) if all_equal(p, g) <= bound), None)


def no_signal(run: History, limits: Limits) -> Seen | None:
    own = limits["R1"]
    dead, p = run.mean("frac_reward_zero_std", WINDOW), run.mean("reward", WINDOW)
    severity = level(dead, own)
    if not severity or (run.identical and not told_apart(run)) or small_group(run, limits):
        return None
    evidence = f"{dead:.0%} of the groups of the last {WINDOW} rows bought no gradient"
    prompts, size = run.options.get("prompts_per_step"), run.options.get("group_size")
    if isinstance(prompts, int):
        evidence += f": {dead * prompts:.0f} of {prompts} a step"
    evidence += f"; mean reward {p:.2f}"
    if isinstance(size, int) and 0 < p < 1:
        evidence += (
            f"; at one success rate for all prompts it would be {all_equal(p, size):.0%}, with "
            f"group_size {2 * size} {all_equal(p, 2 * size):.0%}"
        )
    if own["easy"] <= p <= 1:
        cause, change = "the prompts are too easy now", "add harder prompts, or stop here"
        # A run that got there by itself has done its work.
        severity = "info" if solved(run, limits) else severity
    elif 0 <= p <= own["hard"]:
        cause, change = "the prompts are too hard", "add easier prompts, or start from a better one"
    else:
        cause = "some prompts are always solved and others never"
        change = "leave out prompts whose groups are all right or all wrong"
    return Seen(severity, evidence, cause, change)


def small_group(run: History, limits: Limits) -> Seen | None:
    own, size = limits["R2"], run.options.get("group_size")
    if not isinstance(size, int) or size >= own["least"]:
        return None
    p, dead = run.mean("reward", WINDOW), run.mean("frac_reward_zero_std", WINDOW)
    evidence, change = f"group_size {size}", f"at least {own['least']:.0f}"
    if 0 < p < 1:
        expected, needed = all_equal(p, size), needed_group(p, own["bound"])
        evidence += (
            f": at success rate p = {p:.2f}, p^G + (1-p)^G = {expected:.0%} of the groups are "
            "all right or all wrong"
        )
        if needed:
            change = f"{max(needed, 4)}: from there on it is at most {own['bound']:.0%}"
    if dead == dead:
        evidence += f"; measured {dead:.0%}"
    if size <= 2:
        return Seen("warning", f"{evidence}; with 2 an advantage is +-0.71 at any gap", "", change)
    # Far more dead groups than chance makes come from the prompts, and no group size mends them.
    if run.identical or not (0 < p < 1 and own["dead"] < dead <= expected + own["excess"]):
        return None
    return Seen("error" if dead > own["error"] else "warning", evidence, "", change)


def truncation(run: History, limits: Limits) -> Seen | None:
    cut = run.mean("completions/clipped_ratio", WINDOW)
    severity = level(cut, limits["R9"])
    if not severity:
        return None
    cap = run.options.get("max_completion_length")
    evidence = f"{cut:.0%} of the completions were cut off" + (f" at {cap} tokens" if cap else "")
    if cut > 0.999:
        evidence += ": every reward measures the cap"
    return Seen(severity, evidence)


def length_drift(run: History, limits: Limits) -> Seen | None:
    own, name = limits["R10"], "completions/mean_length"
    now, start = run.mean(name, 5), run.start(name)
    if now < own["collapse"] * start and reward_flat(
        run, limits, min(SLOW_LEAST, len(run.series[name]))
    ):
        return Seen(
            "warning",
            f"mean length {start:.0f} -> {now:.0f} tokens, reward not rising",
            "ending at once is the safest answer under this reward",
            "make it pay for the answer, not for the end",
        )
    seen = [s for s in (end_pushed_down(run, limits), paid_for_length(run, limits)) if s]
    return max(seen, key=lambda s: SEVERITIES.index(s.severity), default=None)


def end_pushed_down(run: History, limits: Limits) -> Seen | None:
    """Every step makes the end of a completion less likely, and they do get longer."""
    own, rows = limits["R10"], int(limits["R10"]["push_rows"])
    pushes = run.series.get("push/eos")
    if "push/eos" not in run.here or len(pushes) < rows or max(pushes.values[-rows:]) >= 0:
        return None
    lengths = run.series["completions/mean_length"]
    before = lengths.around(pushes.steps[-rows], 3)
    now = run.mean("completions/mean_length", 3, least=1)
    if not now > own["push_growth"] * before:
        return None
    gained = run.mean("reward", WINDOW) - run.start("reward")
    paid = gained > 0 or held_out_rose(run, limits, SLOW_LEAST)
    return Seen(
        "info" if paid else "warning",
        f"net push on the end-of-sequence token below 0 in the last {rows} rows (mean "
        f"{run.mean('push/eos', rows):.2g}), mean length {before:.0f} -> {now:.0f} tokens, reward "
        f"{gained:+.3f} since the start",
        "longer completions have the higher advantage, or a loss divided by length spares the "
        "long wrong ones",
        "sum tokens by dr_grpo or dapo, which do not divide by a completion's own length",
        "loss.loss_type",
    )


def paid_for_length(run: History, limits: Limits) -> Seen | None:
    own, name = limits["R10"], "completions/mean_length"
    trend, now = run.trend(name, slow(run, name)), run.mean(name, 5)
    if trend is None or not now > own["growth"] * trend.first:
        return None
    together = with_length(run, "reward")
    if not together >= own["correlation"]:
        return None
    said = (
        f"mean length {trend.first:.0f} -> {now:.0f} tokens, correlation with reward {together:.2f}"
    )
    payer = max(run.parts, key=lambda p: with_length(run, f"rewards/{p}/mean"), default="")
    names = [f"eval_rewards/{part}/mean" for part in run.parts if part != payer]
    if not any(name in run.series for name in names):
        names, payer = ["eval_reward"], ""
    evals = [run.series[name] for name in names if name in run.series]
    if not evals or min(map(len, evals)) < 2:
        return Seen("info", f"{said}; no held-out reward to tell use from padding")
    gain = max(e.values[-1] - min(e.values[-4:-1]) for e in evals)
    if gain > own["eval_gain"]:
        return None
    rest = f" beside '{payer}'" if payer else ""
    cause = f"reward '{payer}' pays for length" if payer else ""
    return Seen("warning", f"{said}; held-out reward{rest} gained {gain:+.3f}", cause)


def with_length(run: History, name: str) -> float:
    """Correlation of a metric with the mean length, over a slow trend's window; -1 where there is
    none."""
    lengths = run.series["completions/mean_length"].values
    values = run.series[name].values if name in run.series else []
    count = min(slow(run, "completions/mean_length"), 100, len(values), len(lengths))
    if count < WINDOW:
        return -1.0
    pair = lengths[-count:], values[-count:]
    return -1.0 if any(min(v) == max(v) for v in pair) else statistics.correlation(*pair)


def reward_hacking(run: History, limits: Limits) -> Seen | None:
    return left_behind(run, limits) or one_part_eats(run, limits) or unseen(run, limits)


def left_behind(run: History, limits: Limits) -> Seen | None:
    """The training reward rises and the held-out one does not; sooner told where all winners of a
    group come to say the same."""
    own, evals = limits["R11"], run.series.get("eval_reward")
    if "eval_reward" not in run.row or len(evals) < 3:
        return None
    alike = winners_alike(run, limits)
    # What two signs say needs half as much of each.
    wanted = {name: own[name] / (2 if alike else 1) for name in ("warning", "error")}
    train, now = run.series["reward"], run.mean("reward", 5)
    # Both of the last two, because one evaluation of few prompts is noise.
    best = max(evals.values[-2:])
    for step, value in zip(evals.steps[-8:-2], evals.values[-8:-2], strict=True):
        rise = now - train.around(step, 5)
        gap = rise - (best - value)
        severity = level(min(rise, gap), wanted)
        if severity and best - value <= own["eval_gain"] and best < own["ceiling"]:
            return Seen(
                severity,
                f"since step {step} the training reward rose {rise:+.2f}, the held-out one "
                f"{best - value:+.2f}: a gap of {gap:.2f}{'; ' * bool(alike)}{alike}",
            )
    return None


def winners_alike(run: History, limits: Limits) -> str:
    """How the winners of a group came to be near-duplicates; empty where they did not."""
    own, name = limits["R11"], "groups/winners_alike"
    if name not in run.series:
        return ""
    now, start = run.mean(name, WINDOW), run.start(name)
    if not (now > own["alike"] and now - start > own["alike_rise"]):
        return ""
    return f"winners of a group share {now:.0%} of their word pairs, {start:.0%} at first"


def one_part_eats(run: History, limits: Limits) -> Seen | None:
    """One reward part rises while another falls."""
    own = limits["R11"]
    trends = {p: run.trend(f"rewards/{p}/mean", SLOW_LEAST) for p in run.parts}
    up = {p: t for p, t in trends.items() if t and t.change > own["warning"] and t.rises}
    down = {p: t for p, t in trends.items() if t and -t.change > own["fall"] and t.falls}
    if not up or not down:
        return None
    gamed, hurt = (max(found, key=lambda p: abs(found[p].change)) for found in (up, down))
    return Seen(
        "warning",
        f"reward '{gamed}' went {up[gamed].first:.2f} -> {up[gamed].last:.2f} while '{hurt}' went "
        f"{down[hurt].first:.2f} -> {down[hurt].last:.2f}",
        f"'{gamed}' is cheaper to get and is being gamed at the cost of '{hurt}'",
        "weigh the gamed part down, or pay it only together with the other",
        "reward_weights",
    )


def unseen(run: History, limits: Limits) -> Seen | None:
    """What may be hacking, where no second number says whether it is."""
    alike = winners_alike(run, limits)
    if alike and "eval_reward" not in run.series:
        return Seen(
            "info",
            f"{alike}; no held-out reward to tell learning from copying",
            "the policy repeats what was paid once",
            "hold prompts out",
            "eval_prompts",
        )
    part, share = main_part(run)
    if not share > limits["R11"]["share"]:
        return None
    return Seen(
        "info",
        f"reward '{part}' makes {share:.0%} of the variance of the rewards",
        f"what is learned is '{part}'; the other parts hardly count",
        "weigh it down where that is not meant",
        "reward_weights",
    )


def main_part(run: History) -> tuple[str, float]:
    """The reward part of the highest `weight**2 x variance`, and its share of all parts'."""
    names = {part: f"rewards/{part}/std" for part in run.parts}
    known = all(run.mean(name, WINDOW, least=WINDOW) >= 0 for name in names.values())
    if len(names) < 2 or not known:
        return "", math.nan
    weights = run.options.get("reward_weights") or [1.0] * len(names)
    if len(weights) != len(names):
        return "", math.nan
    sizes = {
        part: (weight * run.mean(name, WINDOW)) ** 2
        for (part, name), weight in zip(names.items(), weights, strict=True)
    }
    part, total = max(sizes, key=sizes.__getitem__), sum(sizes.values())
    return part, sizes[part] / total if total else math.nan


def hidden_variance(run: History, limits: Limits) -> Seen | None:
    own, scale = limits["R12"], run.options.get("scale_rewards", "group")
    if scale in ("none", False) or run.identical:
        return None
    dead = run.mean("frac_reward_zero_std", 5)
    if "groups/std_median" in run.series:
        raw = run.mean("groups/std_median", 5)
    else:
        # TRL's reward_std is the mean over groups already.
        name = "groups/std_mean" if "groups/std_mean" in run.row else "reward_std"
        raw = run.mean(name, 5) / max(1 - dead, 1e-6)
    size = run.mean("advantage/abs_mean", 5) if "advantage/abs_mean" in run.row else 1.0
    # Dead groups have advantage 0 and would hide what is done to the others.
    size /= max(1 - dead, 1e-6)
    if not (raw > 0 and size > own["advantage"]):
        return None
    times = 1 / (raw + own["eps"])
    severity = level(times, {name: own[name] for name in ("warning", "error")})
    if not severity:
        return None
    return Seen(
        severity,
        f"rewards inside a group differ by a std of {raw:.2g}, and dividing by it makes advantages "
        f"of {size:.2g}: amplified {times:,.0f} times, limit {own[severity]:g}",
    )


def reward_plumbing(run: History, limits: Limits) -> Seen | None:
    own, rewards = limits["R14"], run.series["reward"]
    if run.identical >= own["rows"] and rewards:
        value, same = run.value("reward"), run.identical
        earlier = max(len(rewards) - same, 0)
        before = rewards.mean(max(earlier - WINDOW, 0), earlier) if earlier else 0.0
        # Where the run climbed there by itself, it is R1's: nothing left to learn.
        climbed = value > 0 and before >= limits["R1"]["easy"] * value
        if not climbed and not told_apart(run):
            return Seen(
                "error",
                f"all rewards were {value:g} in each of the last {same} rows: every advantage is 0",
            )
    lost = run.mean("unscored_frac", WINDOW)
    severity = level(lost, {name: own[name] for name in ("warning", "error")})
    if severity:
        return Seen(
            severity,
            f"{lost:.1%} of the completions got no reward",
            "the reward function returned None for them, or gave up",
            "see which completions have no reward, and return 0 where they are wrong",
        )
    if len(run.parts) < 2:
        return None
    return part_lost(run, limits) or part_constant(run, limits)


def told_apart(run: History) -> bool:
    """The function that gave all completions of the last rows the same reward gave a held-out one
    another: it works, and the prompts are too easy or too hard."""
    rewards, evals = run.series["reward"], run.series.get("eval_reward")
    if evals is None:
        return False
    # The evaluation before the first step is of the same function, unless it changed since.
    first = run.identical < len(rewards)
    start = bisect.bisect_left(evals.steps, rewards.steps[-run.identical]) if first else 0
    others = evals.values[start:]
    value = run.value("reward")
    return bool(others) and max(max(others) - value, value - min(others)) > 1e-6


def part_lost(run: History, limits: Limits) -> Seen | None:
    """A part that says None more often than it did: a constant share may be meant, as of a function
    for some of the prompts."""
    own = limits["R14"]
    for part in run.parts:
        name = f"rewards/{part}/unscored_frac"
        if name not in run.here:
            continue
        now, start = run.mean(name, WINDOW), run.start(name)
        severity = level(now - start, {name: own[name] for name in ("warning", "error")})
        if severity:
            return Seen(
                severity,
                f"reward '{part}' said None of {now:.1%} of the completions, {start:.1%} at first",
                f"'{part}' gives up more and more: time-outs, or a service that fails",
                "look at what it says None of, and raise its time limit or mend its service",
            )
    return None


def part_constant(run: History, limits: Limits) -> Seen | None:
    if len(run.series["reward"]) < limits["R14"]["constant"] or run.identical:
        return None
    for part in run.parts:
        spreads = run.series.get(f"rewards/{part}/std")
        # One that varied once and is now always earned has been learned.
        if spreads is not None and spreads.mean(0, len(spreads)) == 0:
            return Seen(
                "warning",
                f"reward '{part}' was {run.value(f'rewards/{part}/mean'):g} for every completion "
                f"of {len(spreads)} rows",
                f"'{part}' tells no completion from another",
                "check its function and its columns, or leave it out",
            )
    return None
