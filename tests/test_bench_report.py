"""Results as pages: every figure comes from a file that says how to make it again, and what is
committed is what the files say."""

import json
import math

import pytest
import torch

from grpo_bench import charts, everything, main, report, tables
from grpo_bench.record import about, command_line, finite, named_records, written
from grpo_bench.timing import Case, Size, row, summary

CPU = torch.device("cpu")


def peer_row(provider: str, seconds: float | None, n: int = 64) -> dict:
    return {
        "provider": provider,
        "version": "1.0",
        **{"N": n, "D": 8, "V": 32, "dtype": "float32", "head": "trained"},
        "seconds": seconds,
        "over_ours": seconds,
        "of_floor": seconds and 0.5 / seconds,
        "extra_bytes": seconds and 2**20 * seconds,
        "error": None if seconds else "wrong result, not timed",
    }


def step_row(provider: str, layout: str, ratio: float | None) -> dict:
    return {
        "provider": provider,
        **{"P": 4, "C": 2, "G": 8, "layout": layout, "predicted": 1.5},
        "over_padded": ratio,
        "error": None if ratio else "TRL is not installed",
    }


def memory_row(provider: str, size: int, extra: int | None) -> dict:
    error = None if extra else f"G={size}: about 9 GB needed, not run"
    return {"provider": provider, "G": size, "extra": extra, "seconds": 0.5, "error": error}


def timing_row() -> dict:
    size = Size(label="sum", shape={"T": 8, "S": 2})
    case = Case(op="x", size=size, columns={}, check=lambda: None, bytes=64, flops=8)
    columns = {name: summary([0.25] * 3) for name in ("ours", "eager", "ceiling")}
    return row(case, columns)


ROWS = {
    "peers": [peer_row("grpo-fast torch", 1.0), peer_row("TRL", 2.5), peer_row("late", None)],
    "step": [
        step_row("padded", "padded", 1.0),
        step_row("shared", "shared", 1.25),
        step_row("TRL", "padded", None),
    ],
    "memory": [memory_row("budget", 8, 2**24), memory_row("padded", 8, None)],
    "timing": [timing_row(), timing_row() | {"op": "linear_grpo_loss"}],
    "accuracy": [
        {"provider": "ours", "version": None, "dtype": "float32", "gap": None}
        | {"logp": 1e-7, "dhidden": 2e-7, "dweight": 3e-7, "ratio_is_1": True},
        {"provider": "verl", "version": None, "dtype": "float32", "gap": "verl is not installed"},
    ],
    "plan": [
        {"provider": "shared", "P": 4, "C": 2, "G": 8, "model": "tiny", "dtype": "float32"}
        | {"predicted_seconds": 1.1, "seconds": 1.0, "predicted_bytes": 90, "extra_bytes": 100}
    ],
    "rollout": [
        {"provider": "grpo-fast", "version": "1", "P": 4, "C": 2, "G": 8, "model": "tiny"}
        | {"dtype": "float32", "seconds": 0.5, "tokens_per_second": 32.0, "over_hf": 2.0}
        | {"of_roof": 0.25, "extra_bytes": 2**20, "error": None}
    ],
    "drop_in": [
        {"provider": name, "version": "1", "P": 4, "C": 2, "G": 8, "model": "tiny"}
        | {"dtype": "float32", "seconds": seconds, "over_trl": seconds and 1 / seconds}
        | {"tokens_per_second": 9.0, "extra_bytes": 2**20, "of_trl_bytes": 0.5, "error": error}
        for name, seconds, error in (
            ("TRL", 1.0, None),
            ("packed", 0.25, None),
            ("fused", None, "went to depth 'own' with this model"),
        )
    ],
    "static": [
        {"kernel": "_x_kernel", "variant": "fp32", "config": "BV=8", "target": target}
        | {"registers": 32, "spill_bytes": 0, "shared_bytes": 0, "occupancy": 0.75}
        | {"loads_16_byte": 2, "error": None}
        for target in ("sm_80", "sm_90")
    ],
}


def record_of(kind: str, folder, name: str | None = None) -> dict:
    facts = about(CPU, f"--{kind}", ["--shape", "1 2"], P=4, C=2, token_budget=16, threads=1)
    return written(folder / f"{name or kind}.json", kind, facts, ROWS[kind])


def test_a_record_says_how_to_make_it_again(tmp_path):
    words = ["--json", "a.json", "--shape", "1", "2", "--plot=b.png", "--only", "a b"]
    assert command_line("--step", words) == "grpo-fast bench --step --shape 1 2 --only 'a b'"
    assert command_line("", []) == "grpo-fast bench"
    found = record_of("step", tmp_path)["about"]
    assert found["command"] == "grpo-fast bench --step --shape '1 2'"
    assert {"date", "commit", "device", "torch", "load_before", "load_after"} <= found.keys()


def test_what_is_not_finite_is_null():
    assert finite({"a": [math.nan, 1.0], "b": {"c": math.inf}}) == {
        "a": [None, 1.0],
        "b": {"c": None},
    }


@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_has_a_table_with_its_source_and_its_gaps(kind, tmp_path):
    record = record_of(kind, tmp_path)
    lines = tables.table(record)
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert len(widths) == 1
    assert lines[-1].endswith(f"Again: `grpo-fast bench --{kind} --shape '1 2'`")
    missing = [r for r in ROWS[kind] if r.get("error") or r.get("gap")]
    for r in missing:
        assert f"- {r['provider']}: {r.get('error') or r['gap']}" in lines
        assert not any(line.startswith(f"| {r['provider']} | 0") for line in lines)


def test_tables_hold_the_figures(tmp_path):
    text = {kind: "\n".join(tables.table(record_of(kind, tmp_path))) for kind in ROWS}
    assert "| TRL 1.0 | 2.5 s | 2.50 | 0.20 | 2 MiB |" in text["peers"]
    assert "N=64 D=8 V=32, float32, head trained:" in text["peers"]
    assert "| shared | 1.25 |" in text["step"]
    assert "| predicted of a shared prompt | 1.50 |" in text["step"]
    assert "| 8 | 16 MiB | - |" in text["memory"]
    assert "| ours | 1.0e-07 | 2.0e-07 | 3.0e-07 | yes |" in text["accuracy"]
    assert "| 1.1 s | 1 s | +10% | 0 MiB | 0 MiB | -10% |" in text["plan"]
    assert "| 500 ms | 32 | 2.00 | 0.25 | 1 MiB |" in text["rollout"]
    assert "| packed | 250 ms | 4.00 | 9 | 1 MiB | 50% |" in text["drop_in"]
    assert "| TRL 1 |" in text["drop_in"]
    assert "| x, fp32, BV=8 | 32 | 0 | 0 | 0.75 | 2 |" in text["static"]
    assert text["static"].count("x, fp32") == 1  # of one target


@pytest.mark.parametrize("kind", sorted(set(ROWS) - {"accuracy", "rollout", "static"}))
def test_every_kind_but_three_is_drawn(kind, tmp_path):
    record = record_of(kind, tmp_path)
    assert charts.draw(record, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    texts = [t.get_text() for t in charts.picture(record).findobj() if hasattr(t, "get_text")]
    assert any(record["about"]["commit"][:8] in text for text in texts)


def test_peers_at_several_sizes_are_drawn_as_lines(tmp_path):
    record = record_of("peers", tmp_path)
    assert len(charts.picture(record).axes) == 1
    record["rows"] += [peer_row("grpo-fast torch", 2.0, 128), peer_row("TRL", 6.0, 128)]
    time, memory = charts.picture(record).axes
    assert [line.get_ydata().tolist() for line in time.get_lines()] == [[1.0, 2.0], [2.5, 6.0]]
    assert memory.get_ylabel() == "extra memory, MiB"


def test_where_nothing_right_was_measured_nothing_is_drawn(tmp_path):
    record = record_of("step", tmp_path)
    record["rows"] = [step_row("TRL", "padded", None)]
    assert not charts.draw(record, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_report_of_a_folder(tmp_path, capsys):
    for kind in ROWS:
        record_of(kind, tmp_path)
    facts = about(CPU, "", [])
    del facts["command"]
    written(tmp_path / "superseded.json", "step", facts, ROWS["step"])
    gpu = {"about": {}, "parts": {"step": {"result": record_of("step", tmp_path)}, "demo": {}}}
    (tmp_path / "gpu-x.json").write_text(json.dumps(gpu))
    assert set(named_records(tmp_path)) == {*ROWS, "superseded", "gpu-x-step"}
    assert main.main(["--report", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'README.md'}\n"
    page = (tmp_path / "README.md").read_text()
    heads = [line for line in page.splitlines() if line.startswith("## ")]
    assert len(heads) == len(ROWS) + 1
    assert [head.split(": ")[0][3:] for head in heads][:2] == [
        report.TITLES["peers"],
        report.TITLES["accuracy"],
    ]
    assert "superseded" not in page  # nobody could make it again
    assert {path.stem for path in tmp_path.glob("*.png")} == {*ROWS, "gpu-x-step"} - {
        "accuracy",
        "rollout",
        "static",
    }


def test_a_folder_without_results_is_one_line_and_exit_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(["--report", "--results", str(tmp_path)])
    assert stopped.value.code == 2
    assert "no result of `grpo-fast bench` lies there" in capsys.readouterr().err


def test_figures_go_between_the_marks():
    readme = f"a\n{report.BEGIN}\nold\n{report.END}\nb\n"
    assert report.with_figures(readme, "new") == f"a\n{report.BEGIN}\n\nnew\n\n{report.END}\nb\n"
    assert report.with_figures("no marks", "new") == "no marks"


def test_committed_pages_say_what_the_committed_results_say():
    records = report.shown_records(report.RESULTS)
    drawn = {name for name in records if (report.RESULTS / f"{name}.png").is_file()}
    assert (report.RESULTS / "README.md").read_text() == report.page(records, drawn)
    readme = (report.ROOT / "README.md").read_text()
    assert report.with_figures(readme, report.figures(records, drawn)) == readme
    assert all(name in records for name in report.SHOWN)
    for record in records.values():
        assert "uncommitted" not in record["about"]["commit"]


def test_everything_is_commands_that_parse(capsys):
    for name, part in everything.PARTS.items():
        for words in filter(None, (part.full, part.quick)):
            with pytest.raises(SystemExit) as stopped:
                main.main([*everything.shlex.split(words), "--nonsense"])
            assert stopped.value.code == 2
            assert "unrecognized arguments: --nonsense:" in capsys.readouterr().err, name


def test_everything_runs_each_table_and_says_which_failed(tmp_path, monkeypatch, capsys):
    parts = {
        "timing": everything.Part("", "--op segment_reduce --seconds 0.01"),
        "step": everything.Part("", "--op nonsense"),
        "full": everything.Part("--seconds 1", ""),
    }
    monkeypatch.setattr(everything, "PARTS", parts)
    assert everything.main(["--quick", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "cpu-timing: ok in" in out
    assert "cpu-step: FAILED, exit code 2" in out
    assert "invalid choice: 'nonsense'" in out
    assert "1 of 2 tables in 0:" in out
    assert (tmp_path / "cpu-timing.json").is_file()
    assert "## Each op against eager" in (tmp_path / "README.md").read_text()
