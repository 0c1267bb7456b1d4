"""The hosts come with `make test`; without them, tests that hold us against one are deselected."""

import sys
from pathlib import Path

import pytest
import torch

from grpo_bench.hosts import PEERS
from grpo_fast.tiny import save_tiny

# Of whole files; those of other files are marked.
NEEDED = {"test_trl_releases.py": Path(sys.prefix) / "trl19"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_tiny(path)
    return path


def pytest_collection_modifyitems(config, items):
    def lacks_host(item) -> bool:
        folder = PEERS if item.get_closest_marker("host") else NEEDED.get(item.path.name)
        return folder is not None and not folder.is_dir()

    gone = [item for item in items if lacks_host(item)]
    items[:] = [item for item in items if item not in gone]
    if gone:
        config.hook.pytest_deselected(items=gone)
