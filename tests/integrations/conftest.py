"""The hosts come with `make test`; without them, tests that hold us against one are deselected."""

import sys
from pathlib import Path

from grpo_bench.hosts import PEERS

# Of whole files; those of other files are marked.
NEEDED = {"test_trl.py": PEERS, "test_trl_releases.py": Path(sys.prefix) / "trl19"}


def pytest_collection_modifyitems(config, items):
    def lacks_host(item) -> bool:
        folder = PEERS if item.get_closest_marker("host") else NEEDED.get(item.path.name)
        return folder is not None and not folder.is_dir()

    gone = [item for item in items if lacks_host(item)]
    items[:] = [item for item in items if item not in gone]
    if gone:
        config.hook.pytest_deselected(items=gone)
