"""`grpo-fast parity`: what it prints, and its three exit codes."""

import importlib.metadata
import re

import pytest

from grpo_bench import hosts, parity
from grpo_fast.cli import main

needs_hosts = pytest.mark.skipif(
    not hosts.PEERS.is_dir(), reason="TRL, Liger and verl are not installed: make test brings them"
)
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")


@needs_hosts
@pytest.mark.parametrize("host", parity.PACKAGES)
def test_it_is_safe_to_switch(host, capsys):
    assert main(["parity", "--host", host]) == 0
    text = capsys.readouterr().out
    for words in ("loss", "gradient of hidden", "gradient of head", "metric ", "MiB", "safe to s"):
        assert words in text
    assert ("log-probs" in text) == (host != "liger")
    assert len(re.findall(r"\d\.\d{3} s, memory", text)) == 2


@needs_hosts
def test_a_difference_is_not_safe_and_is_named(capsys, monkeypatch):
    right = parity.linear_grpo_loss

    def wrong(*arguments, **keywords):
        output = right(*arguments, **keywords)
        tokens = output.tokens
        output = output._replace(loss=output.loss * 1.001)
        output.tokens = tokens
        return output

    monkeypatch.setattr(parity, "linear_grpo_loss", wrong)
    assert main(["parity", "--host", "trl"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("not safe to switch: loss, gradient of hidden, gradient of head differ")


def test_a_missing_host_is_one_line_that_says_how_to_get_it(capsys, monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert main(["parity", "--host", "liger"]) == 2
    error = capsys.readouterr().err
    assert error == "error: liger-kernel is not installed: pip install liger-kernel\n"


def test_a_host_of_another_shape_is_one_line(capsys, monkeypatch):
    def changed():
        raise AttributeError("no FusedLinearForPPO")

    monkeypatch.setitem(parity.SIDES, "verl", changed)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.12.0")
    assert main(["parity", "--host", "verl"]) == 2
    assert "verl 0.12.0 is not as this was written for" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--host", "nemo"]], ids=str)
def test_a_wrong_option_ends_with_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["parity", *words])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
