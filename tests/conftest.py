"""CI draws the same examples every time: a failure there is the change's own. Elsewhere they differ from run to run."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from qpalette.core.cache import CACHE, private_folder

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads what an earlier run has left, but for compiled kernels: each is named after all that makes it."""
    kernels, cache = private_folder("kernels"), tmp_path_factory.mktemp("cache")
    (cache / "kernels").symlink_to(kernels, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(cache))
        yield
