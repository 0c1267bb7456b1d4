"""The hosts come with `make test`; without them, tests that hold us against one are deselected."""

from grpo_bench.hosts import PEERS


def pytest_collection_modifyitems(config, items):
    if PEERS.is_dir():
        return

    def needs_host(item) -> bool:
        return item.get_closest_marker("host") or item.path.name == "test_trl.py"

    gone = [item for item in items if needs_host(item)]
    items[:] = [item for item in items if not needs_host(item)]
    if gone:
        config.hook.pytest_deselected(items=gone)
