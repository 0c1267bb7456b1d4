"""tokens/ of a run folder: what is written comes back, stays within its budget, survives a kill,
and what cannot be read is refused in one sentence."""

import json
import math
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from grpo_fast import token_log
from grpo_fast.errors import InputError
from grpo_fast.token_log import (
    TokenLog,
    read_token_step,
    read_token_steps,
    read_vocabulary,
    truncate_tokens,
)


def made(tokens: int = 40, seed: int = 0) -> tuple[dict, dict]:
    """(meta, columns) of a step of one group and two completions."""
    random = np.random.default_rng(seed)
    arrays = {
        "token_ids": random.integers(3, 50, tokens),
        "logprobs": -random.exponential(size=tokens),
        "entropy": random.exponential(size=tokens),
        "ratio": np.ones(tokens),
        "gradient_mass": random.exponential(size=tokens),
        "mask": np.ones(tokens, bool),
        "kl": random.exponential(size=tokens),
    }
    arrays["logprobs"][: tokens // 2] = np.nan
    halves = [(0, tokens // 2), (tokens // 2, tokens)]
    completions = [{"index": k, "start": a, "stop": b} for k, (a, b) in enumerate(halves)]
    group = {"index": 0, "prompt_ids": [60], "rewards": [math.nan, 1.0], "completions": completions}
    push = {"up": [[70, 1.0]], "down": [], "eos": math.inf}
    return {"kept": "1 of 1 groups: best", "push": push, "groups": [group]}, arrays


def text(token: int) -> str:
    return f"<{token}>"


def write(log: TokenLog, step: int, tokens: int = 40, seed: int = 0) -> bool:
    return log.due(step) and log.write(step, *made(tokens, seed), text)


def test_a_step_comes_back(tmp_path):
    log = TokenLog(tmp_path, budget_mb=1, max_steps=3)
    assert write(log, 1)
    meta, arrays = made()
    step = read_token_step(tmp_path, 1)
    for name, values in arrays.items():
        assert np.array_equal(step.arrays[name], values.astype(step.arrays[name].dtype), True), name
    assert step.arrays["entropy"].dtype == np.float16
    assert step.arrays["token_ids"].dtype == np.int32
    assert step.meta["groups"][0]["rewards"] == [None, 1.0]
    assert step.meta["push"]["eos"] is None
    assert (step.meta["schema"], step.meta["step"]) == (1, 1)
    assert step.meta["kept"] == "1 of 1 groups: best; every step so far"
    assert meta["kept"] == "1 of 1 groups: best"
    ids = {*arrays["token_ids"].tolist(), 60, 70}
    assert read_vocabulary(tmp_path) == {i: text(i) for i in sorted(ids)}


def test_anybody_s_numpy_reads_it_without_pickle(tmp_path):
    write(TokenLog(tmp_path, budget_mb=1, max_steps=3), 1)
    with np.load(tmp_path / "tokens/step-000001.npz", allow_pickle=False) as file:
        assert json.loads(str(file["meta"]))["step"] == 1
        assert file["logprobs"].shape == (40,)


def test_the_same_step_is_the_same_bytes(tmp_path):
    for name in "ab":
        write(TokenLog(tmp_path / name, budget_mb=1, max_steps=3), 1)
    files = [tmp_path / f"{name}/tokens/step-000001.npz" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("budget_mb", [0.002, 0.03, 0.06, 0.5])
def test_the_budget_is_never_exceeded_and_spread_over_the_run(tmp_path, budget_mb):
    log = TokenLog(tmp_path, budget_mb=budget_mb, max_steps=50)
    sizes = np.random.default_rng(0).integers(20, 200, 51)
    for step in range(1, 51):
        write(log, step, int(sizes[step]), seed=step)
        on_disk = sum(file.stat().st_size for file in (tmp_path / "tokens").iterdir())
        assert on_disk == log.spent <= budget_mb * 1e6
    steps = read_token_steps(tmp_path)
    if budget_mb == 0.002:
        assert steps == []
    elif budget_mb == 0.5:
        assert steps == list(range(1, 51))
    else:
        assert steps[0] == 1
        assert steps[-1] == 50, "the last step's room was not kept"
        # Neither all in the beginning nor all at the end.
        assert min(sum(step <= 25 for step in steps), sum(step > 25 for step in steps)) >= 2
        kept = read_token_step(tmp_path, 50).meta["kept"]
        assert kept.endswith(f"{len(steps)} of 50 steps so far, for {budget_mb:g} MB")


@pytest.mark.parametrize("budget_mb", [0.002, 0.03, 0.5])
def test_the_background_writes_the_same_bytes(tmp_path, budget_mb):
    """The same steps are due too: a step that is being written counts before the next is asked."""
    sizes = np.random.default_rng(0).integers(20, 200, 51)
    found = {}
    for background in (False, True):
        folder = tmp_path / str(background)
        log = TokenLog(folder, budget_mb=budget_mb, max_steps=50, background=background)
        for step in range(1, 51):
            write(log, step, int(sizes[step]), seed=step)
        found[background] = {f.name: f.read_bytes() for f in (folder / "tokens").iterdir()}
        assert log.spent == sum(map(len, found[background].values())) <= budget_mb * 1e6
        log.close()
    assert found[True] == found[False]
    assert found[True] or budget_mb == 0.002


def test_one_step_is_written_at_a_time(tmp_path, monkeypatch):
    """What waits is one step: a second one does not pile up behind it."""
    go, written, encode = threading.Semaphore(0), [], token_log._encode

    def held(*of):
        assert go.acquire(timeout=20)
        written.append(threading.current_thread().name)
        return encode(*of)

    monkeypatch.setattr(token_log, "_encode", held)
    log = TokenLog(tmp_path, budget_mb=1, max_steps=9, background=True)
    assert write(log, 1)
    assert written == []
    assert (log.steps, log.spent) == (0, 0), "only what is on disk counts"
    go.release()
    assert write(log, 2)
    assert len(written) == 1
    assert log.steps == 1
    go.release()
    log.close()
    assert log.steps == 2
    assert read_token_steps(tmp_path) == [1, 2]
    assert all(name.startswith("token-log") for name in written)
    assert not any(t.name.startswith("token-log") for t in threading.enumerate())


@pytest.mark.parametrize(
    "then",
    [
        lambda log: log.due(3),
        lambda log: log.write(3, *made(), text),
        lambda log: log.flush(),
        lambda log: log.close(),
    ],
    ids=["due", "write", "flush", "close"],
)
def test_an_error_of_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch, then):
    log = TokenLog(tmp_path, budget_mb=1, max_steps=9, background=True)
    write(log, 1)
    log.flush()
    before = log.steps, log.spent
    real = Path.write_bytes

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert write(log, 2)
    with pytest.raises(OSError, match=r"No space left on device.*step-000002"):
        then(log)
    monkeypatch.setattr(Path, "write_bytes", real)
    assert (log.steps, log.spent) == before
    assert read_token_steps(tmp_path) == [1]
    log.close()


def test_an_error_of_the_last_step_is_raised_at_once(tmp_path, monkeypatch):
    log = TokenLog(tmp_path, budget_mb=1, max_steps=1, background=True)
    monkeypatch.setattr(token_log, "_encode", lambda *of: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(log, 1)
    log.close()


def test_a_resumed_log_goes_on_where_it_was(tmp_path):
    def run(folder: Path, stop: int | None) -> dict[str, bytes]:
        log = TokenLog(folder, budget_mb=0.03, max_steps=30)
        for step in range(1, 31):
            if step == stop:
                truncate_tokens(folder, step - 3)
                log = TokenLog(folder, budget_mb=0.03, max_steps=30)
                for again in range(step - 2, step):
                    write(log, again, 100, again)
            write(log, step, 100, step)
        return {f.name: f.read_bytes() for f in (folder / "tokens").iterdir()}

    whole = run(tmp_path / "whole", None)
    assert 5 < len(whole) < 30
    assert run(tmp_path / "resumed", 12) == whole


def test_truncating_removes_later_steps_only(tmp_path):
    log = TokenLog(tmp_path, budget_mb=1, max_steps=9)
    for step in (1, 2, 3, 4):
        write(log, step)
    truncate_tokens(tmp_path, 2)
    assert read_token_steps(tmp_path) == [1, 2]
    truncate_tokens(tmp_path, -1)
    assert read_token_steps(tmp_path) == []


KILLED = """
import os, pathlib, sys, types
package = types.ModuleType("grpo_fast"); package.__path__ = [sys.argv[1]]
sys.modules["grpo_fast"] = package
sys.path.insert(0, sys.argv[2])
import test_token_log as t
background = sys.argv[4] == "background"
log = t.TokenLog(sys.argv[3], budget_mb=10**7, max_steps=10**6, background=background)
real = pathlib.Path.write_bytes

def half(path, data):
    fourth = "000004" in path.name
    real(path, data[: len(data) // 2] if fourth else data)
    if fourth:
        print("half", flush=True)
        os.kill(os.getpid(), 9)

pathlib.Path.write_bytes = half
for step in range(1, 10**6):
    t.write(log, step, 2000, seed=step)
    print(step, flush=True)
"""


@pytest.mark.parametrize("where", ["foreground", "background"])
@pytest.mark.parametrize("lines", [2, 3, 1000])
def test_a_kill_leaves_whole_steps(tmp_path, lines, where):
    """Some time after a step, and in the middle of writing one."""
    import grpo_fast

    here = [str(Path(grpo_fast.__file__).parent), str(Path(__file__).parent)]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *here, str(tmp_path), where],
        stdout=subprocess.PIPE,
        text=True,
    )
    said = [line for line, _ in zip(process.stdout, range(lines), strict=False)]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    steps = read_token_steps(tmp_path)
    if lines == 1000:
        # In the background the fourth may have been taken by then.
        assert [word for word in said if word != "4\n"] == ["1\n", "2\n", "3\n", "half\n"]
        assert steps == [1, 2, 3]
    assert len(steps) >= min(lines, 3) - (where == "background")
    vocabulary = read_vocabulary(tmp_path)
    for step in steps:
        found = read_token_step(tmp_path, step)
        assert len(found.arrays["mask"]) == 2000
        assert set(found.arrays["token_ids"].tolist()) <= vocabulary.keys()


def test_what_a_killed_run_left_is_cleaned_up(tmp_path):
    log = TokenLog(tmp_path, budget_mb=1, max_steps=9)
    write(log, 1, 4)
    folder = tmp_path / "tokens"
    (folder / ".step-000002.npz.writing").write_bytes(b"half")
    with (folder / "vocabulary.jsonl").open("ab") as file:
        file.write(b'{"id": 99, "te')
    assert read_token_steps(tmp_path) == [1]
    before = read_vocabulary(tmp_path)
    assert 99 not in before
    log = TokenLog(tmp_path, budget_mb=1, max_steps=9)
    assert not (folder / ".step-000002.npz.writing").exists()
    assert write(log, 2)
    assert read_vocabulary(tmp_path).items() > before.items()


def test_a_run_without_tokens_has_none(tmp_path):
    assert read_token_steps(tmp_path) == []
    assert read_vocabulary(tmp_path) == {}
    with pytest.raises(InputError, match=r"step-000003\.npz not found.*none is kept"):
        read_token_step(tmp_path, 3)


def resaved(tmp_path, change) -> Path:
    """A whole step, changed and saved again as numpy does."""
    write(TokenLog(tmp_path, budget_mb=1, max_steps=9), 1)
    path = tmp_path / "tokens/step-000001.npz"
    step = read_token_step(tmp_path, 1)
    values = {"meta": step.meta, **step.arrays}
    change(values)
    np.savez_compressed(path, **values | {"meta": np.array(json.dumps(values["meta"]))})
    return path


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda v: v["meta"].update(schema=7), "has schema 7, this version reads 1: pip install"),
        (lambda v: v["meta"].pop("schema"), "has schema None, this version reads 1"),
        (lambda v: v.update(meta=[1]), "has schema None"),
        (lambda v: v.pop("ratio"), "has no ratio"),
        (lambda v: v["meta"].pop("groups"), "has no groups"),
        (lambda v: v.update(ratio=np.ones(3)), "is damaged"),
        (lambda v: v["meta"]["groups"][0]["completions"][1].update(stop=99), "is damaged"),
        (lambda v: v["meta"].update(groups="x"), "is damaged"),
    ],
)
def test_a_step_that_cannot_be_read_is_named(tmp_path, change, said):
    path = resaved(tmp_path, change)
    with pytest.raises(InputError) as error:
        read_token_step(tmp_path, 1)
    assert str(path) in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no zip", b"cut", b"object"])
def test_a_damaged_file_is_named(tmp_path, content):
    write(TokenLog(tmp_path, budget_mb=1, max_steps=9), 1)
    path = tmp_path / "tokens/step-000001.npz"
    if content == b"cut":
        content = path.read_bytes()[:-60]
    if content == b"object":
        np.savez(path, meta=np.array({"schema": 1}, dtype=object))
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"step-000001\.npz is damaged"):
        read_token_step(tmp_path, 1)


def test_a_broken_line_of_the_vocabulary_is_named(tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/vocabulary.jsonl").write_text('{"id": 1, "text": "a"}\n[]\n')
    with pytest.raises(InputError, match=r"vocabulary\.jsonl:2: expected"):
        read_vocabulary(tmp_path)


def test_hostile_text_is_text(tmp_path):
    meta, arrays = made()
    words = "</script>\x00 \u202e lone \ud800 数 \u2028"
    meta["groups"][0]["prompt"] = words
    TokenLog(tmp_path, budget_mb=1, max_steps=9).write(1, meta, arrays, lambda token: words)
    assert read_token_step(tmp_path, 1).meta["groups"][0]["prompt"] == words
    assert set(read_vocabulary(tmp_path).values()) == {words}


def test_a_step_of_100_000_tokens(tmp_path):
    assert write(TokenLog(tmp_path, budget_mb=32, max_steps=9), 1, 100_000)
    assert len(read_token_step(tmp_path, 1).arrays["mask"]) == 100_000


def test_ten_thousand_steps(tmp_path):
    log = TokenLog(tmp_path, budget_mb=2, max_steps=10_000)
    for step in range(1, 10_001):
        write(log, step, 40, step)
    steps = read_token_steps(tmp_path)
    assert 500 < len(steps) < 2_000
    assert steps == sorted(steps)
    assert log.spent <= 2e6
