"""Cases A to J: an aim is met, missed or not measured, and `make gpu` runs what it is judged by."""

import re

import pytest
import torch

from grpo_bench import gpu, main
from grpo_bench.cases import CASES, COMMANDS, OURS, Aim
from grpo_bench.record import about, written

CPU = torch.device("cpu")


def peer(provider: str, seconds: float, **more) -> dict:
    row = {"provider": provider, "N": 4096, "D": 4096, "V": 131072, "head": "trained"}
    return row | {"seconds": seconds, "of_floor": 0.9, "extra_bytes": 2e8, "error": None} | more


def verdicts(letter: str, rows: list[dict] | None) -> list[str]:
    return [aim.verdict(rows)[1] for aim in CASES[letter].aims]


def test_every_case_is_judged_by_a_part_that_make_gpu_runs():
    assert list(CASES) == ["A", "B", "C", "D", "E", "F", "G", "H", "I24", "I80", "I139", "J"]
    assert {case.part for case in CASES.values()} == set(COMMANDS) <= set(gpu.PARTS)


def test_an_aim_is_met_missed_or_not_measured():
    least, most = (
        Aim("x", lambda rows: rows[0], least=2.0),
        Aim("x", lambda rows: rows[0], most=2.0),
    )
    assert (str(least), str(most)) == ("x >= 2", "x <= 2")
    assert [least.verdict([value])[1] for value in (1.9, 2.0, 2.1)] == ["MISSED", "met", "met"]
    assert [most.verdict([value])[1] for value in (1.9, 2.0, 2.1)] == ["met", "met", "MISSED"]
    assert least.verdict([None]) == ("-", "not measured there")
    assert least.verdict(None) == ("-", "no result yet")


def test_peers_are_compared_at_the_same_shape():
    rows = [peer(OURS, 1.0), peer("TRL", 2.0), peer("Liger ScaledCE", 1.1), peer("Liger", 9.0)]
    assert verdicts("A", rows) == ["met", "met", "MISSED", "met"]
    assert verdicts("A", rows[:1]) == ["met", *["not measured there"] * 3]
    wrong = [rows[0], rows[1] | {"seconds": None, "error": "wrong result"}]
    assert verdicts("A", wrong)[1] == "not measured there"
    two = [peer(OURS, 1.0, D=896), peer("TRL", 1.1, D=896), peer(OURS, 1.0, D=1536)]
    assert verdicts("B", [*two, peer("TRL", 2.0, D=1536)]) == ["met", "met", "MISSED", "met"]


def test_half_of_the_rows_is_held_against_all_of_them():
    def row(label: str, seconds: float, v: int = 8) -> dict:
        columns = {"ours": {"seconds": seconds}}
        return {"label": label, "N": 4, "D": 2, "V": v, "columns": columns, "seconds": None}

    half, full = "loss + gradient, half of the rows", "loss + gradient"
    assert verdicts("D", [row(full, 5.0, 9), row(full, 1.0), row(half, 0.55)]) == ["met"]
    assert verdicts("D", [row(full, 1.0), row(half, 0.65)]) == ["MISSED"]
    assert verdicts("D", [row(full, 1.0, 9), row(half, 0.65)]) == ["not measured there"]


def test_memory_must_stay_the_same():
    rows = [peer(OURS, 1.0), peer(OURS, 9.0, N=65536, extra_bytes=2.1e8)]
    assert verdicts("G", rows) == ["met", "met"]
    assert verdicts("G", [*rows, peer(OURS, 9.0, N=2**20, extra_bytes=2e9)]) == ["MISSED"] * 2


def test_steps_groups_and_rollouts():
    step = [peer("shared", 1.0, of_rate=0.5), peer("TRL accumulated", 3.0)]
    assert verdicts("H", step) == ["MISSED", "met"]
    memory = [
        {"provider": name, "G": 512, "error": error}
        for name, error in (("budget", "full"), ("recomputed", None))
    ]
    assert verdicts("I24", memory) == ["met"]
    assert verdicts("I24", memory[:1]) == ["not measured there"]
    assert verdicts("J", [peer("grpo-fast", 1.0, over_hf=11.0, of_roof=0.4)]) == ["met", "MISSED"]


def test_the_newest_file_of_a_gpu_decides(tmp_path, capsys):
    for day, name, seconds in (
        ("2026-01-02", "gpu-b-A", 1.0),
        ("2026-01-01", "gpu-c-A", 3.0),
        ("2026-01-03", "cpu-A", 9.0),
    ):
        facts = about(CPU, "--peers", []) | {"date": f"{day}T00:00:00", "device": name}
        written(tmp_path / f"{name}.json", "peers", facts, [peer(OURS, seconds), peer("TRL", 2.0)])
    assert main.main(["--cases", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "time over TRL <= 0.72" in line]
    assert line.endswith("gpu-b-A, 2026-01-02")
    assert " 0.5 " in line
    assert sum("no result yet" in line for line in lines) > 10


@pytest.mark.parametrize("letter", CASES)
def test_a_command_has_the_sizes_of_its_question(letter):
    sizes = re.findall(r"=(\d+)", CASES[letter].question)
    assert set(sizes) <= set(COMMANDS[CASES[letter].part].split())
