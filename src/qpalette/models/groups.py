"""Which tensors are linears to quantize, and which of them read the same input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from qpalette.core.errors import CheckpointError
from qpalette.core.records import LinearGroup
from qpalette.models.experts import EXPERT, FIRST
from qpalette.models.model_class import text_config
from qpalette.models.resolver import LAYER, Held, Resolved, resolve
from qpalette.models.weights import tensors_of
from qpalette.storage.base import Checkpoint


@dataclass(frozen=True)
class Grouping:
    """What is quantized, and what is carried over as it is; together every tensor of the checkpoint."""

    groups: tuple[LinearGroup, ...]  # in layer order
    untouched: tuple[str, ...]  # tensor names, in file order
    reasons: Mapping[str, str]  # for each untouched tensor of two dimensions or more
    optional: tuple[LinearGroup, ...] = ()  # of the untouched, what can be quantized too: embeddings, output head

    @property
    def all_groups(self) -> tuple[LinearGroup, ...]:
        """Everything that a plan may name."""
        return self.groups + self.optional


def find_groups(
    checkpoint: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = (), also: Sequence[str] = ()
) -> Grouping:
    """Sort every tensor of `checkpoint` into groups of linears (weights out_features x in_features) or the rest.

    What is a linear the class in transformers says (`resolver.py`), and which read one input, one forward of it:
    those of one module that are given the same tensor are a group. The first linears of all experts in a layer are one,
    too. Where transformers has no such class there are no groups, and the reasons say so.

    `include` and `exclude` are glob patterns over linear names (no ".weight"): with `include`, only what matches one
    is quantized; what matches an `exclude` never is. Embeddings and the output head are optional: they stay as they
    are unless a pattern of `also` matches their name or its last part, such as "lm_head" or "embed_tokens", and no
    `exclude` either. A tied head is the embedding, under both names.

    Raises CheckpointError when a pattern of `also` or `exclude` matches nothing, or the names are those of a wrapped
    model.
    """
    found = resolve(checkpoint)
    tables = _optional(checkpoint, found)
    chosen, optional = _choose(tables, also, exclude)
    names = [info.name.removesuffix(".weight") for info in checkpoint.tensors.values()]
    _check_named(exclude, [*names, *found.linears, *(alias for aliases in tables.values() for alias in aliases)])
    reasons = dict(found.reasons)
    wanted: dict[str, Held] = {}
    for name, held in found.linears.items():
        if reason := _filtered(name, include, exclude):
            reasons |= dict.fromkeys(tensors_of(checkpoint, name), reason)
        else:
            wanted[name] = held
    in_parts = {name for name, held in wanted.items() if reasons.keys() & tensors_of(checkpoint, name)}
    wanted = {name: held for name, held in wanted.items() if name not in in_parts}
    groups = (*_in_groups(found, wanted), *chosen)
    grouped = {name for group in groups for linear in group.linears for name in tensors_of(checkpoint, linear.name)}
    untouched = tuple(name for name in checkpoint.tensors if name not in grouped)
    return Grouping(groups, untouched, {name: why for name, why in reasons.items() if name not in grouped}, optional)


def token_tables(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Of the optional groups those with a row for each token, embeddings and output head: every text reads them."""
    found = resolve(checkpoint)
    rows = getattr(found.input_embedding, "num_embeddings", None)
    return tuple(group.name for group in _optional(checkpoint, found) if group.linears[0].out_features == rows)


def _optional(checkpoint: Checkpoint, found: Resolved) -> dict[LinearGroup, tuple[str, ...]]:
    """Embeddings and output head, each a group of its own, with the names that a pattern may match."""
    configs = (checkpoint.config, text_config(checkpoint.config))
    tied = any(config.get("tie_word_embeddings") for config in configs)
    main = found.input_embedding
    result: dict[LinearGroup, tuple[str, ...]] = {}
    for name, held in found.embeddings.items():
        module = found.model.get_submodule(held.place.module)  # type: ignore[union-attr]
        is_head = not isinstance(module, torch.nn.Embedding)
        if not held.stands_alone or (is_head and tied):
            continue
        names = (name, name.rpartition(".")[2], *(("lm_head",) if tied and module is main else ()))
        result[LinearGroup(name, (held.linear,))] = names
    return result


def _choose(
    optional: Mapping[LinearGroup, tuple[str, ...]], also: Sequence[str], exclude: Sequence[str]
) -> tuple[tuple[LinearGroup, ...], tuple[LinearGroup, ...]]:
    """(those that a pattern of `also` matches and none of `exclude`, the others)."""
    for pattern in also:
        if not any(fnmatchcase(name, pattern) for names in optional.values() for name in names):
            known = ", ".join(group.name for group in optional) or "none here"
            raise CheckpointError(f"'{pattern}' matches no embedding and no output head; these could be named: {known}")
    chosen = [
        group
        for group, names in optional.items()
        if any(fnmatchcase(name, pattern) for name in names for pattern in also)
        and not any(fnmatchcase(name, pattern) for name in names for pattern in exclude)
    ]
    return tuple(chosen), tuple(group for group in optional if group not in chosen)


def _check_named(exclude: Sequence[str], names: Sequence[str]) -> None:
    """A name with a slip in it would leave in what was to be left out."""
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CheckpointError(f"'{pattern}' leaves nothing out: no linear of the checkpoint has such a name")


def _filtered(name: str, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    linear = name.removesuffix(".weight")
    if include and not any(fnmatchcase(linear, pattern) for pattern in include):
        return "not included"
    if any(fnmatchcase(linear, pattern) for pattern in exclude):
        return "excluded"
    return None


def _in_groups(found: Resolved, wanted: Mapping[str, Held]) -> list[LinearGroup]:
    """In layer order, and there in the order in which the class calls them. A group keeps its name when some of its
    linears are not wanted."""
    families: dict[tuple[object, ...], list[Held]] = {}
    for name, held in found.linears.items():
        families.setdefault(_family(name, held, found), []).append(held)
    groups = []
    for members in families.values():
        members.sort(key=_rank)
        linears = tuple(held.linear for held in members if held.linear.name in wanted)
        if linears:
            name = _group_name([held.linear.name for held in members])
            groups.append((_sort_key(name, members[0]), LinearGroup(name, linears)))
    return [group for _, group in sorted(groups, key=lambda each: each[0])]


def _family(name: str, held: Held, found: Resolved) -> tuple[object, ...]:
    """Equal for linears of one group."""
    if expert := EXPERT.fullmatch(name):
        first = any(expert["leaf"] in leaves for leaves in FIRST)
        return ("experts", expert["experts"]) if first else ("alone", name)
    read = found.seen.inputs.get(held.place.module)
    if read is None or not held.stands_alone:
        return ("alone", name)
    return ("input", name.rpartition(".")[0], held.place.module.rpartition(".")[0], read[1], held.linear.in_features)


def _rank(held: Held) -> tuple[int, ...]:
    expert = EXPERT.fullmatch(held.linear.name)
    return (int(expert["index"]) if expert else 0, held.order, held.place.part)


def _group_name(names: Sequence[str]) -> str:
    """ "a.q_proj", "a.k_proj", "a.v_proj" -> "a.qkv_proj"; of experts "a.experts.gate_up_proj"."""
    if len(names) == 1:
        return names[0]
    if expert := EXPERT.fullmatch(names[0]):
        return f"{expert['experts']}.gate_up_proj"
    parent = names[0].rpartition(".")[0]
    leaves = [name.rpartition(".")[2].split("_") for name in names]
    start, end = _alike(leaves), _alike([leaf[::-1] for leaf in leaves])
    stems = ["_".join(leaf[start : len(leaf) - end]) for leaf in leaves]
    together = ("" if max(map(len, stems)) == 1 else "_").join(stems)
    return ".".join((parent, "_".join((*leaves[0][:start], together, *leaves[0][len(leaves[0]) - end :]))))


def _alike(leaves: Sequence[Sequence[str]]) -> int:
    """How many parts they begin with in common, each keeping one of its own."""
    count = 0
    while count < min(map(len, leaves)) - 1 and len({leaf[count] for leaf in leaves}) == 1:
        count += 1
    return count


def _sort_key(name: str, first: Held) -> tuple[object, ...]:
    layer = LAYER.search(name)
    return (_natural(name[: layer.end() - 1] if layer else ""), first.order, _natural(name))


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key in which layer 10 comes after layer 9; numbers and words never meet at one place."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))
