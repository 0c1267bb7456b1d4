"""The benchmarks themselves: no number from a wrong kernel, sound arithmetic, results that say what
they depend on."""

import json
import math
import os
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from grpo_bench import gpu, main, timing
from grpo_bench.timing import Case, Size, interleaved, measure, row, summary
from grpo_fast.config_file import build_config, read_config

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY = {
    "token_logprob": {"N": 5, "V": 37},
    "policy_loss": {"N": 5, "V": 37},
    "group_advantage": {"S": 12, "G": 4},
    "segment_reduce": {"T": 50, "S": 7},
    "linear_grpo": {"N": 6, "D": 8, "V": 37},
}


def tiny_case(op: str, label: str, dtype: torch.dtype = torch.float32) -> Case:
    return main.OPS[op].case(Size(label=label, shape=TINY[op], dtype=dtype), CPU)


LABELS = [
    (op, label)
    for op, module in main.OPS.items()
    for label in sorted({size.label for size in module.SIZES["cpu"] + module.SIZES["cuda"]})
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op, label", LABELS)
def test_every_case_checks_itself_and_has_three_columns(op, label, dtype):
    case = tiny_case(op, label, dtype)
    case.check()
    assert set(case.columns) == {"ours", "eager", "ceiling"}
    assert case.bytes > 0
    assert case.flops > 0


INTERPRETED = """
import torch
from grpo_bench import main
from grpo_bench.timing import Size

for op, label, shape in CASES:
    module = main.OPS[op]
    module.implementation_on = lambda device: "triton"
    module.case(Size(label=label, shape=shape), torch.device("cpu")).check()
    print(op, label)
"""


def test_cases_fit_the_triton_launchers():
    """In a process of its own, with the interpreter on before triton is first imported."""
    cases = [(op, label, TINY[op]) for op, label in LABELS]
    done = subprocess.run(
        [sys.executable, "-P", "-c", INTERPRETED.replace("CASES", repr(cases))],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(LABELS)


@pytest.mark.parametrize(
    "op, launcher, spoil",
    [
        ("token_logprob", "token_logprob_fwd", lambda out: out._replace(logp=out.logp * 1.001)),
        ("token_logprob", "token_logprob_bwd", lambda out: out.mul_(1.01)),
        ("policy_loss", "policy_loss", lambda out: out._replace(ratio=out.ratio + 1e-3)),
        (
            "group_advantage",
            "group_advantage",
            lambda out: out._replace(advantages=out.advantages * 1.001),
        ),
        ("segment_reduce", "segment_reduce", lambda out: out.roll(1)),
    ],
)
def test_a_wrong_kernel_gets_no_number(op, launcher, spoil, monkeypatch):
    from grpo_fast import torch_kernels

    right = getattr(torch_kernels, launcher)
    monkeypatch.setattr(
        torch_kernels, launcher, lambda *args, **options: spoil(right(*args, **options))
    )
    found = measure(tiny_case(op, main.OPS[op].SIZES["cuda"][-1].label), CPU, seconds=0.001)
    assert "wrong result, not timed" in found["error"]
    assert found["columns"] == {}
    assert found["speedup_over_eager"] is None
    assert found["gigabytes_per_second"] is None


def test_an_unwritten_gradient_is_seen(monkeypatch):
    from grpo_fast import torch_kernels

    right = torch_kernels.policy_loss

    def forgetful(**options):
        out = right(**options)
        # One row between those that are compared with float64.
        options["dlogits"][3] = math.nan
        return out

    monkeypatch.setattr(torch_kernels, "policy_loss", forgetful)
    monkeypatch.setattr(timing, "CHECKED_ROWS", 2)
    with pytest.raises(AssertionError, match="not written"):
        tiny_case("policy_loss", "loss + gradient").check()


def test_rows_that_teach_nothing_are_not_in_the_ceiling():
    case = tiny_case("linear_grpo", "loss + gradient, half of the rows")
    assert 2 * case.flops == tiny_case("linear_grpo", "loss + gradient").flops
    _, _, dhidden, _ = case.columns["ours"](0)
    assert (dhidden[1::2] == 0).all()
    assert (dhidden[::2] != 0).any()


def test_row_arithmetic():
    case = Case(
        op="policy_loss",
        size=Size(label="loss", shape={"N": 4, "V": 8}, dtype=torch.bfloat16),
        columns={},
        check=lambda: None,
        bytes=4_000_000_000,
        flops=8_000_000_000_000,
    )
    columns = {
        name: summary([seconds] * 5) | {"peak_bytes": None}
        for name, seconds in {"ours": 2.0, "eager": 6.0, "ceiling": 1.0}.items()
    }
    found = row(case, columns)
    assert found["speedup_over_eager"] == 3.0
    assert found["fraction_of_ceiling"] == 0.5
    assert found["gigabytes_per_second"] == 2.0
    assert found["teraflops"] == 4.0
    assert (found["N"], found["V"], found["dtype"]) == (4, 8, "bfloat16")
    lone = row(case, {"ours": columns["ours"]}, "eager runs out of memory")
    assert lone["speedup_over_eager"] is None
    assert lone["teraflops"] == 4.0
    json.dumps(found)


def test_summary_is_the_median_and_its_spread():
    found = summary([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found["seconds"] == 3.0
    assert found["rounds"] == 5
    assert found["spread"] == pytest.approx((23.2 - 1.8) / 3.0)


def test_columns_take_turns():
    calls = []
    columns = {name: lambda call, name=name: calls.append((name, call)) for name in ("a", "b")}
    times = interleaved(columns, CPU, seconds=1e-9)
    assert len(times["a"]) == len(times["b"]) >= timing.ROUNDS[0]
    timed = calls[2 * timing.WARM_UP :]
    assert [name for name, _ in timed] == ["a", "b"] * (len(timed) // 2)
    assert [call for name, call in timed if name == "a"] == list(range(len(timed) // 2))


def test_running_out_of_memory_loses_one_column():
    def hungry(_):
        raise torch.cuda.OutOfMemoryError("no")

    case = Case(
        op="x",
        size=Size(label="y", shape={"N": 1}),
        columns={"ours": lambda _: torch.ones(64).sum(), "eager": hungry},
        check=lambda: None,
        bytes=256,
        flops=64,
    )
    found = measure(case, CPU, seconds=0.001)
    assert found["error"] == "eager runs out of memory"
    assert found["columns"]["ours"]["seconds"] > 0
    assert "eager" not in found["columns"]


def test_copy_ceiling_moves_every_byte(monkeypatch):
    monkeypatch.setattr(timing, "COPY_BYTES", 16)
    moved = []
    original = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, other: moved.append(len(other)) or original(self, other)
    )
    timing.copy_ceiling(100, CPU)(0)
    assert moved == [16, 16, 16, 2]


def test_matmul_ceiling_runs_every_product(monkeypatch):
    a, b, c = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5, 2)
    done = []
    monkeypatch.setattr(torch, "mm", lambda x, y, out: done.append(out.copy_(x @ y)))
    timing.matmul_ceiling([(a, b), (b, c)])(0)
    assert torch.equal(done[0], a @ b)
    assert torch.equal(done[1], b @ c)


def test_input_sets_leave_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 50_000_000)
    assert timing.input_sets(10_000_000, CPU) == 10
    assert timing.input_sets(1_000_000_000, CPU) == 2
    assert timing.input_sets(1, CPU) == 512


def test_header_says_what_a_number_depends_on(tmp_path):
    found = timing.header(CPU, ROOT)
    assert found["torch"] == torch.__version__
    for name in ("date", "commit", "device", "clock", "python", "triton", "transformers"):
        assert found[name], name
    assert timing.header(CPU, tmp_path)["commit"] == "unknown"


def test_command_prints_a_table_and_writes_json(capsys, tmp_path, monkeypatch):
    module = main.OPS["segment_reduce"]
    monkeypatch.setitem(module.SIZES, "cpu", [Size(label="sum", shape=TINY["segment_reduce"])])
    path = tmp_path / "rows.json"
    words = ["--op", "segment_reduce", "--device", "cpu", "--seconds", "0.01", "--json", str(path)]
    assert main.main(words) == 0
    out = capsys.readouterr().out
    assert "torch " in out
    assert "sum S=7 T=50" in out
    written = json.loads(path.read_text())
    assert (written["schema"], written["kind"]) == (1, "timing")
    command = "grpo-fast bench --op segment_reduce --device cpu --seconds 0.01"
    assert written["about"]["command"] == command
    assert written["rows"][0]["columns"]["ours"]["rounds"] >= timing.ROUNDS[0]


@pytest.mark.parametrize(
    "words, part",
    [
        (["--op", "nonsense"], "invalid choice: 'nonsense'"),
        (["--statik"], "unrecognized arguments: --statik"),
    ],
)
def test_wrong_option_is_one_line_and_exit_2(words, part, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert part in error
    assert len(error.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_run_without_a_gpu_is_one_line_and_exit_2():
    done = subprocess.run(
        [sys.executable, "bench/gpu.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_gpu_parts_fail_alone(tmp_path, monkeypatch):
    """A part that fails, hangs or writes nothing leaves the others and their numbers."""
    code = "print('so far'); raise SystemExit(3)"
    assert gpu.run_part([sys.executable, "-c", code], 30)["status"] == "failed"
    hung = gpu.run_part([sys.executable, "-uc", "print('so far'); import time; time.sleep(9)"], 1)
    assert hung["status"] == "timeout"
    assert hung["output"] == "so far\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "header", lambda device, root: timing.header(CPU, root))
    ok = {"status": "ok", "seconds": 1.0, "limit_seconds": 2, "output": ""}
    monkeypatch.setattr(
        gpu,
        "PARTS",
        {
            "kernels": lambda scratch, limit: ok | {"status": "timeout"},
            "timing": lambda scratch, limit: ok | {"result": {"about": {"date": ""}}},
            "demo": lambda scratch, limit: ok | {"reward_before": 0.4, "reward_after": 0.95},
        },
    )
    monkeypatch.setattr(gpu, "LIMITS", dict.fromkeys(gpu.PARTS, 9))
    assert gpu.main(["--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("gpu-*.json")
    written = json.loads(path.read_text())
    assert written["schema"] == gpu.SCHEMA
    assert [part["status"] for part in written["parts"].values()] == ["timeout", "ok", "ok"]
    assert written["parts"]["demo"]["reward_after"] == 0.95
    timed = written["parts"]["timing"]["result"]["about"]
    assert timed["commit"] == written["about"]["commit"]
    # In pieces: an earlier part of the same commit stays, one of another commit goes.
    path.write_text(json.dumps(written | {"parts": {"kernels": ok | {"seconds": 7.0}}}))
    only = ["--only", "demo", "--only", "timing"]
    assert gpu.main(["--out", str(tmp_path), *only]) == 0
    assert set(json.loads(path.read_text())["parts"]) == {"kernels", "demo", "timing"}
    written["about"]["commit"] = "another"
    path.write_text(json.dumps(written))
    assert gpu.main(["--out", str(tmp_path), *only]) == 0
    assert set(json.loads(path.read_text())["parts"]) == {"demo", "timing"}


@pytest.mark.parametrize("name", gpu.TABLES)
def test_gpu_tables_are_commands_that_parse(name, monkeypatch, capsys):
    """All but the device is checked before anything runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main.main(shlex.split(gpu.TABLES[name]))
    assert "--device cuda, but PyTorch finds no CUDA device here" in capsys.readouterr().err


def test_gpu_parts_end_within_eight_minutes_each():
    assert max(gpu.LIMITS.values()) <= 475
    assert set(gpu.LIMITS) == set(gpu.PARTS)


def test_gpu_starts_no_part_after_its_minutes_and_names_those(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "header", lambda device, root: timing.header(CPU, root))
    limits = []

    def part(scratch, limit):
        limits.append(limit)
        time.sleep(0.6)
        return {"status": "ok", "seconds": 0.6, "limit_seconds": limit, "output": ""}

    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(gpu.PARTS, part))
    words = ["--out", str(tmp_path), "--minutes", "0.025", "--only", "timing", "--only", "A"]
    assert gpu.main(words) == 0
    assert limits == [1]
    assert "not run, 0.025 minutes are over: make gpu ARGS='--only A'" in capsys.readouterr().out


def test_gpu_peers_come_as_wheels(tmp_path, monkeypatch):
    wheel = tmp_path / "wheels/some_peer-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    about = "Metadata-Version: 2.1\nName: some-peer\nVersion: 1.0\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_peer.py", "ANSWER = 42\n")
        archive.writestr("some_peer-1.0.dist-info/METADATA", about)
        archive.writestr("some_peer-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("some_peer-1.0.dist-info/RECORD", "")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    gpu.install_wheels(wheel.parent, tmp_path / "peers")
    done = gpu.run_part([sys.executable, "-c", "import some_peer; print(some_peer.ANSWER)"], 60)
    assert done["output"] == "42\n"
    assert os.environ["PYTHONPATH"] == f"{tmp_path / 'peers'}{os.pathsep}elsewhere"


def test_rows_survive_a_time_limit(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"

    def slow(device, ops, *, seconds):
        if ops == ["policy_loss"]:
            raise KeyboardInterrupt
        return [{"op": ops[0]}]

    monkeypatch.setattr(main, "time_ops", slow)
    words = ["--op", "token_logprob", "--op", "policy_loss", "--device", "cpu"]
    with pytest.raises(KeyboardInterrupt):
        main.main([*words, "--json", str(path)])
    assert json.loads(path.read_text())["rows"] == [{"op": "token_logprob"}]


def test_gpu_file_name():
    name = gpu.file_name("NVIDIA H100 80GB HBM3", "2026-11-24T10:00:00+00:00")
    assert name == "gpu-h100-80gb-hbm3-2026-11-24.json"


def test_gpu_reads_pytest_outcomes(tmp_path):
    assert gpu.outcome_counts(tmp_path / "missing.xml") == {}
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite tests="5" failures="1" errors="0" skipped="2"/></testsuites>'
    )
    assert gpu.outcome_counts(report) == {"tests": 5, "failures": 1, "errors": 0, "skipped": 2}


def test_gpu_demo_is_the_demo_with_its_output_elsewhere(tmp_path, monkeypatch):
    examples = tmp_path / "checkout/examples"
    examples.mkdir(parents=True)
    (examples / "prompts.jsonl").write_text("{}")
    (examples / "demo.yaml").write_text(
        "model: some/model\ndataset: prompts.jsonl\nreward: rewards.py:exact\n"
        "output_dir: runs/demo\nloss:\n  beta: 0.1\nlearning_rate: 1e-3\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path / "checkout")
    config = build_config(read_config(gpu.demo_config(tmp_path)))
    assert config.output_dir == str(tmp_path / "demo")
    assert config.device == "cuda"
    assert config.dataset == str(examples / "prompts.jsonl")
    assert (config.model, config.reward) == ("some/model", ("rewards.py:exact",))
    assert (config.loss.beta, config.learning_rate) == (0.1, 1e-3)


def test_gpu_reads_rewards_of_a_run(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        '{"step": 0, "eval_reward": 0.4}\n{"step": 1, "loss": 0.0}\n'
        '{"step": 2, "eval_reward": 0.9}\n{"step": 3, "lo'
    )
    assert gpu.demo_rewards(metrics) == {"reward_before": 0.4, "reward_after": 0.9, "steps": 2}
    assert gpu.demo_rewards(tmp_path / "missing.jsonl") == {}
