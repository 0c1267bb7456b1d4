"""The hosts come with `make test`; without them, tests that hold us against one are deselected."""

from grpo_bench.hosts import PEERS


def pytest_collection_modifyitems(config, items):
    if PEERS.is_dir():
        return
    gone = [item for item in items if item.get_closest_marker("host")]
    items[:] = [item for item in items if not item.get_closest_marker("host")]
    if gone:
        config.hook.pytest_deselected(items=gone)
