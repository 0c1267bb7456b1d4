"""The releases of TRL that the drop-in takes, and what it says of others."""

import re
import sys

import pytest
from trl_training import MARKS, drop_in, host_class

from grpo_bench.hosts import PEERS
from grpo_fast.errors import ConfigError

pytestmark = MARKS


@pytest.mark.parametrize("version", ["1.8.2", "1.17.0", "2.0.0", "0.29.1"])
def test_other_versions_of_trl_are_refused(monkeypatch, version):
    import trl

    from grpo_fast.integrations.trl_versions import host

    monkeypatch.setattr(trl, "__version__", version)
    words = f"trl is {version}, grpo_fast.integrations.trl is written for trl >= 1.9, < 1.17"
    with pytest.raises(ConfigError, match=re.escape(words)):
        host()


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    from grpo_fast.integrations.trl_versions import host

    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'trl>=1.9,<1.17'")):
        host()


def test_the_host_is_the_installed_one():
    assert issubclass(drop_in(), host_class())
    assert PEERS.is_dir()
