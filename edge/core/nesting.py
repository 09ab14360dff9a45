"""Which prefixes hold a prefix, and which lie inside it.

Invariants:
    no-ipv6-prefix-holds-an-ipv4-one: not for `Nesting`, though IPv4 rides in the same key space.
    inside-is-one-run: in an `Ordered`, what lies inside a prefix follows it without a break.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Generic, TypeVar

from edge.abi import Service
from edge.core.prefix import IPV4_SHIFT, Prefix, is_ipv4, mask

V = TypeVar("V")

Key = tuple[Service, Prefix]

_MASKS = tuple(mask(length) for length in range(129))
_U64 = (1 << 64) - 1
_CHUNK = 512
"""Keys in a chunk before it is halved, at least: adding one moves so many pointers at most, about 0.2 us."""


class Nesting(Generic[V]):
    """Values by service and prefix, found by any prefix that lies inside: which blocks hold this address?"""

    __slots__ = ("_levels",)

    def __init__(self) -> None:
        # by service << 8 | length: a plain number hashes several times as fast as an enum does
        self._levels: dict[int, dict[tuple[int, int], V]] = defaultdict(dict)

    def add(self, service: Service, prefix: Prefix, value: V) -> None:
        """Keep the value for this prefix, in place of an earlier one."""
        self._levels[service << 8 | prefix.length][prefix.hi, prefix.lo] = value

    def remove(self, service: Service, prefix: Prefix) -> None:
        """Forget the prefix; nothing happens when it is not there."""
        at = service << 8 | prefix.length
        if at in self._levels:
            self._levels[at].pop((prefix.hi, prefix.lo), None)
            if not self._levels[at]:
                del self._levels[at]

    def holding(self, service: Service, prefix: Prefix) -> Iterator[V]:
        """The values of every shorter prefix that holds this one."""
        return self._at(service, prefix, prefix.length)

    def holds(self, service: Service, prefix: Prefix) -> bool:
        """Whether there is this prefix, or one that holds it."""
        return next(self._at(service, prefix, prefix.length + 1), None) is not None

    def _at(self, service: Service, prefix: Prefix, end: int) -> Iterator[V]:
        """The values around a prefix, of lengths below the end."""
        hi, lo = prefix.hi, prefix.lo
        # a prefix shorter than an IPv4 one can be is IPv6, and holds no IPv4
        first = service << 8 | (IPV4_SHIFT if is_ipv4(hi) else 0)
        last = service << 8 | end
        for at, level in self._levels.items():
            if first <= at < last:
                high, low = _MASKS[at & 0xFF]
                value = level.get((hi & high, lo & low))
                if value is not None:
                    yield value


class Ordered:
    """A set of (service, prefix) in order of service, address and length.

    Kept as sorted chunks of plain numbers: changing one of a million costs about 2 us, and 60 bytes.
    """

    __slots__ = ("_bounds", "_chunks", "_size")

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        numbers = sorted({_number(*key) for key in keys})
        self._chunks = [numbers[at : at + _CHUNK] for at in range(0, len(numbers), _CHUNK)] or [[]]
        self._bounds = [0, *(chunk[0] for chunk in self._chunks[1:])]  # no number in a chunk is below its bound
        self._size = len(numbers)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Key]:
        """All of them, in order; change nothing meanwhile."""
        return (_key(number) for chunk in self._chunks for number in chunk)

    def __contains__(self, key: Key) -> bool:
        number = _number(*key)
        chunk = self._chunks[bisect_right(self._bounds, number) - 1]
        at = bisect_left(chunk, number)
        return at < len(chunk) and chunk[at] == number

    def add(self, key: Key) -> None:
        """Keep this one; nothing happens when it is there."""
        number = _number(*key)
        place = bisect_right(self._bounds, number) - 1
        chunk = self._chunks[place]
        at = bisect_left(chunk, number)
        if at < len(chunk) and chunk[at] == number:
            return
        chunk.insert(at, number)
        self._size += 1
        if len(chunk) > 2 * _CHUNK:
            self._chunks[place : place + 1] = chunk[:_CHUNK], chunk[_CHUNK:]
            self._bounds.insert(place + 1, chunk[_CHUNK])

    def discard(self, key: Key) -> None:
        """Forget this one; nothing happens when it is not there."""
        number = _number(*key)
        place = bisect_right(self._bounds, number) - 1
        chunk = self._chunks[place]
        at = bisect_left(chunk, number)
        if at == len(chunk) or chunk[at] != number:
            return
        del chunk[at]
        self._size -= 1
        if not chunk and place:
            del self._chunks[place], self._bounds[place]

    def inside(self, service: Service, prefix: Prefix) -> list[Key]:
        """Those of longer prefixes that lie inside this one, in order.

        In key space: to an IPv6 prefix around IPv4's place this gives those of IPv4 too. Who asks may get too many.
        """
        first = prefix.hi << 64 | prefix.lo
        last = first | (1 << 128 - prefix.length) - 1
        # of two prefixes that begin at one address the longer comes later
        start, stop = _number(service, prefix) + 1, service << 136 | last << 8 | 0xFF
        found: list[int] = []
        place = bisect_right(self._bounds, start) - 1
        while place < len(self._chunks) and self._bounds[place] <= stop:
            chunk = self._chunks[place]
            found += chunk[bisect_left(chunk, start) : bisect_right(chunk, stop)]
            place += 1
        return [_key(number) for number in found]

    def after(self, last: Key | None, most: int) -> list[Key]:
        """The `most` that come after this one (which need not be there), or the first where there is no last."""
        number = -1 if last is None else _number(*last)
        place = max(0, bisect_right(self._bounds, number) - 1)
        at = bisect_right(self._chunks[place], number)
        found = self._chunks[place][at : at + most]
        for chunk in islice(self._chunks, place + 1, None):
            if len(found) >= most:
                break
            found += chunk[: most - len(found)]
        return [_key(number) for number in found]


def _number(service: Service, prefix: Prefix) -> int:
    """A plain number that sorts as wanted, and compares several times as fast as the pair does."""
    return service << 136 | prefix.hi << 72 | prefix.lo << 8 | prefix.length


def _key(number: int) -> Key:
    return Service(number >> 136), Prefix(number >> 72 & _U64, number >> 8 & _U64, number & 0xFF)
