"""`grpo-fast bench --static`: the whole table compiles here, and its gate is no decoration.

Everything runs in processes of its own: kernels that the interpreter has taken over cannot be
compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_bench import static
from grpo_bench.occupancy import occupancy

TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]
# A package of kernels as ours is one; `PLACE` is where a test spoils it.
KERNELS = """
import triton
import triton.language as tl

@triton.jit
def _helper(x):
    return x * 2

@triton.jit
def _scale_kernel(p_x, n, BV: tl.constexpr):
    o = tl.program_id(0) * BV + tl.arange(0, BV)
    x = tl.load(p_x + o, mask=o < n)
    PLACE
    tl.store(p_x + o, _helper(x), mask=o < n)
"""
RUN = """
import sys
from grpo_bench import static
from grpo_bench.signatures import TABLE, Variant

TABLE.clear()
kernel, config, types = ENTRY
TABLE[kernel] = (Variant(label="fp32", types=types, configs=(config,)),)
sys.exit(static.main(sys.argv[1:], package="spoiled"))
"""
TYPES = {"p_x": "*fp32", "n": "i32"}
CONFIG = {"BV": 1024, "num_warps": 4}


def run(words: list[str], folder: Path, **extra: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(folder)} | extra
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def spoiled(
    folder: Path,
    place: str = "pass",
    *,
    config=None,
    types=None,
    kernel="_scale_kernel",
    words=("--target", "sm_90"),
) -> subprocess.CompletedProcess:
    (folder / "spoiled").mkdir()
    (folder / "spoiled/scale.py").write_text(KERNELS.replace("PLACE", place))
    entry = repr((kernel, config or CONFIG, types or TYPES))
    (folder / "run.py").write_text(RUN.replace("ENTRY", entry))
    return run(["run.py", *words], folder)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """The whole table, asked for with the interpreter on, as the rest of the suite has it."""
    folder = tmp_path_factory.mktemp("static")
    words = ["-P", "-m", "grpo_bench.main", "--static", "--json", "rows.json"]
    done = run(words, folder, TRITON_INTERPRET="1")
    assert (folder / "rows.json").is_file(), done.stdout + done.stderr
    return done, json.loads((folder / "rows.json").read_text())["rows"]


def test_every_kernel_compiles_for_every_target_without_spills(table):
    done, rows = table
    assert done.returncode == 0, done.stdout[-3000:]
    assert not [row for row in rows if row["error"]]
    seen = {(row["kernel"], row["target"]) for row in rows}
    assert seen == {(kernel, target) for kernel in static.TABLE for target in TARGETS}
    for row in rows:
        assert 0 < row["registers"] <= 512
        assert row["instructions"] > 10
        assert 0 < row["occupancy"] <= 1
        if row["target"] == "sm_90":
            assert row["spill_bytes"] == row["local"] == row["fp64"] == 0, row


def test_printed_table_has_a_line_a_row(table):
    done, rows = table
    lines = done.stdout.splitlines()
    for target in TARGETS:
        printed = [line for line in lines if f" {target} " in line]
        assert len(printed) == sum(row["target"] == target for row in rows)
    assert lines[-1].startswith(f"{len(rows)} rows, 0 violations")


def test_large_rows_are_read_16_bytes_at_a_time(table):
    """The kernels that stream [N, V] logits live off this; a ragged V cannot have it."""
    wide = [
        row
        for row in table[1]
        if row["target"] == "sm_90"
        and "p_logits" in static.TABLE[row["kernel"]][0].types
        and "ragged" not in row["variant"]
    ]
    assert {row["kernel"] for row in wide} == {
        "_token_logprob_fwd_kernel",
        "_token_logprob_bwd_kernel",
        "_policy_loss_kernel",
    }
    assert all(row["loads_16_byte"] > 0 for row in wide)


def test_the_committed_table_is_the_whole_table(table):
    """A kernel that changes its configurations leaves the gate unless its baseline is made anew."""
    baseline = json.loads(static.BASELINE.read_text())
    assert {static.key_of(row) for row in baseline["rows"]} == {
        static.key_of(row) for row in table[1]
    }


@pytest.mark.parametrize(
    "target, registers, shared, warps, expected",
    [
        ("sm_90", 32, 0, 4, 1.0),
        ("sm_90", 64, 0, 16, 0.5),  # 32,768 registers a program: two of them
        ("sm_90", 65, 0, 16, 0.25),  # rounded up to 72: one
        ("sm_90", 32, 100 * 1024, 8, 0.25),  # shared memory for two
        ("sm_90", 32, 0, 1, 0.5),  # 32 programs at most
        ("sm_120", 32, 0, 1, 0.5),
        ("gfx942", 64, 0, 4, 1.0),
        ("gfx942", 128, 0, 4, 0.5),
        ("sm_90", 255, 230 * 1024, 8, 0.0),
    ],
)
def test_occupancy_is_what_registers_shared_memory_and_places_allow(
    target, registers, shared, warps, expected
):
    assert occupancy(target, registers=registers, shared_bytes=shared, warps=warps) == expected


def test_what_became_worse_is_a_regression(tmp_path):
    assert spoiled(tmp_path, words=["--target", "sm_90", "--json", "rows.json"]).returncode == 0
    record = json.loads((tmp_path / "rows.json").read_text())
    (row,) = record["rows"]
    assert static.regressions([row], [row]) == []
    worse = row | {"occupancy": row["occupancy"] / 2, "spill_bytes": 8, "loads_16_byte": 0}
    found = static.regressions([worse], [row])
    words = [line.split(": ")[1].split(" ")[0] for line in found]
    assert words == ["occupancy", "spills", "16-byte"]
    assert static.regressions([row], [worse]) == []
    record["rows"] = [row | {"occupancy": 2.0}]
    (tmp_path / "before.json").write_text(json.dumps(record))
    again = run(["run.py", "--target", "sm_90", "--baseline", "before.json"], tmp_path)
    assert again.returncode == 1
    assert "violation: _scale_kernel" in again.stdout
    record["about"]["triton"] = "1.0"
    (tmp_path / "before.json").write_text(json.dumps(record))
    other = run(["run.py", "--target", "sm_90", "--baseline", "before.json"], tmp_path)
    assert other.returncode == 0
    assert "not compared: the baseline is of triton 1.0" in other.stdout


def test_a_good_kernel_passes(tmp_path):
    done = spoiled(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 violations" in done.stdout


def test_fp64_arithmetic_fails(tmp_path):
    done = spoiled(tmp_path, "x = (x.to(tl.float64) * 1.1).to(tl.float32)")
    assert done.returncode == 1
    assert "violation: _scale_kernel fp32 BV=1024 num_warps=4 sm_90:" in done.stdout
    assert "fp64 instructions" in done.stdout


def test_fp64_elsewhere_is_counted_and_not_judged(tmp_path):
    place = "x = (x.to(tl.float64) * 1.1).to(tl.float32)"
    words = ["--target", "sm_80", "--target", "gfx942", "--json", "rows.json"]
    done = spoiled(tmp_path, place, words=words)
    assert done.returncode == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["target"] for row in rows] == ["sm_80", "gfx942"]
    assert all(row["fp64"] > 0 for row in rows)


def test_spills_fail(tmp_path):
    # Every thread holds 128 values across the sum, with room for few of them.
    config = {"BV": 4096, "num_warps": 1, "maxnreg": 24}
    done = spoiled(tmp_path, "x = tl.exp(x) + tl.sum(tl.exp(x)) + x", config=config)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "bytes of spill or local memory" in done.stdout
    assert "local-memory instructions" in done.stdout


def test_a_kernel_that_does_not_compile_fails_on_any_target(tmp_path):
    done = spoiled(tmp_path, "x = x + tl.arange(0, 3)", words=["--target", "gfx942"])
    assert done.returncode == 1
    assert "sm_90" not in done.stdout
    assert "gfx942: does not compile:" in done.stdout


def test_a_kernel_without_a_signature_fails(tmp_path):
    done = spoiled(tmp_path, kernel="_other_kernel")
    assert done.returncode == 1
    assert "no signature for _scale_kernel" in done.stderr
    assert "_helper" not in done.stderr


@pytest.mark.parametrize(
    "types, message",
    [
        ({"p_x": "*fp32"}, "argument n has no type"),
        (TYPES | {"p_y": "*fp32"}, "has no argument p_y"),
    ],
)
def test_a_signature_that_does_not_fit_fails(types, message, tmp_path):
    done = spoiled(tmp_path, types=types)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_kernel_is_one_line_and_exit_2(tmp_path):
    done = spoiled(tmp_path, words=["--kernel", "nonsense"])
    assert done.returncode == 2
    assert "no kernel is called ['nonsense']: there are _scale_kernel" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--target", "sm_91"], "invalid choice: 'sm_91'"),
        (["--jsn", "x"], "unrecognized arguments: --jsn x"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_2(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        static.main(words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_options_restrict_the_table(tmp_path):
    words = ["--kernel", "scale", "--target", "sm_100", "--json", "rows.json"]
    assert spoiled(tmp_path, words=words).returncode == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (row["kernel"], row["target"]) == ("_scale_kernel", "sm_100")
    assert row["loads_16_byte"] > 0
