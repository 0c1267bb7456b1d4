"""The sliders of the report against `reference_loss` in float64, on the same stored numbers."""

import dataclasses

import pytest
import torch

from grpo_fast.loss_config import LossConfig
from grpo_fast.reference_advantage import group_advantage

pytestmark = pytest.mark.browser
FIGURES = ("loss", "mass", "gaining")
# The page adds up in another order than autograd.
CLOSE = 1e-9
TRAINED = {
    "dapo": LossConfig(loss_type="dapo", epsilon_high=0.28, beta=0.04),
    "delta and dual clip": LossConfig(loss_type="grpo", delta=1.4, dual_clip=1.25, epsilon=0.1),
    "sequence level": LossConfig(
        loss_type="grpo", importance_sampling_level="sequence", epsilon=0.02, beta=0.1
    ),
    "gspo-token": LossConfig(
        loss_type="bnpo", importance_sampling_level="sequence_token", epsilon=0.02
    ),
    "per prompt": LossConfig(loss_type="dapo", aggregation="prompt_mean", epsilon=0.1),
    "corrected": LossConfig(
        loss_type="dr_grpo",
        importance_sampling_correction="token_truncate",
        importance_sampling_max=1.05,
        off_policy_mask_threshold=0.01,
        beta=0.02,
        kl_estimator="k1+",
    ),
    "sequence correction, KL corrected": LossConfig(
        loss_type="gspo",
        epsilon=0.02,
        importance_sampling_correction="geometric_mask",
        importance_sampling_max=1.01,
        importance_sampling_min=0.99,
        beta=0.5,
        use_bias_correction_kl=True,
        kl_estimator="abs",
    ),
    "vespo, corrected": LossConfig(
        loss_type="vespo", importance_sampling_correction="sequence_truncate", kl_estimator="k2",
        beta=0.1,
    ),
    "cispo of verl": LossConfig(loss_type="cispo", cispo_bounds="both", epsilon_high=0.3),
    "dppo_tv": LossConfig(loss_type="dppo_tv", epsilon=0.02, epsilon_high=0.01),
    "dppo_kl": LossConfig(loss_type="dppo_kl", epsilon=0.001, epsilon_high=0.001, delta=1.1),
    "dro": LossConfig(loss_type="dro", dro_beta=0.3),
    "top entropy": LossConfig(loss_type="dapo", top_entropy_quantile=0.4, beta=0.04),
    "gpg": LossConfig(loss_type="gpg"),
}  # fmt: skip
# Without a metric there is no chart to wait for.
ROW = [{"step": 1}]
OFFERED = ("grpo", "bnpo", "dapo", "dr_grpo", "gspo", "luspo", "cispo", "sapo", "vespo", "gmpo")


@pytest.fixture(scope="module")
def steps(make):
    """`steps(config, **options)`: a step whose groups have six completions."""
    return lambda config, **options: make.step(config, size=6, length=24, **options)


@pytest.fixture
def open_step(make, visit, tmp_path):

    def go(step):
        path = make.page(make.run(tmp_path / "run", ROW), make.log({step.meta["step"]: step}))
        return visit(path, f"#step={step.meta['step']}&group=7").page

    return go


def shown(page, which: str, name: str) -> float:
    return float(page.get_by_test_id(f"{which}-{name}").get_attribute("data-value"))


def clipped(told, config) -> tuple[float, float]:
    """Shares held at the bounds, as `clip_ratio/low_mean` and `high_mean` count them."""
    low, high = 1 - config.epsilon, 1 + config.clip_high
    gains = told["advantages"]
    below = (told["ratio"] < low) & told["known"] & (gains < 0)
    above = (told["ratio"] > high) & told["known"] & (gains > 0)
    count = int(told["known"].sum())
    return int(below.sum()) / count, int(above.sum()) / count


def assert_equal(page, which, told, config):
    for name in FIGURES:
        assert shown(page, which, name) == pytest.approx(told[name], rel=CLOSE, abs=1e-300), name
    if config.loss_type in ("grpo", "bnpo", "dapo", "dr_grpo", "gspo", "luspo"):
        low, high = clipped(told, config)
        assert shown(page, which, "low") == low
        assert shown(page, which, "high") == high


def stored_group(step, index: int = 7) -> dict:
    return next(group for group in step.meta["groups"] if group["index"] == index)


@pytest.mark.parametrize("name", TRAINED)
def test_as_trained_is_the_oracle(name, make, steps, open_step):
    config, oracle = TRAINED[name], make.oracle
    step = steps(config, keep=config.top_entropy_quantile < 1)
    told = oracle(step, stored_group(step), config)
    page = open_step(step)
    assert_equal(page, "trained", told, config)
    assert_equal(page, "whatif", told, config)
    assert told["mass"] > 0


def test_every_offered_loss_type_is_the_oracle_with_its_sliders_moved(make, steps, open_step):
    trained, oracle = TRAINED["dapo"], make.oracle
    step = steps(trained)
    page, group = open_step(step), stored_group(step)
    for name in OFFERED:
        page.get_by_test_id("whatif-loss_type").select_option(name)
        options = {"beta": 0.07}
        page.get_by_test_id("number-beta").fill("0.07")
        if name not in ("sapo", "vespo"):
            options["epsilon_high"] = 1.3 if name == "cispo" else 0.15
            page.get_by_test_id("number-epsilon_high").fill(str(options["epsilon_high"]))
            if name != "cispo":
                options["epsilon"] = 0.1
                page.get_by_test_id("number-epsilon").fill("0.1")
        config = LossConfig(loss_type=name, **options)
        assert_equal(page, "whatif", oracle(step, group, config), config)
        assert_equal(page, "trained", oracle(step, group, trained), trained)


def test_on_policy_the_ratio_is_one_and_the_slope_is_not_zero(make, steps, open_step):
    config, oracle = TRAINED["dapo"], make.oracle
    step = steps(config, on_policy=True)
    page = open_step(step)
    assert_equal(page, "whatif", oracle(step, stored_group(step), config), config)
    assert shown(page, "whatif", "high") == 0
    page.get_by_test_id("whatif-loss_type").select_option("gspo")
    config = LossConfig(loss_type="gspo", epsilon_high=0.28, beta=0.04)
    assert_equal(page, "whatif", oracle(step, stored_group(step), config), config)


def test_a_slider_moved_by_keys_recolours_the_clipped_tokens(make, steps, open_step):
    config, oracle = TRAINED["dapo"], make.oracle
    step = steps(config)
    page = open_step(step)
    before = page.locator("#xray-columns .t.high").count()
    slider = page.get_by_test_id("slider-epsilon_high")
    slider.focus()
    for _ in range(12):
        slider.press("ArrowLeft")
    high = float(slider.input_value())
    assert 0 < high < 0.28
    moved = dataclasses.replace(config, epsilon_high=high)
    told = oracle(step, stored_group(step), moved)
    assert_equal(page, "whatif", told, moved)
    assert shown(page, "trained", "high") == clipped(told, config)[1]
    after = page.locator("#xray-columns .t.high").count()
    assert after == round(clipped(told, moved)[1] * int(told["known"].sum())) > before
    page.get_by_test_id("whatif-reset").click()
    assert page.locator("#xray-columns .t.high").count() == before
    assert shown(page, "whatif", "loss") == shown(page, "trained", "loss")


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_scaling_off_and_a_dropped_completion(baseline, make, steps, open_step):
    config, oracle = TRAINED["dapo"], make.oracle
    step = steps(config, baseline=baseline, rewards=[1.0, 0.0, 0.5, 1.0, 0.25, 0.0])
    group, page = stored_group(step), open_step(step)
    rewards = torch.tensor(group["rewards"], dtype=torch.float64)
    ids = torch.zeros(len(rewards), dtype=torch.long)
    page.get_by_test_id("whatif-scale").select_option("none")
    flat = group_advantage(rewards, ids, scale="none", baseline=baseline).advantages
    assert_equal(page, "whatif", oracle(step, group, config, flat.tolist()), config)

    page.get_by_test_id("whatif-scale").select_option("trained")
    page.locator("[data-index='2']").get_by_test_id("drop").check()
    left = rewards.clone()
    left[2] = torch.nan
    again = group_advantage(left, ids, baseline=baseline).advantages
    told = oracle(step, group, config, again.tolist(), dropped=[2])
    assert_equal(page, "whatif", told, config)
    assert_equal(page, "trained", oracle(step, group, config), config)
    for name in ("grpo", "dr_grpo", "luspo"):
        page.get_by_test_id("whatif-loss_type").select_option(name)
        other = LossConfig(loss_type=name, epsilon_high=0.28, beta=0.04)
        told = oracle(step, group, other, again.tolist(), dropped=[2])
        assert_equal(page, "whatif", told, other)


def test_what_cannot_be_recomputed_says_why(steps, open_step):
    config = LossConfig(loss_type="dapo", top_entropy_quantile=0.2)
    step = steps(config, ref=False, scale="batch")
    for group in step.meta["groups"]:
        del group["completions"][-1]
    page = open_step(step)
    said = page.get_by_test_id("notes").inner_text()
    assert "As trained is not recomputed: top_entropy_quantile is a quantile over all" in said
    assert "They count the 5 stored of 6 completions." in said
    assert page.get_by_test_id("slider-beta").is_disabled()
    assert "no reference log-probs" in page.get_by_test_id("reason-beta").inner_text()
    assert page.get_by_test_id("whatif-scale").is_disabled()
    reason = page.get_by_test_id("reason-whatif-scale").inner_text()
    assert "scaled over the whole step (batch)" in reason
    assert page.get_by_test_id("drop").first.is_disabled()
    assert not page.get_by_test_id("trained-loss").count()


def test_a_completion_that_was_not_forwarded_has_no_loss_once_it_would_teach(steps, open_step):
    step = steps(LossConfig(loss_type="dapo"))
    page = open_step(step)
    page.get_by_test_id("group").select_option("0")
    page.locator("#xray[data-ready='1.0']").wait_for()
    assert shown(page, "whatif", "loss") == 0
    page.get_by_test_id("number-beta").fill("0.1")
    said = page.get_by_test_id("notes").inner_text()
    assert "What if is not computed: completion 0 taught nothing and was not forwarded" in said
