"""CI draws the same examples every time: a failure there is the change's own. Elsewhere they differ from run to run.

Compiled code is found by content: all tests, workers and subprocesses share what lies in the user's own cache, whatever
QPALETTE_CACHE a test sets.

Products on the processor are in float32, so that they can be held to its rounding; `backend/test_cpu_bytes.py` has
those that a user gets.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from qpalette.core.cache import CACHE, COMPILE_CACHE, compile_cache_directory
from qpalette.core.environment import CPU_BYTES

os.environ[COMPILE_CACHE] = str(compile_cache_directory())
os.environ[CPU_BYTES] = "0"

# A machine that is busy with something else is no failure: nothing is timed.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("here")
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads what an earlier run has left, but for compiled code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For thousands of tiny products: threads that wait for each other take most of the time on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
