"""Beside the peers: a missing one is named, a wrong one gets no number, and what is written says
what it depends on. No peer needs to be installed."""

import importlib.metadata
import json
import math
import os
import shutil
import statistics
from functools import partial

import pytest
import torch

from grpo_bench import accuracy, compare, main, matches, peers, record
from grpo_bench.bench_linear_grpo import exact_gradients
from grpo_bench.isolated import Call, Meter
from grpo_bench.matches import Match
from grpo_bench.peers import Calls
from grpo_bench.provider import CONFIG, Gap, Loss, Provider
from grpo_bench.record import finite
from grpo_bench.timing import assert_right, checked_rows

CPU = torch.device("cpu")
TINY = (8, 16, 53)
PEERS = {p.package for p in peers.PROVIDERS} - {"grpo-fast", "torch"}
DTYPES = [torch.float32, torch.bfloat16]
# Providers whose faults other processes can import too.
SPOILED = """
import os

import torch

from grpo_bench import peers


def changed(change):
    right = peers.eager(None, torch.float32)

    def loss(batch):
        out = right.loss(batch)
        return out._replace(loss=change(out.loss))

    return right._replace(loss=loss)


def wrong():
    return changed(lambda loss: loss * 1.01)


def broken():
    raise RuntimeError("no such\\nsymbol")


def bound(reduction):
    def loss(batch):
        logits = batch.hidden.flatten(0, 1) @ batch.weight.t()
        targets = batch.targets.flatten()
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction=reduction)
        return peers.Loss(nll, None)

    return peers.Calls(None, loss)


def failing():
    return changed(lambda loss: loss.nonsense)


def dying():
    calls = []

    def change(loss):
        calls.append(loss)
        return loss if len(calls) < 3 else os._exit(7)

    return changed(change)
"""


def provider(name: str, /, **changes) -> Provider:
    (found,) = (p for p in peers.PROVIDERS if p.name == name)
    return Provider(**{**vars(found), **changes})


@pytest.fixture
def no_peers(monkeypatch):
    """As on a machine where nobody has installed a peer."""
    version = importlib.metadata.version

    def found(name: str) -> str:
        if name in PEERS:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", found)


@pytest.fixture
def spoiled(tmp_path, monkeypatch):
    """`spoiled("wrong")` is a provider with that fault, installed and importable anywhere."""
    (tmp_path / "spoiled_peers.py").write_text(SPOILED)
    monkeypatch.syspath_prepend(str(tmp_path))
    import spoiled_peers

    def named(fault: str, **options) -> Provider:
        load = getattr(spoiled_peers, fault)
        options = {"name": fault, "load": load} | options
        return Provider(computes="nothing sound", package="torch", **options)

    return named


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [p.name for p in peers.PROVIDERS])
def test_everybody_computes_the_oracle_s_loss(name, dtype, frozen):
    """Those that are installed: off policy, both clips taken."""
    try:
        calls = provider(name).calls()
    except Gap as gap:
        pytest.skip(str(gap))
    if "cpu" in provider(name).compiled_on and not shutil.which("g++"):
        pytest.skip("inductor compiles with g++")
    batch = peers.random_batch(TINY, dtype, CPU)
    got = peers.gradients(calls, batch, frozen=frozen)
    same = peers.gradients(provider("eager").calls(), batch, frozen=frozen)
    right = exact_gradients(batch.rows())
    assert (got.dweight is None) == frozen
    for part in ("loss", "dhidden") if frozen else ("loss", "dhidden", "dweight"):
        assert_right(*(getattr(x, part) for x in (got, same, right)), name=part)
    if got.logp is not None:
        assert_right(got.logp, same.logp, right.logp, name="logp")


def test_batch_is_off_policy_both_ways():
    rows = peers.random_batch((256, 16, 53), torch.float32, CPU).rows()
    ratio = (exact_gradients(rows).logp - rows["old_logprobs"]).exp()
    low = (ratio < 1 - CONFIG.epsilon) & (rows["advantages"] < 0)
    high = (ratio > 1 + CONFIG.clip_high) & (rows["advantages"] > 0)
    assert low.any()
    assert high.any()
    assert not (low | high).all()


def test_a_missing_peer_is_named(no_peers):
    assert {"trl", "liger-kernel", "verl", "cut-cross-entropy", "unsloth-zoo"} < PEERS
    for name, package in ((p.name, p.package) for p in peers.PROVIDERS if p.package in PEERS):
        with pytest.raises(Gap, match=f"{package} is not installed: pip install {package}"):
            provider(name).calls()
        assert provider(name).version is None


def test_a_peer_that_does_not_import_is_named_in_one_line(spoiled):
    with pytest.raises(Gap, match="torch .* does not import: RuntimeError: no such symbol"):
        spoiled("broken").calls()


def test_ours_has_no_excuse():
    def fail():
        raise RuntimeError("ours is broken")

    with pytest.raises(RuntimeError, match="ours is broken"):
        provider("grpo-fast torch", load=fail).calls()


def accuracy_row(found: Provider, dtype: torch.dtype = torch.float32) -> dict:
    return accuracy.provider_row(found, accuracy.Truth(TINY, dtype, CPU))


def test_ours_is_as_exact_as_promised():
    """Half-precision inputs cost the log-probs nothing, and the gradients their last rounding."""
    truth = accuracy.Truth((64, 32, 512), torch.bfloat16, CPU)
    row = accuracy.provider_row(provider("grpo-fast torch"), truth)
    floor = accuracy.floor_row(truth)
    assert row["logp"] < 1e-4
    assert row["entropy"] < 1e-4
    for name in ("dhidden", "dweight", "confident_dhidden"):
        assert 1e-3 < floor[name] < 2.5e-3
        assert row[name] < 1.2 * floor[name]
    assert row["ratio_is_1"] is True
    assert row["not_finite"] is False
    eager = accuracy.provider_row(provider("eager half"), truth)
    assert eager["logp"] > 1e-3
    assert eager["confident_dhidden"] > 0.5


@pytest.mark.parametrize(
    "name, change, expected",
    [
        ("logp", lambda own: own._replace(logp=own.logp + 0.25), 0.25),
        ("entropy", lambda own: own._replace(entropy=own.entropy - 0.125), 0.125),
    ],
)
def test_accuracy_sees_an_error(name, change, expected):
    right = peers.eager(None, torch.float32)

    def logprobs(*rows, entropy):
        return change(right.logprobs(*rows, entropy=entropy))

    row = accuracy_row(provider("eager", load=lambda: Calls(logprobs, right.loss)))
    assert row[name] == pytest.approx(expected, rel=1e-3)
    assert row["ratio_is_1"] is (name == "entropy")


def test_accuracy_sees_wrong_gradients_and_nan():
    def loss(factor: float, batch) -> Loss:
        out = peers.eager(None, torch.float32).loss(batch)
        # The confident batches alone: their targets are all but certain.
        certain = out.logp.min() > -1e-6
        return out._replace(loss=out.loss * (math.nan if certain and factor == 1 else factor))

    def row(factor: float) -> dict:
        return accuracy_row(
            provider("Liger", package="torch", load=lambda: Calls(None, partial(loss, factor)))
        )

    doubled = row(1.5)
    assert doubled["dhidden"] == pytest.approx(0.5, rel=1e-3)
    assert doubled["dweight"] == pytest.approx(0.5, rel=1e-3)
    assert (doubled["ratio_is_1"], doubled["not_finite"]) == (None, False)
    spoiled = row(1.0)
    assert spoiled["dhidden"] < 1e-4
    assert spoiled["not_finite"] is True
    json.loads(json.dumps(finite([spoiled]), allow_nan=False))


def test_a_loss_alone_shows_its_log_prob_error():
    """What is read off the loss is what the log-probs themselves would have said."""
    truth = accuracy.Truth(TINY, torch.bfloat16, CPU)
    eager, rows = peers.eager(None, torch.float32), truth.batch.rows()
    some = checked_rows(len(rows["targets"]), CPU)
    logp = eager.logprobs(rows["hidden"], rows["weight"], rows["targets"], entropy=False).logp
    direct = float((logp - truth.exact.logp)[some].abs().max())
    assert direct > 1e-3
    assert accuracy.logp_error_of_loss(eager, truth) == pytest.approx(direct, rel=1e-2)


def test_a_peer_that_fails_is_a_gap_of_the_table(spoiled):
    row = accuracy_row(spoiled("failing"))
    assert row["gap"].startswith("fails: AttributeError: ")
    assert row["logp"] is None
    line = accuracy.accuracy_table([row])[-1]
    assert line == f"failing: {row['gap']}"


def test_interpreted_kernels_stay_small():
    found = provider("grpo-fast triton")
    truth = accuracy.Truth(TINY, torch.float32, CPU)
    assert accuracy.provider_row(found, truth)["gap"] is None
    truth.batch = truth.batch._replace(weight=torch.empty(accuracy.INTERPRETED_LOGITS, 0))
    assert "take a smaller --shape" in accuracy.provider_row(found, truth)["gap"]


def test_accuracy_command_prints_the_table_and_writes_json(no_peers, capsys, tmp_path):
    path = tmp_path / "accuracy.json"
    words = ["--accuracy", "--shape", *map(str, TINY), "--dtype", "bfloat16", "--device", "cpu"]
    assert main.main([*words, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "N=8 D=16 V=53 bfloat16, against float64" in out
    assert "TRL: trl is not installed: pip install trl" in out
    written = json.loads(path.read_text())
    assert set(written) == {"schema", "kind", "about", "rows"}
    assert (written["schema"], written["kind"]) == (record.SCHEMA, "accuracy")
    assert {"date", "commit", "device", "torch"} <= set(written["about"])
    names = [p.name for p in peers.PROVIDERS]
    assert [row["provider"] for row in written["rows"]] == [*names, "float64, rounded"]
    keys = {"N", "D", "V", "dtype", "provider", "version", "computes", "gap", "ratio_is_1"}
    assert all(set(row) == keys | {"not_finite", *accuracy.MEASURES} for row in written["rows"])
    gaps = {row["provider"] for row in written["rows"] if row["gap"]}
    absent = {p.name for p in peers.PROVIDERS if p.package in PEERS}
    assert gaps == absent | {"compiled eager"}


def test_a_wrong_or_missing_provider_gets_no_number(spoiled, monkeypatch, capsys, tmp_path):
    """Each in its own process; those that are right are timed all the same."""
    missing = provider("TRL", package="nobody-has-this")
    faults = map(spoiled, ("wrong", "failing", "dying"))
    asked = (provider("eager"), provider("grpo-fast torch"), missing, *faults)
    monkeypatch.setattr(compare, "PROVIDERS", asked)
    words = ["--shape", *map(str, TINY), "--dtype", "float32", "--head", "trained"]
    words += ["--device", "cpu", "--rounds", "3", "--seconds", "0", "--threads", "1"]
    path = tmp_path / "peers.json"
    assert compare.main([*words, "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert set(written) == {"schema", "kind", "about", "rows"}
    assert {"load_before", "load_after", "threads"} <= set(written["about"])
    rows = {row["provider"]: row for row in written["rows"]}
    said = {
        "TRL": "nobody-has-this is not installed",
        "wrong": "wrong result, not timed: loss: largest error",
        "dying": "its process ended with exit code 7",
        "failing": "fails: AttributeError",
    }
    out = capsys.readouterr().out
    for name, part in said.items():
        assert part in rows[name]["error"], rows[name]
        assert f"{name}: {rows[name]['error']}" in out
        numbers = ("seconds", "cpu_seconds", "over_eager", "over_ours", "extra_bytes", "rounds")
        assert not any(rows[name][number] for number in (*numbers, "of_floor"))
    for name in ("eager", "grpo-fast torch"):
        assert rows[name]["error"] is None
        assert rows[name]["seconds"] > 0
        assert rows[name]["rounds"] == 3
    assert rows["eager"]["over_eager"] == rows["grpo-fast torch"]["over_ours"] == 1.0
    assert rows["eager"]["over_ours"] > 0
    floor = rows["floor"]
    assert (floor["role"], floor["error"], floor["extra_bytes"]) == ("floor", None, None)
    assert floor["seconds"] > 0
    assert floor["of_floor"] == 1.0
    assert rows["eager"]["of_floor"] == floor["over_eager"] > 0
    assert "floor: the bare matrix products" in out
    keys = {"N", "D", "V", "dtype", "head", "role", "seconds", "of_floor", "extra_bytes"}
    assert all(keys <= set(row) for row in written["rows"])


def test_a_bound_is_held_against_what_it_computes(spoiled, monkeypatch, tmp_path):
    """The gradient of the mean negative log-prob; twice of it is not."""
    right = spoiled("bound", name="mean", bound=True)
    right = Provider(**vars(right) | {"load": partial(right.load, "mean")})
    wrong = Provider(**vars(right) | {"name": "sum", "load": partial(right.load.func, "sum")})
    monkeypatch.setattr(compare, "PROVIDERS", (provider("grpo-fast torch"), right, wrong))
    words = ["--peers", "--shape", *map(str, TINY), "--quick", "--device", "cpu", "--threads", "1"]
    assert main.main([*words, "--json", str(tmp_path / "peers.json")]) == 0
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert {(row["dtype"], row["head"]) for row in rows} == {
        ("bfloat16", "trained"),
        ("float32", "frozen"),
    }
    for row in rows:
        if row["provider"] == "mean":
            assert (row["role"], row["error"]) == ("bound", None)
            assert row["seconds"] > 0
        elif row["provider"] == "sum":
            assert row["error"].startswith("wrong result, not timed: dhidden: largest error")
            assert row["seconds"] is None
        else:
            assert row["error"] is None


def test_quick_names_those_who_compile(monkeypatch, capsys):
    words = ["--quick", "--device", "cpu", "--threads", "1", "--dtype", "float32"]
    words += ["--only", "grpo-fast torch", "--only", "compiled eager", "--head", "trained"]
    assert compare.main(words) == 0
    out = capsys.readouterr().out
    assert "compiled eager: left out by --quick" in out
    assert "N=32 D=64 V=2048 float32, head trained" in out


@pytest.mark.parametrize("rows_at_a_time", [8192, 5])
@pytest.mark.parametrize("head, products", [("trained", 3), ("frozen", 2)])
def test_floor_is_the_bare_products(head, products, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(matches, "FLOOR_ROWS", rows_at_a_time)
    column = Match(shape=TINY, dtype=torch.float32, head=head, device=CPU).floor()
    done, mm = [], torch.mm

    def counted(a, b, out):
        done.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    column(0)
    assert sum(done) == products * 2 * math.prod(TINY)


class Fake:
    """A worker whose calls take what they are told to."""

    def __init__(self, name: str, walls: list[float], order: list[str]):
        self.provider = provider("eager", name=name)
        self.walls, self.order = iter(walls), order

    def ask(self, method: str):
        assert method == "time"
        self.order.append(self.provider.name)
        return Call(next(self.walls), 1.0, 5)


def test_providers_take_turns_and_ratios_are_of_a_round():
    """A machine that is twice as slow in one round changes no ratio."""
    order: list[str] = []
    slow = [1.0, 2.0, 1.0]
    workers = [
        Fake(name, [factor * wall for wall in slow], order)
        for name, factor in (("ours", 3.0), ("eager", 2.0), ("eager half", 8.0), ("floor", 1.5))
    ]
    times, lost = compare.rounds_of(workers, least=3, seconds=0.0)
    assert lost == {}
    names = [worker.provider.name for worker in workers]
    assert order == [*names, *names[1:], *names[:1], *names[2:], *names[:2]]
    match = Match(shape=TINY, dtype=torch.float32, head="trained", device=CPU)
    row = compare.row(match, workers[0].provider, None, times, "ours")
    assert (row["over_eager"], row["over_ours"], row["fastest_eager"]) == (1.5, 1.0, "eager")
    assert (row["of_floor"], row["role"]) == (0.5, "loss")
    assert row["seconds"] == statistics.median(3 * wall for wall in slow)
    assert (row["cpu_seconds"], row["extra_bytes"], row["rounds"]) == (1.0, 5, 3)


def test_meter_sees_memory_that_is_gone_again():
    kept = torch.ones(2**22)
    meter = Meter(CPU)
    torch.ones(2**24).sum()
    later = torch.ones(2**20)
    # The kernel counts pages in batches.
    assert 2**26 - 2**22 <= meter.bytes() < 2**26 + 2**24
    del kept, later


@pytest.mark.parametrize(
    "words, part",
    [
        (["--accuracy", "--shape", "6", "16", "53"], "tokens a multiple of 4"),
        (["--accuracy", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--peers", "--shape", "8", "0", "53"], "sizes from 1"),
        (["--peers", "--rounds", "1"], "--rounds from 2"),
        (
            ["--peers", "--only", "grpo-fast triton", "--device", "cpu"],
            "on cpu there are grpo",
        ),
        (["--peers", "--model", "tiny"], "--model and --tokens go together"),
        (["--peers", "--logits", "--head", "frozen"], "unrecognized arguments: --head frozen"),
        (["--peers", "--logits", "--shape", "6", "53"], "tokens a multiple of 4"),
    ],
)
def test_wrong_option_is_one_line_and_exit_2(words, part, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert part in error
    assert len(error.splitlines()) == 1


def test_results_name_the_kind_of_machine_only():
    from grpo_bench.timing import header

    about = header(CPU, record.ROOT)
    assert about["device"].endswith(f", {os.cpu_count()} cores")
    assert not any(os.uname().nodename in str(value) for value in about.values())


@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_eager_in_pieces_is_eager(head, monkeypatch):
    """The measure of an error at a million tokens is what it is at a few."""
    match = Match(shape=(40, 16, 53), dtype=torch.float32, head=head, device=CPU)
    batch, (calls,) = match.batch(), match.eagers()
    whole = match.run(calls, batch)
    monkeypatch.setattr(matches, "EAGER_ROWS", 12)
    for name, part, all_of_it in zip(
        whole._fields, match.run_in_pieces(calls, batch), whole, strict=True
    ):
        if all_of_it is None:
            assert part is None
        else:
            torch.testing.assert_close(part, all_of_it, msg=name)
