"""The model card: what the directory is, how to load it, what it costs and how far it is from the original."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qpalette.core.records import LinearRecord
from qpalette.formats.bits_map import BITS_MAP
from qpalette.formats.pareto import PARETO
from qpalette.formats.parts import PARTS, counted_bits, total_bits
from qpalette.models.model_class import class_name
from qpalette.models.multiplied import Shares

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

TEMPLATE = """\
---
{front_matter}
---

# {title}

{base} quantized with [qpalette](https://pypi.org/project/qpalette/): {weights:,} weights in {count} linears at
**{rate:.4f} bits per weight**, everything counted.

> ## WARNING: `import qpalette` first
> Without it transformers only logs "Unknown quantization type", skips the quantization and **loads random weights**.

```python
import qpalette  # before from_pretrained, always
from transformers import AutoTokenizer, {class_name}

model = {class_name}.from_pretrained({path}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({path})
```

{packed}## Size

| part | bytes | bits per quantized weight |
|---|---:|---:|
{sizes}

![Bits per weight of each linear, by layer]({picture})
{predicted}
## Distortion

Squared error of the stored weights over their energy, measured with the stored scales, by kind of linear.

| kind | quantizer | weights | bits per weight | distortion |
|---|---|---:|---:|---:|
{distortions}
{calibrated}{tuned}
Every linear is listed in `qpalette_report.json`.
"""

PACKED = """\
## What is packed

**{share} of what multiplies**; what is not stays in the source's type.

| kind | weights | packed |
|---|---:|---:|
{rows}

"""

PREDICTED = f"""
![Predicted loss by bits per weight, beside one code for all and the bound]({PARETO})
"""

CALIBRATED = """
Rounding was calibrated (LDLQ) on {tokens:,} tokens of a text with SHA-256 `{sha256}`. It accepts more distortion of the
weights for less of the outputs, which the report gives for each linear as `proxy`: tr(E H E^T) / tr(W H W^T).
"""

TUNED = """
Row scales, input diagonals, norms and biases were then tuned, codes as they were: {steps:,} steps on {tokens:,} tokens.
KL to the original on held-out text went from {before:.4f} to {after:.4f} nats per token. The distortions above are
those before tuning.
"""


@dataclass(frozen=True)
class Tuned:
    """What tuning did to a quantized model. KL in nats per token, on `held_out_tokens` that were not tuned on."""

    steps: int  # after which the stored values were the best; 0: they are those from before
    tokens: int  # of the text tuned on
    held_out_tokens: int
    tokens_sha256: str  # of both, as int64
    kl_before: float
    kl_after: float


def model_card(
    title: str,
    config: Mapping[str, Any],
    records: Mapping[str, LinearRecord],
    distortions: Mapping[str, float],
    carried_bytes: int,
    base_model: str | None = None,
    calibration: tuple[int, str] | None = None,
    tuned: Tuned | None = None,
    shares: Shares | None = None,
    has_pareto: bool = False,
) -> str:
    """Markdown, the same for equal arguments. `distortions` by linear name; `carried_bytes` are the other tensors'.

    `base_model` is a Hub name; without it the source config's own is used when it is one. The licence is the source
    config's, when it states one. `calibration`, of calibrated rounding, is its tokens and the text's SHA-256; `tuned`
    is what was done after that; `shares` how much is packed;
    `has_pareto` says that this picture lies beside it.
    """
    weights = sum(record.out_features * record.in_features for record in records.values())
    packed_bits = sum(counted_bits(record).total for record in records.values())
    base = base_model or _hub_name(config)
    return TEMPLATE.format(
        front_matter=_front_matter(base, config.get("license")),
        title=_escaped(title),
        path=_quoted(title),
        class_name=class_name(config),
        base=_code(base) if base else f"A {_escaped(str(config.get('model_type', 'language')))} model",
        weights=weights,
        count=len(records),
        rate=packed_bits / weights,
        packed="" if shares is None else PACKED.format(share=shares.multiplied, rows=_share_rows(shares)),
        sizes=_size_rows(records, weights, carried_bytes),
        picture=BITS_MAP,
        predicted=PREDICTED if has_pareto else "",
        distortions=_distortion_rows(records, distortions),
        calibrated="" if calibration is None else CALIBRATED.format(tokens=calibration[0], sha256=calibration[1]),
        tuned="" if tuned is None else _tuned(tuned),
    )


def base_model_of(card: str) -> str | None:
    """The Hub name that a card of this kind states."""
    front_matter = card.partition("\n---\n")[0]
    found = re.search(rf'^base_model: "({HUB_ID.pattern})"$', front_matter, re.MULTILINE)
    return found[1] if found else None


def _tuned(tuned: Tuned) -> str:
    return TUNED.format(steps=tuned.steps, tokens=tuned.tokens, before=tuned.kl_before, after=tuned.kl_after)


def kind_of(linear: str) -> str:
    """What repeats over layers: the name after its last number. `model.layers.3.mlp.up_proj` -> `mlp.up_proj`."""
    return re.split(r"(?:^|\.)\d+\.", linear)[-1]


def _printable(text: str) -> str:
    """No line break, no control character, no half of a character: a "?" for each."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _quoted(text: str) -> str:
    """A string in Python and in YAML alike."""
    return json.dumps(_printable(text), ensure_ascii=False)


def _escaped(text: str) -> str:
    """Markdown that shows `text`."""
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", _printable(text))


def _code(text: str) -> str:
    """`text` as code, between more backticks than it has in a row."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{_printable(text)}{space}{fence}"


def _cell(text: str) -> str:
    """Code in a table, where a bar would end the cell."""
    return _code(text).replace("|", "\\|")


def _hub_name(config: Mapping[str, Any]) -> str | None:
    """The source's own name, unless it is a path on somebody's disk."""
    name = config.get("_name_or_path")
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) else None


def _front_matter(base_model: str | None, licence: Any) -> str:
    lines = ["library_name: transformers", "tags: [qpalette, quantized]"]
    if base_model:
        lines += [f"base_model: {_quoted(base_model)}", "base_model_relation: quantized"]
    if isinstance(licence, str) and licence:
        lines.append(f"license: {_quoted(licence)}")
    return "\n".join(lines)


def _share_rows(shares: Shares) -> str:
    return "\n".join(f"| {kind} | {share.weights:,} | {share} |" for kind, share in shares.kinds.items())


def _size_rows(records: Mapping[str, LinearRecord], weights: int, carried_bytes: int) -> str:
    bits = total_bits(records.values()).parts
    rows = {f"{part.title} (`{part.suffix}`)": bits[part.suffix] for part in PARTS if part.suffix in bits}
    rows["**quantized linears**"] = sum(rows.values())
    lines = [f"| {name} | {bits // 8:,} | {bits / weights:.4f} |" for name, bits in rows.items()]
    lines.append(f"| all other tensors, as they were | {carried_bytes:,} | |")
    return "\n".join(lines)


def _distortion_rows(records: Mapping[str, LinearRecord], distortions: Mapping[str, float]) -> str:
    kinds: dict[str, list[str]] = {}
    for name in records:
        kinds.setdefault(kind_of(name), []).append(name)
    return "\n".join(
        _distortion_row(kind, {name: records[name] for name in names}, distortions) for kind, names in kinds.items()
    )


def _distortion_row(kind: str, records: Mapping[str, LinearRecord], distortions: Mapping[str, float]) -> str:
    sizes = {name: record.out_features * record.in_features for name, record in records.items()}
    weights = sum(sizes.values())
    bits = sum(counted_bits(record).total for record in records.values())
    specs = ", ".join(sorted({record.spec for record in records.values()}))
    mean = sum(sizes[name] * distortions[name] for name in records) / weights
    return f"| {_cell(kind)} | {specs} | {weights:,} | {bits / weights:.4f} | {mean:.3e} |"
