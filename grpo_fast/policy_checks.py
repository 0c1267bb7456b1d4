"""The doctor's rules about the policy: KL, clipping, entropy, gradients, and the machine.

Each is a function of the run so far and the limits: what it sees now, or None.
"""

import math
import statistics
from collections.abc import Mapping

from .history import (
    RECENT,
    SLOW_LEAST,
    WINDOW,
    History,
    Limits,
    Seen,
    held_out_rose,
    level,
    measured,
    reward_flat,
    slow,
    solved,
)

GAP = "sampling/sampling_logp_difference/mean"
IS_MEAN = "sampling/importance_sampling_ratio/mean"


def kl_explosion(run: History, limits: Limits) -> Seen | None:
    own, now = limits["R3"], run.value("kl")
    short = run.mean("kl", 3, least=1)
    severity = level(min(now, short), own)
    rate = run.row.get("learning_rate")
    at = f" at learning_rate {rate:.2g}" if isinstance(rate, float) else ""
    if severity:
        return Seen(
            severity,
            f"kl {now:.3g}{at}, mean of the last rows {short:.3g}, limit {own[severity]:g} a token "
            f"(started at {run.start('kl'):.3g})",
        )
    before = run.before("kl", RECENT)
    if not before or now <= own["floor"]:
        return None
    usual = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(value - usual) for value in before)
    # Far above the last rows' highest, so that a steep climb is no jump.
    least = max(own["spike"] * usual, own["floor"], own["spike"] * max(before[-5:]))
    if now > max(least, usual + own["sigma"] * spread):
        times = f"{now / usual:.1f} times the median" if usual > 0 else "from a median of 0"
        return Seen("warning", f"kl jumped to {now:.3g}{at}, {times} ({usual:.3g})")
    return None


def kl_without_reward(run: History, limits: Limits) -> Seen | None:
    seen = _kl_without_reward(run, limits)
    # What lasts for a row or two is the noise of two windows that meet.
    return seen if run.lasts("R4", seen is not None) >= limits["R4"]["rows"] else None


def _kl_without_reward(run: History, limits: Limits) -> Seen | None:
    own = limits["R4"]
    kl = run.trend("kl", slow(run, "reward"))
    if kl is None or not (kl.last > own["ratio"] * kl.first and kl.change > own["rise"]):
        return None
    # What speeds up, or is past R3's limit, is an explosion, whatever the reward does.
    now = run.mean("kl", 3)
    if now > own["speed"] * kl.last or now > limits["R3"]["warning"]:
        return None
    if not kl.rises or solved(run, limits) or held_out_rose(run, limits, slow(run, "reward")):
        return None
    reward = run.trend("reward", slow(run, "reward"))
    if reward is None or reward.change > own["noise"] * reward.noise:
        return None
    # Where prompts differ that much from step to step, a rise would not be seen either.
    if reward.noise > own["blind"] * run.mean("reward_std", WINDOW):
        return None
    # A KL that only swings has been there before.
    if kl.last < own["height"] * highest(run, "kl", slow(run, "reward") // 3):
        return None
    return Seen(
        "error" if reward.falls else "warning",
        f"over the last {slow(run, 'reward')} rows kl went {kl.first:.3g} -> {kl.last:.3g} while "
        f"reward went {reward.first:.3f} -> {reward.last:.3f} (noise {reward.noise:.3f})",
    )


def highest(run: History, name: str, third: int) -> float:
    """The highest mean of `third` values that lie wholly before a trend's last third."""
    series = run.series[name]
    # A quarter of it apart: a window that grows with the run is asked for a fixed number of times.
    ends = range(third, len(series) - third + 1, max(third // 4, 1))
    return max((series.mean(end - third, end) for end in ends), default=0.0)


def sampler_mismatch(run: History, limits: Limits) -> Seen | None:
    own, now = limits["R5"], run.mean(GAP, 5, least=3)
    if apart_from_the_start(run, limits):
        return None
    severity = level(now, {name: own[name] for name in ("info", "warning")})
    evidence = f"|log p of the sampler - of the trainer| {now:.3g} a token"
    trend = run.trend(GAP, SLOW_LEAST) if severity == "warning" else None
    if trend is not None and trend.last > own["growth"] * trend.first and trend.rises:
        severity = "error"
        evidence += f", growing: {trend.first:.3g} -> {trend.last:.3g}"
    start = run.series[GAP].values[0]
    stale = severity and start < own["info"] and run.step > 1
    if stale:
        evidence += f"; before the first update {start:.2g}"
    weight, ess = run.mean(IS_MEAN, 5, least=3), run.mean("sampling/ess", 5, least=3)
    if weight < own["low"] or weight > own["high"]:
        severity = "warning" if severity != "error" else severity
        evidence += f"; mean importance weight {weight:.2f}"
    if ess < own["ess"]:
        severity = "warning" if severity != "error" else severity
        evidence += f"; effective sample share {ess:.2f}"
    if not severity:
        return None
    if stale:
        return Seen(
            severity,
            evidence,
            "the gap grew with the updates: new weights do not reach the sampler, or late",
            "set it to correct meanwhile; what mends it is to hand the sampler the weights of "
            "every step",
            "loss.importance_sampling_correction",
        )
    return Seen(severity, evidence)


def first_clip(run: History) -> float:
    """Tokens clipped before any update, of the last rows."""
    name = "clip_ratio/first_mean"
    if name not in run.row and run.options.get("num_iterations") == 1:
        name = "clip_ratio/region_mean"
    return run.mean(name, WINDOW) if name in run.row else math.nan


def phantom_clip(run: History, limits: Limits) -> Seen | None:
    clipped = first_clip(run)
    severity = level(clipped, limits["R6"])
    if not severity:
        return None
    return Seen(
        severity,
        f"{clipped:.1%} of the tokens clipped before the policy changed, where every ratio is 1",
    )


def clip_fraction(run: History, limits: Limits) -> Seen | None:
    own = limits["R7"]
    if run.options.get("num_iterations") == 1 or first_clip(run) > limits["R6"]["warning"]:
        return None
    clipped = run.mean("clip_ratio/region_mean", WINDOW)
    severity = level(clipped, own)
    if not severity:
        return None
    low, high = (run.mean(f"clip_ratio/{side}_mean", WINDOW) for side in ("low", "high"))
    evidence = f"{clipped:.1%} of the tokens clipped, low {low:.1%}, high {high:.1%}"
    if high > own["asymmetry"] * low:
        return Seen(
            severity,
            evidence,
            "likely tokens that became likelier hit the upper bound",
            "clip higher: 0.28 (DAPO)",
            "loss.epsilon_high",
        )
    return Seen(severity, evidence)


def entropy_collapse(run: History, limits: Limits) -> Seen | None:
    own = limits["R8"]
    start, now = run.start("entropy"), run.mean("entropy", 3, least=10)
    if now != now or start <= 0:
        return None
    reward = run.trend("reward", SLOW_LEAST) if now > own["rise"] * start else None
    if reward is not None and reward.falls and not held_out_holds(run, own):
        return Seen(
            "warning",
            f"entropy rose {start:.3g} -> {now:.3g} while reward fell "
            f"{reward.first:.3f} -> {reward.last:.3f}",
            "the policy is falling apart into noise",
            "lower it, and go back to a checkpoint from before",
            "learning_rate",
        )
    values = run.series["entropy"].values
    # What only comes back from a rise has not collapsed.
    ago = min(statistics.fmean(values[-13:-10]), start) if len(values) >= 13 else math.nan
    if now > own["halved"] * start and not now < (1 - own["drop"]) * ago:
        return None
    if not reward_flat(run, limits, min(SLOW_LEAST, len(run.series["reward"]))):
        return None
    said = f"entropy {start:.3g} -> {now:.3g} ({now / start:.0%} of its start), reward not rising"
    if now < own["floor"] * start:
        return Seen("error", said)
    if now < (1 - own["drop"]) * ago:
        return Seen("warning", f"{said}; {1 - now / ago:.0%} lost in 10 rows")
    trend, planned = run.trend("entropy", SLOW_LEAST), run.options.get("max_steps")
    if trend is None or not trend.falls:
        return None
    if not isinstance(planned, int):
        return None
    left = (now - own["floor"] * start) / (-trend.change / (2 * SLOW_LEAST / 3))
    if run.step + left < planned:
        return Seen(
            "warning", f"{said}; at this pace 10 % is reached at step {run.step + left:.0f}"
        )
    return None


def held_out_holds(run: History, own: Mapping[str, float]) -> bool:
    """A fresh held-out reward is where it was before the reward's window: other prompts, no
    fall."""
    evals, rewards = run.series.get("eval_reward"), run.series["reward"].steps
    if evals is None or len(evals) < 2 or evals.steps[-1] < rewards[-WINDOW]:
        return False
    return evals.values[-1] > evals.around(rewards[-SLOW_LEAST], 1) - own["held"]


def gradient(run: History, limits: Limits) -> Seen | None:
    own, norm = limits["R13"], run.value("grad_norm")
    if broken(run.row):
        count = sum(map(broken, run.recent))
        said = f"loss or gradient not finite in {count} of the last {len(run.recent)} rows"
        if count >= own["repeats"]:
            return Seen("error", said)
        return Seen("info", f"{said}: such a step is skipped")
    # A step in which all groups were dead has no gradient to lose.
    if norm == 0 and alive(run.row) and len(run.recent) >= 5:
        zero = [row for row in run.recent if row.get("grad_norm") == 0 and alive(row)]
        severity = level(len(zero) / len(run.recent), own)
        if not severity:
            return None
        return Seen(
            severity,
            f"gradient exactly 0 in {len(zero)} of the last {len(run.recent)} rows, which had "
            "groups to learn from",
            "parameters are frozen, or log-probs lost their graph",
            "check that the model's parameters require gradients, and that no log-prob is detached",
            "model",
        )
    return spike(run, own)


def spike(run: History, own: Mapping[str, float]) -> Seen | None:
    """A gradient far out of the usual; the first rows' are judged once, when there is a usual."""
    # A step in which all groups were dead has nearly no gradient, and is no measure.
    rows = [row for row in run.recent if alive(row) and measured(row.get("grad_norm"))]
    if not rows or rows[-1] is not run.row or len(rows) <= WINDOW:
        return None
    before = [row["grad_norm"] for row in rows[:-1]]
    # A run may well begin with a large one.
    asked = rows[2:] if len(rows) == WINDOW + 1 and len(run.recent) < RECENT else rows[-1:]
    worst = max(asked, key=lambda row: row["grad_norm"])
    norm = worst["grad_norm"]
    if norm <= own["ratio"] * min(before):
        return None
    usual = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(value - usual) for value in before)
    if norm <= own["ratio"] * usual or norm <= usual + own["sigma"] * spread:
        return None
    where = "" if worst is run.row else f" at step {worst['step']}"
    return Seen("warning", f"grad_norm {norm:.3g}{where}, where the median is {usual:.3g}")


def broken(row: Mapping[str, object]) -> bool:
    """Loss or gradient is there and not finite, or the trainer skipped the update."""
    values = [row[name] for name in ("loss", "grad_norm") if name in row]
    return not all(map(measured, values)) or bool(row.get("skipped_updates", 0))


def alive(row: Mapping[str, object]) -> bool:
    """Some group has rewards that differ, as far as the row says."""
    return row.get("frac_reward_zero_std") != 1


def apart_from_the_start(run: History, limits: Limits) -> bool:
    """R15's: stale weights agree in the first row, before any update, and part later."""
    return min(run.series[GAP].values[:3]) > limits["R15"]["error"]


def first_gap(run: History, limits: Limits) -> Seen | None:
    gap, limit = run.start(GAP, 3), limits["R15"]["error"]
    if len(run.series[GAP]) < 3 or not apart_from_the_start(run, limits):
        return None
    return Seen("error", f"{gap:.3g} a token in the first 3 rows already, limit {limit:g}")


def loss_near_zero(run: History, limits: Limits) -> Seen | None:
    loss = run.mean("loss", WINDOW)
    if not abs(loss) < limits["R16"]["info"]:
        return None
    norm = run.value("grad_norm")
    moving = f"; the gradient is not: its norm is {norm:.3g}" if norm > 0 else ""
    return Seen("info", f"mean loss {loss:.2g}{moving}")


def idle_rate(run: History, limits: Limits) -> Seen | None:
    own, planned = limits["R17"], run.options.get("max_steps")
    rows = int(own["rows"])
    rates = run.series["learning_rate"].values[-rows:]
    if len(rates) >= rows and not any(rates) and run.step != planned:
        return Seen("warning", f"learning_rate 0 in {rows} rows in a row, at step {run.step}")
    warmup = run.options.get("warmup_steps")
    known = measured(warmup) and measured(planned) and planned > 0
    if known and len(rates) >= rows and warmup > own["warmup"] * planned:
        reached = rates[-1]
        return Seen(
            "warning",
            f"warm-up takes {warmup} of {planned} steps: learning_rate is {reached:.2g} at step "
            f"{run.step}, of {run.options.get('learning_rate', math.nan):.2g}",
            "most of the run trains at a fraction of its learning rate",
            "a twentieth of max_steps is usual",
            "warmup_steps",
        )
    return still(run, own) if any(rates) else None


def still(run: History, own: Mapping[str, float]) -> Seen | None:
    """Groups teach, the rate is not 0, and the policy is where it began."""
    count = int(own["still_rows"])
    kl, dead = run.series.get("kl"), run.mean("frac_reward_zero_std", count, least=count)
    if "kl" not in run.here or len(kl) < count or not dead < 0.9:
        return None
    far = kl.highest
    if not far < own["still"]:
        return None
    return Seen(
        "warning",
        f"kl was never above {far:.2g} in {len(kl)} rows in which groups had something to teach",
        "steps are too small to change the policy, or are lost in rounding",
        "raise it by 10 times; with bfloat16 parameters look at update_precision too",
        "learning_rate",
    )


def throughput(run: History, limits: Limits) -> Seen | None:
    own = limits["R18"]
    speeds = run.series.get("tokens_per_second")
    # The first row warms up.
    if speeds is not None and len(speeds) >= 2 * WINDOW + 1:
        now, usual = speeds.mean(len(speeds) - 5, len(speeds)), speeds.mean(1, WINDOW + 1)
        if now < own["slower"] * usual:
            return Seen(
                "warning",
                f"{now:,.0f} tokens a second, {usual:,.0f} at first",
                "something compiles again and again, memory is short, or the machine is shared",
                "look at time/* and the lengths; a smaller one needs less memory",
                "token_budget",
            )
    seconds = run.mean("step_time", WINDOW)
    shares = {
        name.removeprefix("time/"): run.mean(name, WINDOW) / seconds
        for name in run.row
        if seconds > 0 and name.startswith("time/")
    }
    reward = shares.pop("reward", 0.0)
    if reward > own["reward"]:
        return Seen("warning", f"reward functions take {reward:.0%} of a step")
    padding = run.mean("batch/pad_frac", WINDOW)
    # Our own packed rows have no padding: there the metric says what it would have been.
    if padding > own["padding"] and "batch/row_fill_frac" not in run.row:
        return Seen("warning", f"{padding:.0%} of the tokens are padding", "", "pack rows")
    longest = max(shares, key=lambda name: shares[name], default="")
    if longest and shares[longest] > own["phase"]:
        said = f"{longest} takes {shares[longest]:.0%} of a step"
        key = "max_completion_length" if longest == "rollout" else "prompts_per_step"
        return Seen("info", said, f"{longest} bounds the step", "a smaller one is faster", key)
    return None
