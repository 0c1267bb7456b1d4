"""`pytest bench/bench_<op>.py`: every size of the file on the device at hand, every column."""

import pytest

from .timing import one_thread, pick_device


@pytest.fixture(scope="session")
def device():
    found = pick_device("auto")
    if found.type == "cuda":
        yield found
    else:
        with one_thread():
            yield found


def pytest_generate_tests(metafunc):
    if "size" in metafunc.fixturenames:
        sizes = metafunc.module.SIZES[pick_device("auto").type]
        metafunc.parametrize("size", sizes, ids=str)
        metafunc.parametrize("column", ["ours", "eager", "ceiling"])
