"""Integrations need their hosts, which `make test` brings; without them these tests are
deselected."""

from pathlib import Path

from grpo_bench.hosts import PEERS

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    if PEERS.is_dir():
        return
    deselected = [item for item in items if HERE in item.path.parents]
    items[:] = [item for item in items if HERE not in item.path.parents]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
