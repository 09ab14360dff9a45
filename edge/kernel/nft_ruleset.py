"""The nftables table as libnftables JSON: what to add, and what a listing says. Pure.

    chain prerouting   hook prerouting; first SYNs go to `syn`, everything else is through after one rule
    chain syn          by family and destination port to the chain of the service
    chain mx_v6, ...   per set, most specific first: allow accepts, block goes to `refuse`; each rule counts
    chain refuse       drops in `enforce`, accepts in `observe`

`accept` ends this table's say only; other tables are asked as before. nft 1.0.6 loses the comments of tables and sets
in JSON, so the layout's identity is the comment of the first rule.

Invariants:
    layout-id-names-the-layout: two tables have the same id exactly when their chains, sets and rules are the same.
    listing-gives-back-elements: elements written are the elements read, with what is left of their timeouts.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge.abi import Mode, Service
from edge.errors import UnavailableError
from edge.kernel.nft_sets import Element, SetSpec, all_specs, specs

FAMILY = "inet"
_TITLE = "edge-throttler layout "

Json = dict[str, Any]
Timeouts = Mapping[Element, int | None]
"""Elements with their timeouts in seconds; None has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the table is made from."""

    table: str
    priority: int
    ports: Mapping[Service, Sequence[int]]

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that name the chains, sets and rules."""
        text = json.dumps([_sets(self), _chains(self), _rules(self, "")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def create(layout: Layout, mode: Mode) -> list[Json]:
    """Commands that make the table with its chains, empty sets and rules."""
    return [
        {"add": {"table": {"family": FAMILY, "name": layout.table}}},
        *({"add": chain} for chain in _chains(layout)),
        *({"add": one} for one in _sets(layout)),
        *({"add": rule} for rule in _rules(layout, _TITLE + layout.id)),
        {"add": _mode_rule(layout, mode)},
    ]


def destroy(table: str) -> list[Json]:
    """Commands that remove the table whether or not it is there."""
    named = {"table": {"family": FAMILY, "name": table}}
    return [{"add": named}, {"delete": named}]


def switch(layout: Layout, mode: Mode) -> list[Json]:
    """Commands that change what `refuse` does."""
    return [{"flush": {"chain": _in(layout.table, name="refuse")}}, {"add": _mode_rule(layout, mode)}]


def add(table: str, spec: SetSpec, elements: Timeouts) -> Json:
    """The command that adds elements to a set."""
    return _elements("add", table, spec, [_element(spec, e, s) for e, s in elements.items()])


def delete(table: str, spec: SetSpec, elements: Iterable[Element]) -> Json:
    """The command that removes elements from a set."""
    return _elements("delete", table, spec, [_element(spec, e, None) for e in elements])


def flush(table: str, spec: SetSpec) -> Json:
    """The command that empties a set; for use in a transaction that fills it again."""
    return {"flush": {"set": _in(table, name=spec.name)}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What the kernel holds of a table, but for its elements."""

    shape: str  # everything but counters and handles, as text to compare
    layout_id: str  # what the first rule says
    names: frozenset[str]  # set names, and rules as chain:comment
    packets: dict[str, int]  # by rule comment


def outline(objects: Iterable[Json], table: str) -> Outline | None:
    """Understand a listing of the family's ruleset; None when the table is not in it."""
    shape: list[Json] = []
    names: set[str] = set()
    packets: dict[str, int] = {}
    title = ""
    for kind, body in (pair for item in objects for pair in item.items()):
        if kind == "metainfo" or body.get("table", body["name"] if kind == "table" else "") != table:
            continue
        shape.append({kind: _bare(body)})
        if kind == "set":
            names.add(body["name"])
        if kind == "rule":
            comment = body.get("comment", "")
            names.add(f"{body['chain']}:{comment}")
            packets[comment] = sum(e["counter"]["packets"] for e in body["expr"] if e.get("counter"))
            title = title or (comment if body["chain"] == "prerouting" else "")
    layout_id = title.removeprefix(_TITLE)
    if not shape:
        return None
    return Outline(shape=json.dumps(shape), layout_id=layout_id, names=frozenset(names), packets=packets)


def elements(objects: Iterable[Json]) -> dict[str, dict[Element, int | None]]:
    """The elements in a listing of the table by set name, with the seconds left of those with a timeout.

    UnavailableError when one is of a kind our sets cannot hold.
    """
    known = all_specs()
    found = {}
    for body in (item["set"] for item in objects if "set" in item):
        spec = known.get(body["name"])
        if spec and body["type"] == _type(spec):
            found[spec.name] = dict(_parse(e) for e in body.get("elem", ()))
    return found


def expected_names(layout: Layout, mode: Mode) -> frozenset[str]:
    """The `Listing.names` of a table that nobody has taken from or added to."""
    rules = [command["add"]["rule"] for command in create(layout, mode) if "rule" in command["add"]]
    return frozenset(all_specs()) | {f"{rule['chain']}:{rule['comment']}" for rule in rules}


def _in(table: str, **more: Any) -> Json:
    return {"family": FAMILY, "table": table, **more}


def _chains(layout: Layout) -> list[Json]:
    hook = {"type": "filter", "hook": "prerouting", "prio": layout.priority, "policy": "accept"}
    plain = ["refuse", *(_service_chain(s, v4) for s in Service for v4 in (False, True)), "syn"]
    return [
        *({"chain": _in(layout.table, name=name)} for name in plain),
        {"chain": _in(layout.table, name="prerouting", **hook)},
    ]


def _service_chain(service: Service, ipv4: bool) -> str:
    return f"{service.name.lower()}_{'v4' if ipv4 else 'v6'}"


def _sets(layout: Layout) -> list[Json]:
    return [
        {
            "set": _in(
                layout.table,
                name=spec.name,
                type=_type(spec),
                flags=["interval" if spec.interval else "timeout"],
            )
        }
        for spec in all_specs().values()
    ]


def _type(spec: SetSpec) -> str:
    return "ipv4_addr" if spec.ipv4 else "ipv6_addr"


def _rules(layout: Layout, title: str) -> list[Json]:
    syn = {"&": [{"payload": {"protocol": "tcp", "field": "flags"}}, {"|": ["syn", "ack"]}]}
    rules = [_rule(layout, "prerouting", title, [_match(syn, "syn"), {"jump": {"target": "syn"}}])]
    for service in Service:
        for ipv4 in (False, True):
            chain = _service_chain(service, ipv4)
            family = _match({"meta": {"key": "nfproto"}}, "ipv4" if ipv4 else "ipv6")
            ports = _match({"payload": {"protocol": "tcp", "field": "dport"}}, {"set": sorted(layout.ports[service])})
            rules.append(_rule(layout, "syn", chain, [family, ports, {"goto": {"target": chain}}]))
            rules += [_set_rule(layout, chain, spec) for spec in specs(service, ipv4)]
    return rules


def _set_rule(layout: Layout, chain: str, spec: SetSpec) -> Json:
    source: Json = {"payload": {"protocol": "ip" if spec.ipv4 else "ip6", "field": "saddr"}}
    if not spec.interval and spec.longest < spec.bits:
        whole = (1 << spec.bits) - 1
        source = {"&": [source, _address(spec, whole << spec.bits - spec.longest & whole)]}
    verdict: Json = {"accept": None} if spec.allow else {"goto": {"target": "refuse"}}
    return _rule(layout, chain, spec.name, [_match(source, f"@{spec.name}"), {"counter": None}, verdict])


def _mode_rule(layout: Layout, mode: Mode) -> Json:
    verdict: Json = {"drop": None} if mode is Mode.ENFORCE else {"accept": None}
    return _rule(layout, "refuse", mode.name.lower(), [{"counter": None}, verdict])


def _rule(layout: Layout, chain: str, comment: str, expr: list[Json]) -> Json:
    return {"rule": _in(layout.table, chain=chain, comment=comment, expr=expr)}


def _match(left: Json, right: Any) -> Json:
    return {"match": {"op": "==", "left": left, "right": right}}


def _elements(verb: str, table: str, spec: SetSpec, elements: list[Any]) -> Json:
    return {verb: {"element": _in(table, name=spec.name, elem=elements)}}


def _element(spec: SetSpec, element: Element, timeout_s: int | None) -> Any:
    first, last = element
    text = _address(spec, first)
    if first != last:
        return {"range": [text, _address(spec, last)]}
    return text if timeout_s is None else {"elem": {"val": text, "timeout": timeout_s}}


def _address(spec: SetSpec, number: int) -> str:
    return socket.inet_ntop(socket.AF_INET if spec.ipv4 else socket.AF_INET6, number.to_bytes(spec.bits // 8, "big"))


def _parse(element: Any) -> tuple[Element, int | None]:
    """An element of a listing, and the seconds it has left."""
    left_s = None
    if isinstance(element, dict) and "elem" in element:
        body = element["elem"]
        left_s = body.get("expires", 0) if "timeout" in body else None
        element = body["val"]
    if isinstance(element, str):
        number, _ = _number(element)
        return (number, number), left_s
    if "range" in element:
        first, last = element["range"]
        return (_number(first)[0], _number(last)[0]), left_s
    if "prefix" in element:
        number, bits = _number(element["prefix"]["addr"])
        return (number, number | (1 << bits - element["prefix"]["len"]) - 1), left_s
    raise UnavailableError(f"nftables set element: expected an address, prefix or range, found {str(element)[:80]}")


def _number(text: str) -> tuple[int, int]:
    """An address as a number, and its length in bits."""
    ipv6 = ":" in text
    packed = socket.inet_pton(socket.AF_INET6 if ipv6 else socket.AF_INET, text)
    return int.from_bytes(packed, "big"), 128 if ipv6 else 32


def _bare(body: Json) -> Json:
    """An object of a listing without what changes by itself."""
    bare = {k: v for k, v in body.items() if k not in ("handle", "elem")}
    if "expr" in bare:
        bare["expr"] = [{"counter": None} if "counter" in e else e for e in bare["expr"]]
    return bare
