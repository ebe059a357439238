"""Several processes, or a Ray cluster of this host: the bytes of one process, whatever dies on the way."""

import os
import signal
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from test_pipeline_quantize import Q, files_of, run, write_llama

from qpalette.calibration import Calibration, HessianStore
from qpalette.core.errors import CheckpointError, InputError
from qpalette.models import find_groups
from qpalette.pipeline import quantize_checkpoint, workers
from qpalette.pipeline.work import Work
from qpalette.storage import open_checkpoint

SPEC = "tcq-2-L12"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model") / "source")


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("alone") / "out"
    run(source, output, SPEC)
    return files_of(output)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(source, alone, tmp_path, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run(source, tmp_path / "out", SPEC)
    finally:
        torch.set_num_threads(before)
    assert files_of(tmp_path / "out") == alone


def test_two_processes(source, alone, tmp_path):
    calls = []
    run(source, tmp_path / "out", SPEC, workers=2, progress=lambda *call: calls.append(call))
    assert files_of(tmp_path / "out") == alone
    assert calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("sides", [1, 2])
def test_two_processes_with_hessians(source, tmp_path, monkeypatch, sides):
    checkpoint = open_checkpoint(source)
    store = HessianStore(tmp_path / "hessians", Calibration(checkpoint.fingerprint, "cafe", 96, 32, sides))
    generator = torch.Generator().manual_seed(0)

    def moments(size: int) -> torch.Tensor:
        x = torch.randn(4 * size, size, generator=generator)
        return x.T @ x

    for group in find_groups(checkpoint).groups:
        outputs = {linear.name: [moments(linear.out_features)] for linear in group.linears}
        store.save(group, moments(group.in_features), 100, outputs)
    run(source, tmp_path / "one" / "out", "nuq-2", hessians=store)
    monkeypatch.setattr("qpalette.pipeline.work.BATCH_BYTES", 1)  # batches of one
    run(source, tmp_path / "two" / "out", "nuq-2", hessians=store, workers=2)
    assert files_of(tmp_path / "one" / "out") == files_of(tmp_path / "two" / "out")


def test_ray(source, alone, tmp_path):
    pytest.importorskip("ray")
    run(source, tmp_path / "out", SPEC, workers=2, ray="local")
    assert files_of(tmp_path / "out") == alone


def test_ray_tells_what_is_wrong_with_a_weight(tmp_path):
    pytest.importorskip("ray")
    weight = torch.full((64, 64), float("nan"))
    source = write_llama(tmp_path / "source", **{f"{Q}.weight".replace(".", "__"): weight})
    with pytest.raises(CheckpointError, match=f"{Q}.weight' holds NaN"):
        run(source, tmp_path / "out", "nuq-2", ray="local")


def none_runs(**_: object) -> None:
    raise ConnectionError("Could not find any running Ray instance.\nPlease specify the one to connect to")


@pytest.mark.parametrize("address", ["nowhere", "auto"])
def test_a_cluster_that_is_not_there_is_told_before_the_work(source, tmp_path, monkeypatch, address):
    ray, module = pytest.importorskip("ray"), sys.modules[quantize_checkpoint.__module__]
    monkeypatch.setattr(module, "rehearsed_jobs", lambda *given: pytest.fail("the work has begun"))
    if address == "auto":  # finds whatever runs on this machine: clusters of tests beside this one, too
        monkeypatch.setattr(ray, "init", none_runs)
    with pytest.raises(InputError, match=rf"no Ray cluster at '{address}' .*; give its address, or local") as told:
        run(source, tmp_path / "out", "nuq-2", workers=2, ray=address)
    assert "\n" not in str(told.value)


def test_without_ray(source, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install qpalette\[ray\]"):
        run(source, tmp_path / "out", "nuq-2", ray="local")


def die_once(batch):
    """Stands in for a worker that the system kills: the first one to get here ends."""
    mark = Path(os.environ["QPALETTE_TEST_MARK"])
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return workers._encode(batch)
    os.kill(os.getpid(), signal.SIGKILL)


def die(batch):
    os.kill(os.getpid(), signal.SIGKILL)


class Replaced(workers._Pool):
    """A pool that runs something else than `_encode`."""

    task = staticmethod(die)

    def submit(self, function, batch):
        return super().submit(self.task, batch)


def test_a_worker_that_dies_is_replaced(source, alone, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("QPALETTE_TEST_MARK", str(tmp_path / "mark"))
    monkeypatch.setattr(Replaced, "task", staticmethod(die_once))
    monkeypatch.setattr(workers, "_Pool", Replaced)
    run(source, tmp_path / "out", SPEC, workers=2)
    assert "a worker died" in caplog.text
    assert files_of(tmp_path / "out") == alone


def test_workers_that_keep_dying(source, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_Pool", Replaced)
    with pytest.raises(InputError, match=r"3 workers died in a row, with model\.layers.* use fewer workers"):
        run(source, tmp_path / "out", "nuq-2", workers=2)
    assert not (tmp_path / "out").exists()


class Tracked(dict):
    """A result that can be watched."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self, batch) -> None:
        super().__init__(codes=torch.zeros(1), scales=torch.zeros(1), diagonal=torch.zeros(1), quality=batch[0])
        Tracked.alive.add(self)

    def __hash__(self) -> int:
        return id(self)


class Threads(ThreadPoolExecutor):
    """Stands for a pool of processes: done with everything that it was given before it is asked again."""

    def __init__(self, work, workers, device) -> None:
        super().__init__(workers)

    def submit(self, function, batch):
        future = super().submit(lambda: [Tracked(batch)])
        future.exception()
        return future


def test_results_are_dropped_once_they_are_taken(source, monkeypatch):
    """However many batches there are, and however fast the workers."""
    monkeypatch.setattr(workers, "_Pool", Threads)
    batches = [(number,) for number in range(300)]
    most, seen = 0, []
    for batch, (result,) in workers.run_in_processes(None, batches, 3, torch.device("cpu")):
        assert result.quality == batch[0]
        seen.append(batch)
        most = max(most, len(Tracked.alive))
    assert sorted(seen) == batches
    assert 0 < most <= workers.QUEUED * 3


def test_what_a_worker_finds_is_told(tmp_path):
    weight = torch.full((64, 64), float("inf"))
    source = write_llama(tmp_path / "source", **{f"{Q}.weight".replace(".", "__"): weight})
    with pytest.raises(CheckpointError, match=f"{Q}.weight' holds NaN or infinity"):
        run(source, tmp_path / "out", "nuq-2", workers=2)


def test_another_model_on_a_host(source):
    with pytest.raises(CheckpointError, match="holds another model on this host"):
        Work(source, "f00d", None, 0.01, 1).open()


def test_devices_are_shared_out(source, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    shared = [workers.device_of_worker(torch.device("cuda"), index) for index in range(3)]
    assert shared == ["cuda:0", "cuda:1", "cuda:0"]
    assert workers.device_of_worker(torch.device("cuda:1"), 0) == "cuda:1"
    assert workers.device_of_worker(torch.device("cpu"), 5) == "cpu"
    with pytest.raises(InputError, match="workers must be at least 1"):
        run(source, tmp_path / "out", workers=0)
