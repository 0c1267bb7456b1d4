"""`grpo-fast plan`: work, parameters and bytes are those of real models, what does not fit is said,
and a wrong option ends in one line."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grpo_bench import main as bench
from grpo_bench import plan_check
from grpo_bench.models import model_config
from grpo_bench.steps import StepMatch
from grpo_fast import ConfigError, cli
from grpo_fast.cost import Passes, StepCost
from grpo_fast.estimate import Job, ours, padded
from grpo_fast.gpus import OF_PEAK, PUBLISHED, Machine, machine, measured
from grpo_fast.memory import MODES
from grpo_fast.model_shapes import FAMILIES, MODELS, ModelShape, model_shape
from grpo_fast.optimizer import make_optimizer
from grpo_fast.tiny import save_tiny

CPU = torch.device("cpu")
JOB = Job(model=MODELS["qwen2.5-1.5b"], prompt=1024, completion=1024, group_size=64)
H100 = machine("h100", torch.bfloat16)
ON_CPU = Machine("a CPU", 2**34, 1e11, 5e10, 1e10, 1e10, 1.0, "cpu")
# As published, in billions.
PARAMETERS = {
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.544,
    "qwen2.5-7b": 7.616,
    "qwen3-4b": 4.022,
    "llama-3.2-1b": 1.236,
    "llama-3.1-8b": 8.030,
    "gemma-2-2b": 2.614,
}


def changed(**changes) -> Job:
    return dataclasses.replace(JOB, **changes)


def real_model(shape: ModelShape):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(model_config(shape))


def run(capsys, words: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *words.split()])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_named_model_has_the_parameters_of_its_name(name):
    assert MODELS[name].parameters / 1e9 == pytest.approx(PARAMETERS[name], rel=1e-3)


def test_the_forward_s_operations_are_those_of_a_real_model():
    shape = ModelShape("Qwen3", 64, 128, 3, 4, 2, 16, 100, tied=False)
    count, length = 2, 7
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        real_model(shape)(torch.ones(count, length, dtype=torch.long))
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if op is torch.ops.aten.mm)
    products += counted.get(torch.ops.aten.addmm, 0)
    # A prompt of nothing: every token has its logits here.
    cost = StepCost(model=shape, prompt=0, completions=[length] * count)
    work = cost.training("padded", Passes(1, 1, 1))
    assert products == work.linears + work.head


def test_what_is_computed_again_costs_one_more_forward():
    forward = JOB.cost.training("shared", Passes(1, 1, 1))
    budget = {"token_budget": 8192}
    once, again = (ours(JOB, H100, checkpointing=mode, **budget) for mode in ("off", "on"))
    assert again.flops.linears - once.flops.linears == forward.linears
    assert again.flops.attention - once.flops.attention == forward.attention
    assert again.flops.head == once.flops.head == 3 * forward.head


def test_frozen_weights_need_no_products_of_their_own():
    forward = JOB.cost.training("shared", Passes(1, 1, 1))
    frozen = ours(changed(train="lora"), H100)
    assert frozen.flops.linears == 2 * forward.linears
    assert frozen.flops.head == 2 * forward.head
    assert padded(changed(train="lora"), H100).flops.head == 3 * forward.head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_bytes_of_weights_gradients_and_states_are_those_of_a_real_model(name, dtype):
    from grpo_fast import TrainConfig

    job = changed(model=MODELS[name], dtype=dtype)
    model = real_model(job.model).to(dtype)
    parameters = list(model.parameters())
    config = TrainConfig(
        model="m", dataset="d", reward="r", dtype=str(dtype).removeprefix("torch."), device="cpu"
    )
    optimizer = make_optimizer(parameters, config)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    found = padded(job, ON_CPU)
    # Norms and biases are not counted.
    near = {"rel": 0.02}
    assert found.memory.weights == pytest.approx(sum(p.nbytes for p in parameters), **near)
    gradients = sum(p.grad.nbytes for p in parameters)
    assert found.memory.gradients == pytest.approx(gradients, **near)
    assert found.memory.optimizer == pytest.approx(sum(x.nbytes for x in states), **near)


def test_padded_grows_with_the_group_and_ours_does_not():
    sizes = (16, 64, 256)
    theirs = [padded(changed(group_size=size), H100) for size in sizes]
    mine = [ours(changed(group_size=size), H100) for size in sizes]
    activations = [e.memory.activations for e in theirs]
    assert activations[2] == pytest.approx(4 * activations[1], rel=1e-6)
    assert activations[1] == pytest.approx(4 * activations[0], rel=1e-6)
    totals = [sum(e.memory) for e in mine]
    assert max(totals) < 1.01 * min(totals)
    assert all(e.fits and e.largest_group is None for e in mine)
    assert mine[1].seconds < 0.6 * theirs[1].seconds


def test_the_largest_padded_group_is_the_last_that_fits():
    largest = padded(JOB, H100).largest_group
    assert largest > 1
    assert padded(changed(group_size=largest), H100).fits
    assert not padded(changed(group_size=largest + 1), H100).fits


def test_a_row_takes_less_where_layers_are_computed_again():
    totals = [ours(JOB, H100, 16384, mode).memory.activations for mode in MODES]
    assert totals[0] > 5 * totals[1] > 5 * totals[2]


def test_short_prompts_and_windows_are_not_shared():
    shared = ours(JOB, H100).tokens
    windowed = ours(changed(model=JOB.model._replace(window=2047)), H100)
    assert shared == 1024 + 64 * 1023
    assert windowed.tokens == 64 * (1024 + 1023)
    assert ours(changed(prompt=64), H100).tokens == 64 * (64 + 1023)
    assert ours(changed(model=JOB.model._replace(window=2048)), H100).tokens == shared


def test_what_does_not_fit_is_said(capsys):
    code, out, _ = run(capsys, "--model llama-3.1-8b --gpu rtx-4090")
    assert code == 0
    lines = {line[:26].strip(): line[26:].split("  ") for line in out.splitlines()}
    assert [x.strip() for x in lines["fits into 24 GB"] if x.strip()] == ["does not fit"] * 2
    assert [x.strip() for x in lines["largest group that fits"] if x.strip()] == ["none"] * 2
    assert out.splitlines()[-1].startswith(
        "To fit: --train lora, --optimizer adamw_8bit, a shorter"
    )
    assert "To fit" not in run(capsys, "--model llama-3.1-8b --train lora --gpu rtx-4090")[1]


def test_the_defaults_print_a_table(capsys):
    code, out, err = run(capsys, "")
    assert (code, err) == (0, "")
    assert "the maker's published peak" in out
    assert "no limit" in out
    assert "rollouts are not in it" in out
    assert len({len(line) for line in out.splitlines()[4:12]}) <= 2  # aligned


def test_help_shows_examples(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "grpo-fast plan --model llama-3.1-8b --train lora --gpu rtx-4090" in out
    assert all(name in out for name in (*PUBLISHED, *MODELS))


def test_json_has_what_the_table_says(capsys, tmp_path):
    path = tmp_path / "plan.json"
    code, out, _ = run(capsys, f"--model tiny --gpu rtx-3090 --dtype float32 --json {path}")
    assert code == 0
    result = json.loads(path.read_text())
    assert (result["schema"], result["kind"]) == (1, "estimate")
    assert result["job"]["model"]["hidden"] == 32
    theirs, mine = result["rows"]
    assert f"{theirs['tokens']:,}" in out
    assert mine["memory"]["weights"] == 6 * MODELS["tiny"].parameters  # float32 and bfloat16
    assert mine["seconds"] == mine["backward_seconds"] + mine["optimizer_seconds"]
    assert mine["largest_group"] is None


def test_time_is_work_over_the_reached_rates():
    slow = H100._replace(flops=H100.flops / 2, attention=H100.attention / 2)
    found, slower = ours(JOB, H100, 16384, "off"), ours(JOB, slow, 16384, "off")
    products = (found.flops.linears + found.flops.head) / (OF_PEAK * H100.flops)
    products += found.flops.attention / (OF_PEAK * H100.attention)
    assert slower.backward_seconds - found.backward_seconds == pytest.approx(products)
    assert found.backward_seconds > products


def test_a_cpu_pays_for_new_pages_of_large_results():
    job = changed(dtype=torch.float32, model=MODELS["small"])
    numbers = 32 * 2**20 // (4 * job.model.intermediate)
    job = dataclasses.replace(job, prompt=numbers // 8 - 8, completion=8, group_size=8)
    slow = ON_CPU._replace(anew=1e9)
    assert padded(job, slow).backward_seconds > padded(job, ON_CPU).backward_seconds
    job = dataclasses.replace(job, prompt=job.prompt - 1)
    assert padded(job, slow).backward_seconds == padded(job, ON_CPU).backward_seconds


def test_a_machine_is_measured(capsys, one_thread):
    found = measured(CPU, torch.float32)
    assert 1e8 < found.flops < 1e13
    assert 1e8 < found.attention < 1e13
    assert 1e8 < found.anew < 1e12
    assert 1e8 < found.bandwidth < 1e12
    assert found.reached == 1
    if not torch.cuda.is_available():
        code, out, _ = run(capsys, "--gpu here --model tiny --prompt 64 --completion 64")
        assert code == 0
        assert "measured here" in out


def test_a_folder_s_config_is_read_without_transformers(tmp_path):
    overrides = {"num_hidden_layers": 3, "intermediate_size": 96, "tie_word_embeddings": True}
    save_tiny(tmp_path, **overrides)
    shape = model_shape(str(tmp_path))
    assert (shape.family, shape.layers, shape.intermediate, shape.tied) == ("Qwen3", 3, 96, True)
    assert shape == model_shape(str(tmp_path / "config.json"))
    code = (
        "import sys; from grpo_fast import cli; "
        f"assert cli.main(['plan', '--model', {str(tmp_path)!r}]) == 0; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_read_has_the_parameters_of_its_model(kind, tmp_path):
    import transformers
    from transformers import AutoModelForCausalLM

    config = getattr(transformers, f"{FAMILIES[kind][0]}Config")(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        pad_token_id=0,
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = sum(p.numel() for p in model.parameters())
    assert model_shape(str(tmp_path)).parameters == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"model_type": "mamba"}', "model_type 'mamba', whose layers are not counted here"),
        ("[1]", "no JSON object of a model's config"),
        ("{", "no JSON object of a model's config"),
        (
            '{"model_type": "llama", "hidden_size": "big", "num_attention_heads": 4}',
            "hidden_size = 'big', expected a positive whole number",
        ),
    ],
)
def test_a_config_that_cannot_be_counted_is_refused(config, said, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=said):
        model_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--gpu l40", "gpu 'l40' is not known: did you mean 'l40s'?"),
        ("--model qwen2.5-15b", "did you mean 'qwen2.5-1.5b'?"),
        ("--group-size 0", "--group-size 0, expected 1 or more"),
        ("--group-size many", "argument --group-size: invalid int value: 'many'"),
        ("--token-budget 2000", "--token-budget 2000 is below one sequence of 2048 tokens"),
        ("--grou 3", "unrecognized arguments: --grou 3"),
        ("--json /no/such/folder/x.json", "cannot be written"),
    ],
)
def test_a_wrong_option_is_one_line(words, said, capsys):
    code, _, err = run(capsys, words)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_the_estimates_of_a_check_are_those_of_its_steps():
    match = StepMatch(shape=(9, 5, 4), model="tiny")
    whole = plan_check.predicted(match, ON_CPU, "one row")
    theirs = plan_check.predicted(match, ON_CPU, "padded")
    assert whole.tokens == whole.row == 9 + 4 * 4
    assert theirs.tokens == 4 * 14
    assert theirs.flops.head == whole.flops.head
    assert theirs.optimizer_seconds > 0  # apart, since no step here has one


def test_a_check_prints_measured_beside_predicted(tmp_path, capsys, one_thread):
    out = tmp_path / "plan.json"
    words = f"--plan --model tiny --shape 9 5 4 --rounds 2 --json {out}"
    assert bench.main(words.split()) == 0
    result = json.loads(out.read_text())
    assert (result["schema"], result["kind"]) == (1, "plan")
    assert [row["provider"] for row in result["rows"]] == list(plan_check.NAMES)
    for row in result["rows"]:
        assert row["error"] is None
        assert min(row["seconds"], row["predicted_seconds"], row["predicted_bytes"]) > 0
        assert (row["P"], row["C"], row["G"], row["dtype"]) == (9, 5, 4, "float32")
        assert row["extra_bytes"] is not None
    assert "predicted" in capsys.readouterr().out


def test_an_error_of_an_estimate_is_relative_to_what_was_measured():
    assert plan_check.off(3.0, 2.0) == 0.5
    assert plan_check.off(3.0, None) is None
    line = {"seconds": 2.0, "extra_bytes": None, "error": "wrong result"}
    match = StepMatch(shape=(9, 5, 4), model="tiny")
    rows = plan_check.rows_of(match, ON_CPU, {name: dict(line) for name in plan_check.NAMES})
    assert rows[1]["over_padded"] == 1
    lines = plan_check.plan_table(rows)
    assert lines[-1] == "one row: wrong result"


def test_a_wrong_option_of_a_check_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--plan", "--shape", "4", "4", "1"])
    assert stopped.value.code == 2
    assert "--shape 4 4 1: sizes from 1, G from 2" in capsys.readouterr().err
