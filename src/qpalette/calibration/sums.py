"""Running sums of second moments: those of one group of linears, and all of a pass on disk."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qpalette.calibration.equalize import equalize, row_mean_square
from qpalette.calibration.feedback import LOUD
from qpalette.calibration.hessians import input_names, pack_symmetric, packed_length, row_blocks, unpack_symmetric
from qpalette.calibration.taps import Weight
from qpalette.core.records import LinearGroup
from qpalette.models.experts import DOWN, EXPERT
from qpalette.storage import StreamingSafetensorsWriter, TensorInfo

logger = logging.getLogger(__name__)

SUM_TYPE = torch.float64
EVEN_TOKENS = 16  # of an expert, whose neurons are all alike before more have come
DISK_RATE = 500e6  # bytes per second: what saving takes, before it was tried
SPACING = 20  # times what saving takes: at most a twentieth of the time goes into it


class GroupSums:
    """The sums of one group: H_I, H_O of each linear if there are two sides, and the tokens that each linear saw.

    On the device of the weights; products are float32 within a window, where sums are short, float64 between windows.
    """

    def __init__(self, group: LinearGroup, weights: Mapping[str, Weight], two_sided: bool) -> None:
        self.group = group
        device = next(iter(weights.values())).parameter.device
        self._input_of = input_names(group, two_sided)
        zeros = torch.zeros(group.in_features, group.in_features, dtype=SUM_TYPE, device=device)
        self.inputs = {name: zeros.clone() for name in dict.fromkeys(self._input_of.values())}
        self.outputs: dict[str, list[Tensor]] = {}
        self.seen = dict.fromkeys(weights, 0)
        self.leaders = _leaders(group)
        if not two_sided:
            return
        matrices = {name: weight.values.float() for name, weight in weights.items()}
        scale = equalize(list(matrices.values())).float()
        self._columns = scale.square()
        self._rows = {name: row_mean_square(matrix / scale) for name, matrix in matrices.items()}
        for linear in group.linears:
            heights = [block.stop - block.start for block in row_blocks(linear.out_features)]
            self.outputs[linear.name] = [torch.zeros(n, n, dtype=SUM_TYPE, device=device) for n in heights]

    @property
    def tokens(self) -> int:
        """That reached the group; an expert's have their own."""
        return sum(self.seen[linear] for linear in self.leaders)

    def add_input(self, linear: str, x: Tensor) -> None:
        """x [..., K], of one side: what siblings read counts once."""
        rows = x.detach().reshape(-1, self.group.in_features).float()
        self.seen[linear] += len(rows)
        if linear in self.leaders:
            self.inputs[self._input_of[linear]] += rows.T @ rows

    def add(self, linear: str, x: Tensor, gradient: Tensor, again: bool = False) -> None:
        """x [..., K] and the gradient [..., M] at the output, each weighed by the other (see `collect.py`)."""
        x = x.detach().reshape(-1, self.group.in_features).float()
        gradient = gradient.detach().reshape(len(x), -1).float()
        self.seen[linear] += 0 if again else len(x)
        weighed = x * clipped(gradient.square() @ self._rows[linear]).sqrt()[:, None]
        self.inputs[self._input_of[linear]] += weighed.T @ weighed
        weighed = gradient * clipped(x.square() @ self._columns).sqrt()[:, None]
        for block, total in zip(row_blocks(weighed.shape[1]), self.outputs[linear], strict=True):
            total += weighed[:, block].T @ weighed[:, block]

    def tensors(self) -> dict[str, Tensor]:
        """All sums by name."""
        blocks = ((name, number, block) for name, each in self.outputs.items() for number, block in enumerate(each))
        inputs = {f"{self.group.name} {name}": total for name, total in self.inputs.items()}
        return inputs | {f"output.{n}.{name}": block for name, n, block in blocks}


def clipped(weights: Tensor) -> Tensor:
    """Of the tokens of a window: none counts for more than LOUD times their mean.

    The gradient of an attention sink, the first token, outweighs that of all others in a value projection: H_I would
    be the moment of as many tokens as there are windows.
    """
    return torch.minimum(weights, LOUD * weights.mean())


def sum_bytes(group: LinearGroup, two_sided: bool) -> int:
    """What `GroupSums` holds."""
    sizes = [group.in_features] * len(set(input_names(group, two_sided).values()))
    for linear in group.linears if two_sided else ():
        sizes += [block.stop - block.start for block in row_blocks(linear.out_features)]
    return SUM_TYPE.itemsize * sum(size**2 for size in sizes)


def family_of(group: LinearGroup) -> str:
    """Groups whose moments are pooled have one family: the same linear of all experts in a layer."""
    expert = EXPERT.fullmatch(group.linears[0].name)
    return group.name if expert is None else f"{expert['experts']}.{expert['leaf']}"


def expert_tokens(sums: Iterable[GroupSums]) -> dict[str, int]:
    """How many tokens reached each expert, by its name."""
    return {
        f"{expert['experts']}.{expert['index']}": seen
        for group in sums
        for linear, seen in group.seen.items()
        if (expert := EXPERT.fullmatch(linear))
    }


def fill_up(sums: Iterable[GroupSums]) -> None:
    """Experts that saw fewer tokens than a moment needs are helped out; one that saw enough is left as it is.

    Where all experts of a layer have the same axes, those of the hidden states that a last linear writes, the missing
    tokens, up to as many as there are rows, are the mean of the layer's. Neurons of two experts have nothing in common:
    a moment over them is shrunk towards its own diagonal until twice as many tokens as rows have come. H_I of linears
    that share it has all their tokens already.
    """
    families: dict[str, list[tuple[GroupSums, str]]] = {}
    for group in sums:
        for linear in group.seen:
            if expert := EXPERT.fullmatch(linear):
                families.setdefault(f"{expert['experts']}.{expert['leaf']}", []).append((group, linear))
    for family, members in families.items():
        tokens = sum(group.seen[linear] for group, linear in members)
        if tokens == 0:
            continue
        last = family.rpartition(".")[2] in DOWN
        if last:
            _shrink([(next(iter(group.inputs.values())), group.seen[linear]) for group, linear in members])
        for blocks in zip(*(group.outputs.get(linear, ()) for group, linear in members), strict=True):
            counted = [(block, group.seen[linear]) for block, (group, linear) in zip(blocks, members, strict=True)]
            (_pool if last else _shrink)(counted)
        for group, linear in members:
            group.seen[linear] = max(1, group.seen[linear])


def _pool(moments: Sequence[tuple[Tensor, int]]) -> None:
    """Sums over tokens, and how many: missing tokens are the mean of all."""
    mean = sum(moment for moment, _ in moments) / sum(seen for _, seen in moments)
    for moment, seen in moments:
        moment += mean * max(0, len(moment) - seen)


def _shrink(moments: Sequence[tuple[Tensor, int]]) -> None:
    """Missing tokens are independent ones with the diagonal of those that came, which is even as long as few have."""
    even = sum(moment.diagonal().mean() for moment, _ in moments) / sum(seen for _, seen in moments)
    for moment, seen in moments:
        diagonal = (moment.diagonal() + EVEN_TOKENS * even) / (seen + EVEN_TOKENS)
        moment.diagonal().add_(diagonal * max(0, 2 * len(moment) - seen))


class PartialSums:
    """The sums of a pass on disk, so that windows which are done need not be read again.

    They are kept now and then, as often as it costs little; what is done twice gives the same sums.
    """

    def __init__(self, file: Path, identity: str, sums: Sequence[GroupSums]) -> None:
        self.file, self._identity, self._sums = file, identity, sums
        values = sum(packed_length(len(total)) for group in sums for total in group.tensors().values())
        self._cost, self._kept = SUM_TYPE.itemsize * values / DISK_RATE, time.monotonic()

    def load(self) -> int:
        """The windows that are done; 0 where nothing is kept of these groups and this calibration."""
        try:
            with safe_open(self.file, "pt") as stored:
                metadata = stored.metadata()
                if metadata["identity"] != self._identity:
                    return 0
                seen = json.loads(metadata["seen"])
                loaded = [
                    (total, unpack_symmetric(stored.get_tensor(name), len(total)))
                    for group in self._sums
                    for name, total in group.tensors().items()
                ]
                counts = [{name: int(seen[name]) for name in group.seen} for group in self._sums]
                windows = int(metadata["windows"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError):
            return 0  # none, half of one, or one of other groups: start again
        for total, values in loaded:
            total.copy_(values)
        for group, count in zip(self._sums, counts, strict=True):
            group.seen = count
        return windows

    def keep(self, windows: int) -> None:
        """What the sums are after so many windows, unless that was done a short time ago."""
        start = time.monotonic()
        if start - self._kept < SPACING * self._cost:
            return
        tensors = {name: total for group in self._sums for name, total in group.tensors().items()}
        infos = [TensorInfo(name, (packed_length(len(total)),), SUM_TYPE) for name, total in tensors.items()]
        seen = json.dumps({name: count for group in self._sums for name, count in group.seen.items()})
        metadata = {"identity": self._identity, "windows": str(windows), "seen": seen}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with StreamingSafetensorsWriter(self.file, infos, metadata) as writer:
                for name, total in tensors.items():
                    writer.write(name, pack_symmetric(total))
        except OSError as error:
            logger.warning("%s cannot be kept (%s): interrupted, this pass begins again", self.file, error)
        self._kept = time.monotonic()
        self._cost = self._kept - start

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)


def _leaders(group: LinearGroup) -> set[str]:
    """The first of the linears that read the same tensor: of all, or of each expert's."""
    first: dict[str, str] = {}
    for linear in group.linears:
        expert = EXPERT.fullmatch(linear.name)
        first.setdefault(expert["index"] if expert else "", linear.name)
    return set(first.values())
