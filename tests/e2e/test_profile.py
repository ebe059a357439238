"""`qpalette profile` with a stopwatch that needs no GPU: what is measured, kept, and read by a plan."""

from __future__ import annotations

import pytest
import torch

from qpalette.backends.cuda import probe
from qpalette.cli import main
from qpalette.core.errors import InputError
from qpalette.plan import LatencyProfile
from qpalette.plan.profile import SHIPPED, shipped_profiles
from qpalette.runtime import device as devices

COMMAND = ("--group", "64x32+16x32", "--group", "32x64", "--batch", "1,8", "--spec", "tcq-3", "--spec", "nuq-2")
LAUNCHES = 4 * 2 * 2  # shapes and the group, specs, batches


class Stopwatch:
    """A second per million weights and token; interrupted before launch number `most`."""

    def __init__(self) -> None:
        self.measured: list = []
        self.most = 10**9

    def __call__(self, parts, batch, device, with_rotation):
        if len(self.measured) == self.most:
            raise KeyboardInterrupt
        self.measured.append((parts, batch))
        return sum(rows * columns for _, rows, columns in parts) * batch / 1e6


@pytest.fixture
def stopwatch(monkeypatch) -> Stopwatch:
    found = Stopwatch()
    monkeypatch.setattr(probe, "launch_seconds", found)
    monkeypatch.setattr(devices, "parse_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return found


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["profile", *map(str, arguments)])
    return exit_.value.code or 0


def test_every_launch_once_with_a_constant_for_each_batch(tmp_path, stopwatch):
    out = tmp_path / "gpu.json"
    assert run(out, *COMMAND, "--constant", "0.5,2") == 0
    profile = LatencyProfile.read(out)
    assert len(profile.launches) == len(stopwatch.measured) == len(set(stopwatch.measured)) == LAUNCHES
    assert (profile.device, profile.batches, profile.constant(1), profile.constant(8)) == ("a GPU", (1, 8), 5e-4, 2e-3)
    fused = profile.seconds([(16, 32), (64, 32)], 8)
    assert fused[""]["tcq-3"] == pytest.approx((64 + 16) * 32 * 8 / 1e6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json"]


def test_an_interrupted_measurement_goes_on(tmp_path, stopwatch, monkeypatch):
    monkeypatch.setattr("qpalette.cli.profile.SAVED_EVERY", 5)
    out, stopwatch.most = tmp_path / "gpu.json", 12
    assert run(out, *COMMAND) != 0
    assert not out.exists()
    stopwatch.most = 10**9
    assert run(out, *COMMAND) == 0
    assert len(stopwatch.measured) == 12 + LAUNCHES - 10  # ten were kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json"]
    assert len(LatencyProfile.read(out).launches) == LAUNCHES


def test_half_a_file_of_an_interrupted_measurement_is_measured_again(tmp_path, stopwatch):
    (tmp_path / "gpu.json.partial").write_text('{"identity": {"device": "a GPU"}, "figu')
    assert run(tmp_path / "gpu.json", *COMMAND) == 0
    assert len(stopwatch.measured) == LAUNCHES


@pytest.mark.parametrize("constant", ["x", "1,2,3", "-1", "nan", ""])
def test_constants_that_mean_nothing(tmp_path, stopwatch, constant, capsys):
    assert run(tmp_path / "gpu.json", *COMMAND, f"--constant={constant}") != 0
    assert "--constant" in capsys.readouterr().err
    assert not stopwatch.measured


@pytest.mark.parametrize("name", shipped_profiles())
def test_profiles_of_the_package_can_be_read_by_name(name):
    profile = LatencyProfile.read(name)
    assert profile == LatencyProfile.read(SHIPPED / f"{name}.json")
    assert all(profile.constant(batch) > 0 for batch in profile.batches)


def test_a_profile_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(InputError, match=r"h100-llama-3\.1-8b"):
        LatencyProfile.read("absent.json")
