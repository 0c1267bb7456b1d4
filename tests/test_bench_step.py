"""One step by layout: everybody computes the same gradients, operations are counted right, and
what is wrong or missing has no number."""

import importlib.metadata
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from grpo_bench import bench_step, hosts, main, steps
from grpo_bench.bench_step import Check, StepSeat
from grpo_bench.isolated import Inline
from grpo_bench.models import model_config
from grpo_bench.provider import Gap
from grpo_bench.steps import PROVIDERS, StepMatch, StepProvider, exact_step
from grpo_fast.cost import StepCost
from grpo_fast.model_shapes import MODELS, ModelShape

TINY = StepMatch(shape=(9, 5, 4), lengths="lognormal", model="tiny")
OURS = [p.name for p in PROVIDERS if p.package == "grpo-fast"]
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_}
# A provider whose fault another process can import too.
SPOILED = """
from grpo_bench import steps


def wrong():
    right = steps.padded()

    def prepare(model, group, pieces):
        step = right(model, group)

        def spoiled():
            loss = step()
            model.get_input_embeddings().weight.grad *= 1.001
            return loss

        return spoiled

    return prepare
"""


def provider(name: str, /, **changes) -> StepProvider:
    (found,) = (p for p in PROVIDERS if p.name == name)
    return StepProvider(**{**vars(found), **changes})


@pytest.fixture
def truth(tmp_path):
    path = tmp_path / "truth.pt"
    torch.save(exact_step(TINY)._asdict(), path)
    return path


@pytest.mark.parametrize("name", [p.name for p in PROVIDERS])
def test_everybody_has_the_oracle_s_loss_and_gradients(name, truth, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # TRL's provider sets it: put back afterwards
    try:
        seat = StepSeat(provider(name))
    except Gap as gap:
        # `make test` lays TRL into hosts.PEERS, which that module puts on the path.
        if hosts.PEERS.is_dir():
            raise
        pytest.skip(str(gap))
    check = seat.open(TINY, truth)
    assert max(check.loss_error, check.gradient_error) < 1e-5
    assert seat.time().seconds > 0


def test_a_wrong_gradient_gets_no_number(truth, tmp_path, monkeypatch):
    (tmp_path / "spoiled_steps.py").write_text(SPOILED)
    monkeypatch.syspath_prepend(str(tmp_path))
    import spoiled_steps

    seat = StepSeat(provider("padded", load=spoiled_steps.wrong))
    with pytest.raises(Gap, match=r"wrong result, not timed: .* gradients by .*, allowed 1e-04"):
        seat.open(TINY, truth)


def test_a_missing_gradient_is_named():
    gradients = exact_step(TINY).gradients
    fewer = {name: x for name, x in gradients.items() if "norm" not in name}
    with pytest.raises(AssertionError, match=r"gradients of model\.layers\.0\.input_layernorm"):
        steps.gradient_error(fewer, gradients)


def test_lengths_are_drawn_around_the_mean():
    drawn = StepMatch(shape=(1, 100, 512), lengths="lognormal").completions()
    assert 95 < sum(drawn) / 512 < 105
    assert min(drawn) >= 1
    assert max(drawn) == 200
    assert StepMatch(shape=(1, 100, 3)).completions() == [100] * 3


@pytest.mark.parametrize("lengths", ["fixed", "lognormal"])
@pytest.mark.parametrize("name", OURS)
def test_products_are_counted_as_they_are_made(name, lengths):
    """Linears and head, forward and backward, exactly; attention is no product here."""
    match = StepMatch(shape=(9, 5, 4), lengths=lengths, model="tiny")
    found = provider(name)
    step = found.calls()(match.network(), match.group())
    step()
    # The counter knows no products that add in place.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **more: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step()
    counted = counter.get_flop_counts()["Global"]
    cost = bench_step.step_cost(match).training(found.layout)
    assert sum(n for op, n in counted.items() if op in PRODUCTS) == cost.linears + cost.head


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_attention_pairs_are_those_that_a_mask_leaves(layout):
    prompt, completions = 5, [3, 1, 4]
    model = MODELS["tiny"]
    found = StepCost(model=model, prompt=prompt, completions=completions)
    sequences = []
    for k, count in enumerate(completions):
        end = max(completions) if layout == "padded" else count - 1
        tokens = [(None if layout == "shared" else k, i) for i in range(prompt)]
        sequences.append(tokens + [(k, prompt + i) for i in range(end)])
    seen = {
        (q, key, k if layout != "shared" else None)
        for k, tokens in enumerate(sequences)
        for n, q in enumerate(tokens)
        for key in tokens[: n + 1]
    }
    work = found.work(layout)
    assert work.tokens == len({token for tokens in sequences for token in tokens})
    assert work.pairs == len(seen)
    width = model.heads * model.head_dim * model.layers
    assert found.training(layout).attention == 3.5 * 4 * width * work.pairs


def test_prediction_is_the_token_ratio_where_linears_are_all():
    model = ModelShape("Qwen2", 8, 10**9, 1, 1, 1, 8, 1)
    cost = StepCost(model=model, prompt=1024, completions=[128] * 16)
    assert cost.speedup("shared") == pytest.approx(16 * 1152 / (1024 + 16 * 127), rel=1e-4)
    assert cost.speedup("padded") == 1


@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
def test_a_run_says_what_it_depends_on(together, capsys, tmp_path, one_thread):
    out, picture = tmp_path / "step.json", tmp_path / "step.png"
    words = "--step --model tiny --shape 9 5 4 --lengths lognormal --rounds 2 --seconds 0"
    asked = [*words.split(), "--only", "padded", "--only", "shared"]
    asked += ["--together"] if together else []
    assert main.main([*asked, "--json", str(out), "--plot", str(picture)]) == 0
    printed, progress = capsys.readouterr()
    result = json.loads(out.read_text())
    assert {"commit", "device", "torch", "threads", "clock", "load_before"} <= result[
        "about"
    ].keys()
    assert result["about"]["together"] is together
    padded, shared = result["rows"]
    assert padded["over_padded"] == 1
    assert padded["of_gain"] is None
    gain = (shared["over_padded"] - 1) / (shared["predicted"] - 1)
    assert shared["of_gain"] == pytest.approx(gain)
    assert 0 < shared["gradient_error"] < 1e-5
    assert "of gain" in printed
    assert "round 2 of 2" in progress
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_what_fails_in_this_process_is_a_gap_too(one_thread):
    class Seat:
        def __init__(self, _):
            raise ValueError("no such card")

    with pytest.raises(Gap, match="fails: ValueError: no such card"):
        Inline(provider("padded"), 1, Seat).ask("time")


def test_a_missing_peer_is_named_and_has_no_number(monkeypatch, tmp_path):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(Gap, match="trl is not installed: pip install trl"):
        provider("TRL").calls()
    line = bench_step.row(TINY, provider("TRL"), "trl is not installed", {}, 1e9)
    assert (line["seconds"], line["over_padded"], line["version"]) == (None, None, None)
    assert bench_step.step_table([line])[-1] == "TRL: trl is not installed"


def test_ratios_are_medians_within_rounds():
    times = {"padded": [1.0, 2.0, 30.0], "shared": [0.5, 1.0, 10.0]}
    line = bench_step.row(TINY, provider("shared"), Check(0.0, 0.0, 0), times, 1e9)
    assert (line["over_padded"], line["fastest"], line["rounds"]) == (2.0, 0.5, 3)


def test_without_a_baseline_there_is_no_ratio():
    line = bench_step.row(TINY, provider("shared"), Check(0.0, 0.0, 0), {"shared": [1.0, 1.0]}, 1e9)
    assert (line["seconds"], line["over_padded"], line["of_gain"]) == (1.0, None, None)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--rounds 1", "--rounds from 2"),
        ("--shape 4 4 1", "--shape 4 4 1: sizes from 1, at least two completions"),
        ("--only nobody", "--only 'nobody': there are padded, accumulated, packed"),
    ],
)
def test_wrong_options_end_in_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["--step", *words.split()])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-1.5b", 1.544),
        ("qwen2.5-7b", 7.616),
        ("qwen3-4b", 4.022),
        ("llama-3.2-1b", 1.236),
        ("llama-3.1-8b", 8.030),
        ("gemma-2-2b", 2.614),
    ],
)
def test_a_named_model_has_the_parameters_of_its_name(name, billions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(MODELS[name]))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)
