"""Logs written by TRL and by verl themselves, opened by report and doctor."""

import ast
import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from trl_training import answer, host_class, short, trained

from grpo_bench.hosts import PEERS
from grpo_fast.cli import main
from grpo_fast.errors import InputError
from grpo_fast.import_lines import measured
from grpo_fast.records import open_records

pytestmark = [
    pytest.mark.host,
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
]


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory, model):
    """Three steps of TRL's own trainer with log_completions, checkpoints at 2 and 3."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trl") / "out"
    saved = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 2}
    trained(host_class(), model, reward=[answer, short], log_completions=True, beta=0.04, **saved)
    torch.set_num_threads(threads)
    return folder


def test_trl_s_numbers_are_those_that_follow_from_its_tables(output_dir):
    """`measured` is what the importer says of logs that hold completions and nothing else."""
    records = open_records(output_dir)
    assert (records.source, records.config) == ("TRL", {"max_steps": 3, "group_size": 4})
    assert len(records.completions) == 24
    found = measured(records.completions)
    for ours, theirs in zip(found, records.rows, strict=True):
        names = [n for n in ours if n.startswith("rewards/") and n.endswith(("/mean", "/std"))]
        assert len(names) == 4
        for name in ("reward", "reward_std", "frac_reward_zero_std", *names):
            logged = theirs[name]
            assert math.isclose(ours[name], logged, rel_tol=1e-6), (name, ours[name], logged)
    assert records.rows[0]["kl"] == 0
    assert records.rows[0]["advantage/winners"] > 0
    assert records.rows[-1]["completions/mean_length"] > 1


def test_report_and_doctor_of_trl_s_folder(output_dir, capsys):
    assert main(["doctor", str(output_dir)]) == 0
    said = capsys.readouterr().out
    assert "ok       R1" in said
    assert "ok       R2" in said
    assert "sum of answer, short: TRL's tables do not have reward_weights" in said
    assert main(["report", str(output_dir)]) == 0
    page = (output_dir / "report.html").read_text(encoding="utf-8")
    assert "abcdefgh" in page
    assert "short" in page


def test_parts_of_trl_s_folder_open_too(output_dir):
    whole = open_records(output_dir)
    tables = open_records(output_dir / "completions")
    assert tables.completions == whole.completions
    assert [row["step"] for row in tables.rows] == [1, 2, 3]
    (one,) = open_records(output_dir / "completions" / "completions_00002.parquet").rows
    assert one == tables.rows[1]
    state = open_records(output_dir / "checkpoint-2" / "trainer_state.json")
    assert [row["step"] for row in state.rows] == [1, 2]
    assert state.completions == []


def test_broken_tables_are_named(output_dir, tmp_path):
    import pyarrow
    import pyarrow.parquet

    whole = (output_dir / "completions" / "completions_00001.parquet").read_bytes()
    path = tmp_path / "completions_00001.parquet"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"completions_00001\.parquet is no whole parquet file"):
        open_records(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"step": [1], "prompt": ["a"]}), path)
    with pytest.raises(InputError, match="has no column completion, advantage, expected a table"):
        open_records(path)
    table = {"step": [1], "prompt": ["a"], "completion": ["b"], "advantage": [0.0], "r": ["bad"]}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    with pytest.raises(InputError, match=r"completions_00001\.parquet: row 1: no 'reward'"):
        open_records(path)


def function_of_verl(file: str, name: str) -> Any:
    """A function of verl as installed, without what its module imports: Ray."""
    root = Path(next(iter(importlib.util.find_spec("verl").submodule_search_locations)))
    tree = ast.parse((root / file).read_text(encoding="utf-8"))
    (node,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
    node.decorator_list = []
    scope = {"os": os, "json": json}
    for module in ("numbers", "pprint"):
        scope[module] = importlib.import_module(module)
    exec(compile(ast.Module([node], []), file, "exec"), scope)
    return scope[name]


def test_what_verl_writes_opens(tmp_path):
    dump = function_of_verl("trainer/ppo/ray_trainer.py", "_write_generations")
    line = function_of_verl("utils/logger/aggregate_logger.py", "concat_dict_to_str")
    log = []
    for step in (1, 2):
        prompts = ["a", "a", "b", "b"]
        extra = {"acc": [True, False, True, False], "pred": ["4", None, "5", "6"]}
        scores = [1.0, 0.0, 1.0, 0.0]
        dump(prompts, ["4", "x", "5", "6"], [4, 4, 5, 5], scores, extra, str(tmp_path), step)
        log.append(line({"actor/entropy": 0.5, "actor/lr": torch.tensor(1e-6).item()}, step=step))
    (tmp_path / "train.log").write_text("\n".join(["start", *log, "end"]))
    records = open_records(tmp_path)
    assert records.source == "verl"
    assert [row["reward"] for row in records.rows] == [0.5, 0.5]
    assert records.rows[1]["entropy"] == 0.5
    assert records.rows[1]["learning_rate"] == pytest.approx(1e-6)
    assert records.completions[0]["columns"] == {"gts": 4, "pred": "4"}


def test_the_hosts_are_the_installed_ones():
    assert PEERS.is_dir()
