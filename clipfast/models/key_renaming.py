"""From OpenAI's keys to those of a table, and back; see :mod:`clipfast.models.key_tables`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from clipfast.models.key_tables import KeyTable, Parts

State = dict[str, Tensor]


def renamed_to(state: Mapping[str, Tensor], table: KeyTable) -> tuple[State, list[str]]:
    """Return weights of OpenAI's keys under a table's, and the keys that it has no place for.

    Raises:
        ValueError: A packed projection cannot be parted as the table says.
    """
    converted: State = {}
    homeless = []
    for key, value in state.items():
        block, rest = _placed(key, table.stacks)
        packed, names = (table.packed_in_block, table.in_block) if block else (table.packed, table.names)
        if (start := next((p for p in packed if rest.startswith(p)), None)) is not None:
            parts = [block + name + rest.removeprefix(start) for name, _ in packed[start]]
            converted.update(zip(parts, _split(key, value, packed[start]), strict=True))
            continue
        name = _renamed(rest, names)
        if name is None:
            homeless.append(key)
            continue
        if key in table.transposed:
            value = transposed(value)
        converted[block + name] = value[(None,) * table.leading_ones.get(key, 0)]
    return converted, homeless


def renamed_from(state: Mapping[str, Tensor], table: KeyTable) -> State:
    """Return weights of a table's keys under OpenAI's; keys that the table does not know stay what they are.

    Raises:
        ValueError: Parts of a packed projection are missing or differ in shape or dtype, or two keys become one.
    """
    stacks, in_block = _inverted(table.stacks), _inverted(table.in_block)
    names = _inverted(table.names) | dict(table.also)
    part_of, part_of_in_block = _parts(table.packed), _parts(table.packed_in_block)
    converted: State = {}
    parts: dict[str, tuple[Parts, dict[str, Tensor]]] = {}
    for key, value in state.items():
        block, rest = _placed(key, stacks)
        known_parts, known = (part_of_in_block, in_block) if block else (part_of, names)
        if (part := next((p for p in known_parts if rest.startswith(p)), None)) is not None:
            start, all_parts = known_parts[part]
            name = block + start + rest.removeprefix(part)
            parts.setdefault(name, (all_parts, {}))[1][part] = value
            continue
        renamed = _renamed(rest, known)
        name = key if renamed is None else block + renamed
        if name in converted:
            raise ValueError(f"state dict: got two keys for {name}, expected one: {key} is the second")
        for _ in range(table.leading_ones.get(name, 0)):
            # what has another shape keeps it and is refused by whoever knows the model's
            value = value[0] if value.dim() > 1 and value.shape[0] == 1 else value
        converted[name] = transposed(value) if name in table.transposed else value
    return converted | {name: _join(name, values, all_parts) for name, (all_parts, values) in parts.items()}


def transposed(value: Tensor) -> Tensor:
    """Return a matrix transposed, and anything else as it is: whoever knows the model's shapes refuses it."""
    return value.T if value.dim() == 2 else value


def _placed(key: str, stacks: Mapping[str, str]) -> tuple[str, str]:
    """Return the other's name of the block that a key is in, empty outside blocks, and the rest of the key."""
    found = re.fullmatch(r"(.*?\.)(\d+\.)(.*)", key)
    return (stacks[found[1]] + found[2], found[3]) if found and found[1] in stacks else ("", key)


def _renamed(key: str, names: Mapping[str, str]) -> str | None:
    for old, new in names.items():
        if key == old or (old.endswith(".") and key.startswith(old)):
            return new + key[len(old) :]
    return None


def _inverted(mapping: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in mapping.items()}


def _parts(packed: Mapping[str, Parts]) -> dict[str, tuple[str, Parts]]:
    """Return, by the other's names of parts, what OpenAI's keys begin with and all parts."""
    return {name: (start, parts) for start, parts in packed.items() for name, _ in parts}


def _split(key: str, value: Tensor, parts: Parts) -> tuple[Tensor, ...]:
    shares = [share for _, share in parts]
    # a projection is packed of three, in whatever parts it comes
    if value.dim() == 0 or (len(parts) > 1 and value.shape[0] % sum(shares)):
        raise ValueError(
            f"{key}: got shape {tuple(value.shape)}, expected {sum(shares)} equal parts in the first dimension"
        )
    unit = value.shape[0] // sum(shares)
    return value.split([share * unit for share in shares])


def _join(key: str, values: Mapping[str, Tensor], parts: Parts) -> Tensor:
    if len(parts) == 1:
        return values[parts[0][0]]
    kinds, shapes = {}, set()
    for name, share in parts:
        value = values.get(name)
        kinds[name.rstrip(".")] = None if value is None else (tuple(value.shape), value.dtype)
        if value is not None and value.dim():
            shapes.add((value.shape[0] / share, *value.shape[1:], value.dtype))
        else:
            shapes.update((None, name))  # never one shape
    if len(shapes) > 1:
        came = ", ".join(f"{name} {kind or 'missing'}" for name, kind in kinds.items())
        alike = (
            "all of one shape and dtype"
            if len({share for _, share in parts}) == 1
            else f"one dtype, and rows as {':'.join(str(share) for _, share in parts)}"
        )
        raise ValueError(f"state dict: got {came} for {key}, expected {alike}")
    return torch.cat([values[name] for name, _ in parts])
