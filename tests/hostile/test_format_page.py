"""docs/format.md, row by row: each invariant is broken once, and the error is exactly this one."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_artifacts import CONFIG, DOWN, UP, WEIGHTS
from safetensors.torch import load, save, save_file

import qpalette.formats.reader
from qpalette.core.errors import ArtifactError
from qpalette.formats import open_artifact

GROUP_DIAGONAL_SOURCE = (
    'since version 3, and not before, `group` is a name, `diagonal` may be `"float16"` in place of `"signs"`, '
    "and `source` may list names"
)
PAGE = Path(__file__).parents[2] / "docs" / "format.md"
AGAIN = "download the model again"


def quantization(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        config = json.loads(json.dumps(CONFIG))
        change(config["quantization_config"])
        (directory / "config.json").write_text(json.dumps(config))

    return damage


def entry(**changes: Any) -> Callable[[Path], None]:
    return quantization(lambda config: config["linears"][UP].update(changes))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        content = load(WEIGHTS)
        change(content)
        (directory / "model.safetensors").write_bytes(save(content))

    return damage


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(content) and None


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda directory: (directory / "model.safetensors").write_bytes(change(WEIGHTS)) and None


def index(*names: str) -> Callable[[Path], None]:
    return text("model.safetensors.index.json", json.dumps({"weight_map": dict(enumerate(names))}))


def second_shard(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "first.safetensors")
    save_file({"model.norm.weight": torch.ones(36)}, directory / "second.safetensors")
    index("first.safetensors", "second.safetensors")(directory)


def whole_beside_shards(directory: Path) -> None:
    save_file({"model.norm.weight": torch.ones(36)}, directory / "second.safetensors")
    index("model.safetensors", "second.safetensors")(directory)


def diagonal(bits: int) -> Callable[[Path], None]:
    """The inputs of DOWN multiplied by float16 values of these bits, in place of signs."""

    def change(directory: Path) -> None:
        quantization(lambda config: config["linears"][DOWN].update(diagonal="float16"))(directory)
        values = torch.full((40,), bits, dtype=torch.int16)
        tensors(lambda t: (t.pop(f"{DOWN}.qp_signs"), t.update({f"{DOWN}.qp_diagonal": values})))(directory)

    return change


def other_tensor(directory: Path) -> None:
    tensors(lambda content: content.update({f"{UP}.qp_extra": torch.ones(1)}))(directory)


SHARD = "D/model.safetensors"
# the page's invariant -> [(damage, the error, D standing for the directory)]
CASES: dict[str, list[tuple[Callable[[Path], None], str]]] = {
    "`config.json` is a JSON object": [
        (lambda d: (d / "config.json").unlink(), "D/config.json is missing; give the directory of a quantized model"),
        (
            text("config.json", "{"),
            "D/config.json cannot be read as JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1)); download it again",
        ),
        (text("config.json", "[]"), "D/config.json holds no JSON object; download it again"),
    ],
    "it has `quantization_config`, an object": [
        (text("config.json", "{}"), "D/config.json has no quantization_config: the model is not quantized"),
        (
            text("config.json", '{"quantization_config": 3}'),
            "D/config.json has no quantization_config: the model is not quantized",
        ),
    ],
    '`quant_method` is `"qpalette"`': [
        (
            quantization(lambda q: q.update(quant_method="gptq")),
            "quantization_config: quant_method is 'gptq', not 'qpalette'",
        )
    ],
    "`format_version` is an integer that this release reads": [
        (
            quantization(lambda q: q.update(format_version=True)),
            "quantization_config: format_version is True, and this release reads 1, 2, 3; upgrade qpalette",
        )
    ],
    "in version 1, no linear has `tcq2` at 3.375 to 4 bits": [
        (
            quantization(lambda q: (q.update(format_version=1), q["linears"][UP].update(spec="tcq2-4"))),
            f"{UP}: 'tcq2-4' had another codebook in format version 1; quantize the model again",
        )
    ],
    "no other field than `linears`, `provenance` (strings), `modules_to_not_convert` (strings)": [
        (
            quantization(lambda q: q.update(colour=1)),
            f"quantization_config: colour: Extra inputs are not permitted; {AGAIN}",
        ),
        (
            quantization(lambda q: q.update(provenance={"a": 1})),
            f"quantization_config: provenance.a: Input should be a valid string; {AGAIN}",
        ),
    ],
    "`linears` names one linear at least; each has exactly `spec`, `shape`, `rotation`, `seed`, of their types, "
    "and since version 3 `group`": [
        (
            quantization(lambda q: q.update(linears={})),
            "quantization_config: linears: Dictionary should have at least 1 item after validation, not 0; " + AGAIN,
        ),
        (
            quantization(lambda q: q["linears"][UP].pop("seed")),
            f"quantization_config: linears.{UP}.seed: Field required; {AGAIN}",
        ),
        (entry(spec=4), f"quantization_config: linears.{UP}.spec: Input should be a valid string; {AGAIN}"),
        (entry(x=1), f"quantization_config: linears.{UP}.x: Extra inputs are not permitted; {AGAIN}"),
    ],
    "`spec` is the canonical name of a known quantizer": [
        (
            entry(spec="tcq-3.3"),
            f"{UP}: 'tcq-3.3' is not a quantizer: tcq takes multiples of 0.125 from 1 to 8 bits",
        ),
        (entry(spec="tcq-3.250"), f"{UP}: spec 'tcq-3.250' is not canonical; write 'tcq-3.25'"),
    ],
    "`shape` is `[M, K]`: out-features, in-features, both positive, `M * K < 2^40`": [
        (
            entry(shape=[0, 36]),
            f"quantization_config: linears.{UP}.shape.0: Input should be greater than or equal to 1; {AGAIN}",
        ),
        (entry(shape=[1 << 36, 36]), f"{UP}: shape 68719476736 x 36 is beyond 2^40 weights"),
    ],
    "`rotation` spells known factors whose product divides K": [
        (
            entry(rotation="../x"),
            f"{UP}: '../x' is not a rotation: write factors joined by x, such as h36xh16 or c107xh128",
        ),
        (
            entry(rotation="h16"),
            f"{UP}: rotation 'h16' has blocks of 16, which do not divide 36 inputs: choose factors whose product "
            "divides 36",
        ),
    ],
    "its dense factors, all but a power of two at the end and cosines above 1024, have a product of 4096 at most; "
    "those cosines are of odd order": [
        (
            quantization(lambda q: q["linears"][UP].update(shape=[40, 1 << 21], rotation="h1024xh1024xh2")),
            f"{UP}: rotation 'h1024xh1024xh2' has dense factors of 1048576 together, and 4096 is the most: "
            "write powers of two as one last factor, such as h36xh16",
        ),
        (
            quantization(lambda q: q["linears"][UP].update(shape=[40, 1 << 16], rotation="c65536")),
            f"{UP}: 'c65536': above 1024 a cosine has an odd order; put its powers of two into h",
        ),
    ],
    "`seed` is an integer, `0 <= seed < 2^63`": [
        (
            entry(seed=-1),
            f"quantization_config: linears.{UP}.seed: Input should be greater than or equal to 0; {AGAIN}",
        ),
        (
            entry(seed=1 << 63),
            f"quantization_config: linears.{UP}.seed: Input should be less than 9223372036854775808; {AGAIN}",
        ),
    ],
    GROUP_DIAGONAL_SOURCE: [
        (
            quantization(lambda q: q["linears"][UP].pop("group")),
            f"{UP}: it names no group; {AGAIN}",
        ),
        (
            quantization(lambda q: q.update(format_version=2)),
            f"{UP}: format version 2 has no group, no diagonal and no source; {AGAIN}",
        ),
        (
            entry(diagonal="float32"),
            f"quantization_config: linears.{UP}.diagonal: Input should be 'signs' or 'float16'; {AGAIN}",
        ),
    ],
    "linears of one group have one K, one `rotation` and one `diagonal`": [
        (
            entry(group=DOWN),
            f"{DOWN}: in-features 40, but {UP} of its group '{DOWN}' has 36; {AGAIN}",
        ),
        (
            quantization(lambda q: q["linears"].update({"a": {**q["linears"][UP], "rotation": "c3xh12", "group": UP}})),
            f"a: rotation c3xh12, but {UP} of its group '{UP}' has h36; {AGAIN}",
        ),
    ],
    "every shard is a plain file name beside the index, and there": [
        (
            index("../model.safetensors"),
            "D/model.safetensors.index.json names '../model.safetensors', which is no safetensors file beside it",
        ),
        (index("gone.safetensors"), "D/gone.safetensors is missing; download it"),
    ],
    "every header is valid, every file has exactly the bytes that its header announces": [
        (
            weights(lambda content: content[:-7]),
            f"{SHARD} is truncated: its header announces {len(WEIGHTS)} bytes, the file has {len(WEIGHTS) - 7}; "
            "fetch it again",
        ),
        (
            weights(lambda content: content + b"1234567"),
            f"{SHARD}: 7 bytes after the last tensor belong to no tensor; the file is corrupt, fetch it again",
        ),
        (
            weights(lambda content: content.replace(b"[40]", b"[39]", 1)),
            f"{SHARD}: tensor '{UP}.bias' claims bytes 0 to 160, but 0 to 156 are expected; the header is corrupt, "
            "fetch the file again",
        ),
    ],
    "no tensor is in two files": [
        (second_shard, "tensor 'model.norm.weight' is in D/first.safetensors and in D/second.safetensors")
    ],
    "no `model.safetensors` beside an index of other files: transformers would read that alone": [
        (
            whole_beside_shards,
            "D/model.safetensors lies beside model.safetensors.index.json, which names other files; remove what is "
            "not of this model",
        )
    ],
    "each linear has its three tensors (`formats/parts.py`), with exactly that type and shape": [
        (
            tensors(lambda t: t.pop(f"{UP}.qp_signs")),
            f"tensor '{UP}.qp_signs' is missing: config.json says that {UP} is tcq-3.25",
        ),
        (
            tensors(lambda t: t.update({f"{UP}.qp_scales": torch.ones(41, dtype=torch.int16)})),
            f"tensor '{UP}.qp_scales' is torch.int16 (41,), but must be torch.int16 (40,)",
        ),
    ],
    "no `NAME.weight` beside the codes": [
        (
            tensors(lambda t: t.update({f"{UP}.weight": torch.ones(40, 36)})),
            f"tensor '{UP}.weight' lies beside packed codes of the same linear; remove one",
        )
    ],
    "`NAME.bias` has shape `[M]`": [
        (
            tensors(lambda t: t.update({f"{UP}.bias": torch.ones(41)})),
            f"tensor '{UP}.bias' has shape (41,), but must have (40,)",
        )
    ],
    "no other tensor whose last name starts with `qp_`": [
        (other_tensor, f"tensor '{UP}.qp_extra' belongs to no linear of config.json (1 such)")
    ],
    "the packed tensors have the bits that the rates count": [],  # the shapes imply it: see the test below
    "every scale and every number of a diagonal is finite (a scale of zero is fine: the row is zero)": [
        (
            tensors(lambda t: t[f"{DOWN}.qp_scales"].fill_(0x7C00)),
            f"{DOWN}.qp_scales has a value that is not finite; {AGAIN}",
        ),
        (
            diagonal(0x7E00),
            f"{DOWN}.qp_diagonal has a value that is not finite; {AGAIN}",
        ),
    ],
    "the sign bits beyond K are zero": [
        (
            tensors(lambda t: t[f"{UP}.qp_signs"].fill_(0xFF)),
            f"{UP}.qp_signs is damaged: the signs of 36 inputs have a bit set beyond the last input; {AGAIN}",
        )
    ],
    "the file still has the bytes that it had when it was opened": [],  # see the test below
}


@pytest.fixture
def good(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    return tmp_path


def read(directory: Path) -> None:
    artifact = open_artifact(directory)
    for name in artifact.records:
        artifact.read_linear(name)


def rows_of_page() -> list[str]:
    rows = [line.strip("|\n ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [cells[0] for cells in rows if len(cells) == 2 and cells[0] not in ("invariant", "---|---")]


def test_every_invariant_of_the_page_is_here():
    assert list(CASES) == rows_of_page()


def test_the_good_one_is_read(good):
    read(good)
    diagonal(0x3800)(good)
    read(good)
    assert open_artifact(good).read_linear(DOWN).diagonal.dtype == torch.int16


@pytest.mark.parametrize(("damage", "message"), [case for cases in CASES.values() for case in cases])
def test_a_broken_invariant(good, damage, message):
    damage(good)
    with pytest.raises(ArtifactError) as caught:
        read(good)
    assert str(caught.value).replace(str(good), "D") == message


def test_bits_that_are_counted_are_stored(good, monkeypatch):
    monkeypatch.setattr(
        qpalette.formats.reader,
        "is_part",
        lambda name: re.search(r"qp_(codes|scales)$", name) is not None,
    )
    with pytest.raises(ArtifactError, match=r"^the packed tensors hold \d+ bits, but the rates count \d+"):
        open_artifact(good)


def test_a_file_that_changes_after_it_was_opened(good):
    artifact = open_artifact(good)
    os.truncate(good / "model.safetensors", 1000)
    tensor = f"{DOWN}.qp_codes"
    with pytest.raises(ArtifactError) as caught:
        artifact.read_linear(DOWN)
    expected = f"D/model.safetensors: tensor '{tensor}' ends too early; the file changed since it was opened"
    assert str(caught.value).replace(str(good), "D") == expected
