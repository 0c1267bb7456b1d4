"""Beside the peers from logits: everybody is right, in-place gradients spoil nobody's inputs, and
the sweep is one flat file. Peers that are not installed are skipped here and named there."""

import importlib.metadata
import json
import shutil

import pytest
import torch

from grpo_bench import compare, logits_peers, main, matches, record
from grpo_bench.logits_peers import LOGITS_PROVIDERS, LogitsCalls
from grpo_bench.matches import LogitsMatch
from grpo_bench.provider import CONFIG, Gap, Provider
from grpo_bench.timing import assert_right, checked_rows

CPU = torch.device("cpu")
TINY = (8, 53)
DTYPES = [torch.float32, torch.bfloat16]
NAMES = [p.name for p in LOGITS_PROVIDERS]
IN_PLACE = {"grpo-fast torch, in place", "grpo-fast triton, in place", "Liger"}
WRONG = """
from grpo_bench import logits_peers


def wrong():
    right = logits_peers.eager()

    def gradients(batch):
        found = right.gradients(batch)
        return found._replace(dlogits=found.dlogits * 1.05)

    return right._replace(gradients=gradients)
"""


def match_of(dtype: torch.dtype, shape: tuple[int, int] = TINY) -> LogitsMatch:
    return LogitsMatch(shape=shape, dtype=dtype, device=CPU)


def calls_of(name: str) -> LogitsCalls:
    (provider,) = (p for p in LOGITS_PROVIDERS if p.name == name)
    if "cpu" in provider.compiled_on and not shutil.which("g++"):
        pytest.skip("inductor compiles with g++")
    try:
        return provider.calls()
    except Gap as gap:
        pytest.skip(str(gap))


def check(match: LogitsMatch, found, batch) -> None:
    truth = match.truth()
    for name, part in match.compared(found, batch).items():
        assert_right(part, truth["eager"][name], truth["exact"][name], name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_everybody_computes_the_oracle_s_loss_again_and_again(name, dtype):
    """The kernels in Triton's interpreter. A call that spoils its logits spoils a copy of them."""
    calls, match = calls_of(name), match_of(dtype)
    batch = match.batch()
    for _ in range(2):
        ready = match.ready(calls, batch)
        found = match.run(calls, ready)
        assert (found.dlogits.data_ptr() == ready.logits.data_ptr()) == (name in IN_PLACE)
        assert found.dlogits.shape == batch.logits.shape
        check(match, found, batch)
    assert torch.equal(batch.logits, match.batch().logits)


def test_exact_gradient_is_the_derivative_of_the_exact_loss():
    """So the oracle's pieces are put together right, over more than one chunk of rows."""
    match = match_of(torch.float32, (matches.CHUNK + 8, 7))
    batch = match.batch()
    leaf = batch.logits.double().requires_grad_()
    logp = leaf.log_softmax(-1).gather(2, batch.targets[..., None])[..., 0]
    ratio = (logp - batch.old_logprobs).exp()
    clipped = ratio.clamp(1 - CONFIG.epsilon, 1 + CONFIG.clip_high)
    advantages = batch.advantages[:, None].double()
    loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    (dlogits,) = torch.autograd.grad(loss, leaf)
    rows, exact = dlogits.flatten(0, 1), match.exact(batch)
    torch.testing.assert_close(exact["loss"], loss.detach())
    torch.testing.assert_close(exact["logp"], logp.detach().flatten())
    torch.testing.assert_close(exact["dlogits norm"], rows.norm(dim=-1))
    torch.testing.assert_close(exact["dlogits"], rows[checked_rows(len(rows), CPU)])
    low, high = ratio < 1 - CONFIG.epsilon, ratio > 1 + CONFIG.clip_high
    assert (low & (advantages < 0)).any()
    assert (high & (advantages > 0)).any()


@pytest.mark.parametrize("name", ["eager", "eager logsumexp"])
def test_each_eager_form_is_right_where_the_other_is_better(name):
    match, calls = match_of(torch.float32, (128, 32768)), calls_of(name)
    batch = match.batch()
    check(match, match.run(calls, match.ready(calls, batch)), batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_error_in_any_row_is_seen(dtype):
    """Also in one whose gradient is not compared entry by entry."""
    match = match_of(dtype, (200, 31))
    batch, calls = match.batch(), logits_peers.eager()
    found = match.run(calls, match.ready(calls, batch))
    check(match, found, batch)
    norms = found.dlogits.float().norm(dim=-1).flatten()
    norms[checked_rows(200, CPU)] = 0
    row = int(norms.argmax())
    found.dlogits.view(200, 31)[row] *= 1.05
    with pytest.raises(AssertionError, match="dlogits norm"):
        check(match, found, batch)


def test_floor_reads_and_writes_the_logits_once(monkeypatch):
    asked = []
    monkeypatch.setattr(matches, "copy_ceiling", lambda *given: asked.append(given))
    match_of(torch.bfloat16).floor()
    assert asked == [(2 * 8 * 53 * 2, CPU)]


def test_missing_peers_are_named(monkeypatch):
    ours = {"grpo-fast": "1", "torch": "1"}

    def version(name: str) -> str:
        if name not in ours:
            raise importlib.metadata.PackageNotFoundError(name)
        return ours[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    gaps = {}
    for provider in LOGITS_PROVIDERS:
        if provider.package not in ours:
            with pytest.raises(Gap) as gap:
                provider.calls()
            gaps[provider.name] = str(gap.value)
    assert set(gaps) == {"TRL", "Liger", "flash-attn", "QuACK", "Fast-LLM"}
    assert gaps["TRL"] == "trl is not installed: pip install trl"
    assert gaps["Fast-LLM"].startswith("fast-llm is not installed: from git alone")


def test_command_sweeps_into_one_flat_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "wrong_logits.py").write_text(WRONG)
    monkeypatch.syspath_prepend(str(tmp_path))
    import wrong_logits

    wrong = Provider(name="wrong", computes="-", load=wrong_logits.wrong, package="torch")
    asked = ("grpo-fast torch", "grpo-fast torch, in place", "eager", "compiled eager")
    providers = tuple(p for p in LOGITS_PROVIDERS if p.name in asked)
    monkeypatch.setattr(compare, "LOGITS_PROVIDERS", (*providers, wrong))
    path = tmp_path / "logits.json"
    words = ["--peers", "--logits", "--quick", "--shape", "8", "53", "--shape", "16", "53"]
    words += ["--model", "tiny", "--tokens", "4", "12", "--device", "cpu", "--threads", "1"]
    assert main.main([*words, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    written = json.loads(path.read_text())
    assert (written["kind"], written["schema"]) == ("peers", record.SCHEMA)
    shapes = [(8, 53), (16, 53), (4, 64), (12, 64)]
    for dtype in ("bfloat16", "float32"):
        for n, v in shapes:
            rows = {
                row["provider"]: row
                for row in written["rows"]
                if (row["N"], row["V"], row["dtype"]) == (n, v, dtype)
            }
            assert set(rows) == {*asked, "wrong", "floor"}
            assert all((row["D"], row["head"]) == (None, None) for row in rows.values())
            assert rows["compiled eager"]["error"].startswith("left out by --quick")
            assert "wrong result, not timed: dlogits" in rows["wrong"]["error"]
            for name in ("wrong", "compiled eager"):
                assert rows[name]["seconds"] is rows[name]["of_floor"] is None
            for name in ("grpo-fast torch", "grpo-fast torch, in place", "eager", "floor"):
                assert rows[name]["error"] is None
                assert rows[name]["of_floor"] > 0
            assert rows["floor"]["role"] == "floor"
    assert len(written["rows"]) == 2 * len(shapes) * 6
    assert "floor: a copy of the logits" in out
