"""How a change too big for one transaction is cut into several. Pure.

First the allow sets grow to what both ends allow, then the block sets change, then the allow sets shrink. Whoever is
refused in between is inside a block element of one end, and in no more specific allow element of either: so one end
refuses him too.

Invariants:
    every-step-is-safe: after no step is an address refused that neither end refuses.
    steps-add-up: all steps together are the change.
    overlapping-ranges-change-together: no step leaves two ranges of an interval set overlapping, or a gap between
        a range removed and those that replace it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from edge.kernel.nft_sets import Element, SetSpec


@dataclass(slots=True)
class Delta:
    """Changes to one set: elements to remove, and elements to add (or replace) with the time they end."""

    remove: list[Element] = field(default_factory=list)
    add: dict[Element, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.remove) + len(self.add)


Deltas = dict[str, Delta]
"""Changes by set name."""


def steps(deltas: Deltas, most: int, specs: Mapping[str, SetSpec]) -> Iterator[Deltas]:
    """The change as transactions of about `most` elements each; overlapping ranges are never parted."""
    growing: Deltas = {}
    shrinking: Deltas = {}
    for name, delta in deltas.items():
        if not specs[name].allow:
            continue
        if not specs[name].interval:
            growing[name], shrinking[name] = Delta(add=delta.add), Delta(remove=delta.remove)
            continue
        union = _union([*delta.remove, *delta.add])
        growing[name] = _between(delta.remove, union)
        shrinking[name] = _between(union, delta.add)
    changing = {name: delta for name, delta in deltas.items() if not specs[name].allow}
    for phase in (growing, changing, shrinking):
        yield from _batches(phase, most, specs)


def _union(ranges: Iterable[Element]) -> list[Element]:
    """The ranges that hold exactly the addresses of these, none touching another."""
    found: list[Element] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return found


def _between(before: Iterable[Element], after: Iterable[Element]) -> Delta:
    """The changes from some ranges to others."""
    old, new = set(before), set(after)
    return Delta(remove=sorted(old - new), add=dict.fromkeys(sorted(new - old), math.inf))


def _batches(phase: Deltas, most: int, specs: Mapping[str, SetSpec]) -> Iterator[Deltas]:
    """Cut a phase into transactions of about `most` elements; ranges that overlap change together."""
    batch: Deltas = {}
    room = most
    for name, delta in phase.items():
        for part in _parts(delta, together=specs[name].interval):
            if len(part) > room and batch:
                yield batch
                batch, room = {}, most
            into = batch.setdefault(name, Delta())
            into.remove += part.remove
            into.add |= part.add
            room -= len(part)
    if batch:
        yield batch


def _parts(delta: Delta, *, together: bool) -> Iterator[Delta]:
    """The smallest changes that can be made one after the other, in order of address."""
    part, end = Delta(), -1
    changes = [(e, True) for e in delta.add] + [(e, False) for e in delta.remove]
    for element, adds in sorted(changes):
        if part and (not together or element[0] > end):
            yield part
            part, end = Delta(), -1
        if adds:
            part.add[element] = delta.add[element]
        else:
            part.remove.append(element)
        end = max(end, element[1])
    if part:
        yield part
