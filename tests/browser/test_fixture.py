"""The button "copy as regression test": its file runs by itself against the eager reference."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from grpo_fast.loss_config import LossConfig

pytestmark = pytest.mark.browser
DAPO = LossConfig(loss_type="dapo", epsilon_high=0.28, beta=0.04)
CONFIGS = {
    "dapo": DAPO,
    "delta": LossConfig(loss_type="grpo", delta=1.4, dual_clip=1.25, epsilon=0.1),
    "per_prompt": LossConfig(loss_type="dapo", aggregation="prompt_mean", epsilon=0.1, beta=0.1),
    "corrected": LossConfig(
        loss_type="dr_grpo",
        importance_sampling_correction="token_truncate",
        importance_sampling_max=1.05,
        off_policy_mask_threshold=0.01,
        beta=0.02,
        kl_estimator="k1+",
    ),
    "gspo": LossConfig(loss_type="gspo", epsilon=0.02, beta=0.5, use_bias_correction_kl=True),
    "vespo": LossConfig(loss_type="vespo", importance_sampling_correction="sequence_truncate"),
    "cispo": LossConfig(loss_type="cispo", cispo_bounds="both", epsilon_high=0.3),
    "dppo": LossConfig(loss_type="dppo_kl", epsilon=0.001, epsilon_high=0.001, delta=1.1),
    "dro": LossConfig(loss_type="dro", dro_beta=0.3),
    "gmpo": LossConfig(loss_type="gmpo", epsilon=0.2),
    "luspo": LossConfig(loss_type="luspo", entropy_coef=0.01, temperature=0.7),
}


@pytest.fixture
def opened(make, visit, tmp_path):
    """`opened(step, **options)`: the page at group 7 of a step of a run of its own."""

    def go(step, **options):
        folder = make.run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", [{"step": 1}])
        path = make.page(folder, make.log({1: step}))
        return visit(path, "#step=1&group=7", **options).page

    return go


def saved(page, path):
    with page.expect_download() as download:
        page.get_by_test_id("fixture-save").click()
    assert download.value.suggested_filename == "test_step_1_group_7.py"
    download.value.save_as(path)
    return path


def pytest_on(folder) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done.stdout, done.returncode


def test_the_files_of_all_losses_pass_by_themselves(opened, make, tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    for name, config in CONFIGS.items():
        page = opened(make.step(config, size=6, length=24))
        path = saved(page, folder / f"test_{name}.py")
        assert re.fullmatch(r"[\x00-\x7f]*", path.read_text(encoding="utf-8"))
    on_policy = opened(make.step(DAPO, on_policy=True, ref=True, sampler=False, scale="batch"))
    saved(on_policy, folder / "test_on_policy.py")
    said, code = pytest_on(folder)
    assert code == 0, said
    # Loss, slopes, ratio and KL, and advantages but of the step scaled as a whole.
    assert f"{5 * len(CONFIGS) + 4} passed, 1 skipped" in said


# What is changed in a file: the test that is red then.
CHANGES = {
    "epsilon": (lambda group: group["config"].update(epsilon=0.01), "test_loss"),
    "loss": (lambda group: group.update(loss=group["loss"] * 1.0001), "test_loss"),
    "slope": (lambda group: group["completions"][0]["slope"].__setitem__(0, 9.0), "test_slopes"),
    "ratio": (lambda group: group["completions"][0]["ratio"].__setitem__(0, 1.5), "[ratio]"),
    "kl": (lambda group: group["completions"][0]["kl"].__setitem__(0, 1.5), "[kl]"),
    "reward": (lambda group: group["rewards"].__setitem__(0, 7.0), "test_advantages"),
}


def test_a_changed_number_is_red(opened, make, tmp_path):
    folder = tmp_path / "changed"
    folder.mkdir()
    text = saved(opened(make.step(DAPO)), tmp_path / "test_one.py").read_text(encoding="utf-8")
    before, data, after = text.split("'''")
    for name, (change, _) in CHANGES.items():
        group = json.loads(data)
        change(group)
        changed = "'''".join([before, json.dumps(group), after])
        (folder / f"test_{name}.py").write_text(changed, encoding="utf-8")
    said, code = pytest_on(folder)
    assert code == 1
    failed = [line for line in said.splitlines() if line.startswith("FAILED")]
    for name, (_, red) in CHANGES.items():
        assert any(f"test_{name}.py" in line and red in line for line in failed), said


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (320, "dark")])
def test_copied_by_keys_it_is_the_same_text(opened, make, tmp_path, width, scheme):
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    page = opened(make.step(DAPO), **options)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_test_id("fixture-copy").focus()
    page.keyboard.press("Enter")
    said = page.get_by_test_id("fixture-said")
    page.get_by_text("pytest runs it").wait_for()
    assert re.match(r"Copied, \d+ kB", said.inner_text())
    text = page.evaluate("navigator.clipboard.readText()")
    assert text == saved(page, tmp_path / "test_one.py").read_text(encoding="utf-8")
    assert said.inner_text() == "Saved as test_step_1_group_7.py."
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_moved_sliders_are_no_part_of_it(opened, make, tmp_path):
    page = opened(make.step(DAPO))
    before = saved(page, tmp_path / "test_before.py").read_text(encoding="utf-8")
    page.get_by_test_id("number-epsilon_high").fill("0.9")
    page.get_by_test_id("drop").first.check()
    assert saved(page, tmp_path / "test_after.py").read_text(encoding="utf-8") == before


def test_a_group_that_cannot_be_computed_says_why(opened, make):
    top = dataclasses.replace(DAPO, top_entropy_quantile=0.4)
    page = opened(make.step(top, keep=True))
    for name in ("fixture-copy", "fixture-save"):
        assert page.get_by_test_id(name).is_disabled()
    said = page.get_by_test_id("fixture-said").inner_text()
    assert said == "No test of it: top_entropy_quantile is a quantile over all tokens of the step."
    page = opened(make.step(LossConfig(loss_type="dapo")))
    page.get_by_test_id("group").select_option("0")
    page.get_by_text("No test of it: nothing of this group was forwarded.").wait_for()
