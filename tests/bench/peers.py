"""What else could do the job: each set up in a lane, in the form its own documentation recommends.

Every rule that limits is followed by one that drops, so that all frames end in the contender, admitted or not.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from typing import Any

from edge.abi import Mode, Service
from edge.kernel import nft_ruleset
from edge.kernel.nft_ruleset import Layout
from edge.kernel.nft_sets import Element, all_specs
from tests.bench.limiter import DECOYS, source_hi, source_lo
from tests.bench.network import RECEIVING, Lane

Counts = Callable[[], dict[str, int]]

ROOM = 1 << 23
"""Prefixes a meter may hold: more than a run sends, so that it keeps count of each."""

HASHLIMIT_ROOM = 1 << 20
"""The most that hashlimit takes (HASHLIMIT_MAX_SIZE in xt_hashlimit.c). When it is full it drops newcomers."""

RATE = "10/second"
BURST = 5
KEEP_S = 3600
"""Timeout of elements: a prefix seen once stays, as it does in our rows."""

SYN_ONLY = "tcp dport 25 tcp flags & (syn|ack) == syn"
HOOKS = {
    "ingress": ("netdev", f"type filter hook ingress device {RECEIVING} priority 0"),
    "input": ("inet", "type filter hook input priority 0"),
    "raw": ("inet", "type filter hook prerouting priority -300"),
}
ENDS = ("limited", "admitted", "blocked", "enforce")
BLOCK_SETS = (128, 64, 56, 48, 32)


def nft_meter(lane: Lane, hook: str) -> Counts:
    """A set of /64s with a limit each: what the nftables wiki calls a meter."""
    family, place = HOOKS[hook]
    ipv6 = "" if family == "netdev" else "meta nfproto ipv6 "
    lane.attach_nothing()
    lane.inside(
        ["nft", "-f", "-"],
        f"""table {family} bench {{
            set seen {{ type ipv6_addr; flags dynamic,timeout; size {ROOM}; timeout {KEEP_S}s; }}
            chain c {{ {place}; policy accept;
                {ipv6}{SYN_ONLY} add @seen {{ ip6 saddr & ffff:ffff:ffff:ffff:: limit rate over {RATE} \
burst {BURST} packets }} counter drop comment "limited"
                counter drop comment "admitted"
            }}
        }}""",
    )
    return lambda: _nft_counts(lane)


def nft_block_sets(lane: Lane, count: int) -> Counts:
    """Five sets by hand, one a level, most specific first; the shortest rules that do it."""
    lane.attach_nothing()
    sets, rules = [], []
    for length in BLOCK_SETS:
        mask = _text((1 << 128) - (1 << 128 - length))
        sets.append(
            f"set s{length} {{ type ipv6_addr; flags timeout; elements = {{ {', '.join(_blocked(length, count))} }} }}"
        )
        masked = "" if length == 128 else f" & {mask}"
        rules.append(f'ip6 saddr{masked} @s{length} counter drop comment "blocked {length}"')
    lane.inside(
        ["nft", "-f", "-"],
        f"""table inet bench {{
            {chr(10).join(sets)}
            chain blocked {{
                {chr(10).join(rules)}
            }}
            chain c {{ {HOOKS["raw"][1]}; policy accept;
                meta nfproto ipv6 {SYN_ONLY} jump blocked
                counter drop comment "admitted"
            }}
        }}""",
    )
    return lambda: _nft_counts(lane)


def nft_own_table(lane: Lane, count: int) -> Counts:
    """The same entries in the table that the daemon keeps: allow and block sets of every length, both services."""
    lane.attach_nothing()
    layout = Layout(table="edge", priority=-300, ports={Service.MX: (25,), Service.SUBMISSION: (465, 587)})
    specs = all_specs()
    commands = nft_ruleset.create(layout, Mode.ENFORCE)
    for length in BLOCK_SETS:
        elements: dict[Element, int | None] = {(n, n): KEEP_S for n in _blocked_numbers(length, count)}
        commands.append(nft_ruleset.add("edge", specs[f"mx_block_{length}"], elements))
    lane.inside(["nft", "-j", "-f", "-"], json.dumps({"nftables": commands}))
    lane.inside(
        ["nft", "-f", "-"],
        """table inet end {
            chain c { type filter hook prerouting priority -299; policy accept;
                counter drop comment "admitted"
            }
        }""",
    )
    return lambda: _nft_counts(lane)


def hashlimit(lane: Lane) -> Counts:
    """ip6tables hashlimit per /64 in the raw table, the earliest there is."""
    lane.attach_nothing()
    ip6tables = _ip6tables()
    match = "-m hashlimit --hashlimit-mode srcip --hashlimit-srcmask 64 --hashlimit-name bench"
    limit = f"--hashlimit-above 10/sec --hashlimit-burst {BURST} --hashlimit-htable-size {HASHLIMIT_ROOM}"
    keep = f"--hashlimit-htable-max {HASHLIMIT_ROOM} --hashlimit-htable-expire {KEEP_S * 1000}"
    _append(lane, ip6tables, f"-p tcp --dport 25 --syn {match} {limit} {keep} -j DROP")
    _append(lane, ip6tables, "-j DROP")
    return lambda: _iptables_counts(lane, ip6tables, "limited")


def ipset(lane: Lane, count: int) -> Counts:
    """ipset hash:net asked by ip6tables in the raw table."""
    lane.attach_nothing()
    lines = ["create bench hash:net family inet6 maxelem 1048576 hashsize 262144"]
    lines += [f"add bench {text}/64" for text in _blocked(64, count)]
    lane.inside(["ipset", "restore"], "\n".join(lines) + "\n")
    ip6tables = _ip6tables()
    _append(lane, ip6tables, "-p tcp --dport 25 --syn -m set --match-set bench src -j DROP")
    _append(lane, ip6tables, "-j DROP")
    return lambda: _iptables_counts(lane, ip6tables, "blocked 64")


_XDP_FILTER = """set -e
mount -t bpf bpf /sys/fs/bpf
xdp-filter load -m native -f ipv6 "$0"
while read -r address; do xdp-filter ip -m src "$address"; done
"""


def xdp_filter(lane: Lane, count: int) -> Counts:
    """xdp-filter with a list of addresses: it knows no prefixes. Its pins live in a mount namespace that ends at once;
    the program stays on the interface."""
    addresses = "\n".join(_text(source_hi(n) << 64 | source_lo(n)) for n in range(count)) + "\n"
    lane.inside(["unshare", "--mount", "--propagation", "private", "sh", "-c", _XDP_FILTER, RECEIVING], addresses)
    return dict  # it keeps its counters in pins that are gone; the stack behind drops nothing, and answers nothing


def _ip6tables() -> str:
    """The classic backend where it is installed: it is the faster one."""
    return "ip6tables-legacy" if shutil.which("ip6tables-legacy") else "ip6tables"


def _append(lane: Lane, ip6tables: str, rule: str) -> None:
    lane.inside([ip6tables, "-w", "-t", "raw", "-A", "PREROUTING", *rule.split()])


def _iptables_counts(lane: Lane, ip6tables: str, first: str) -> dict[str, int]:
    rows = lane.inside([ip6tables, "-w", "-t", "raw", "-nvxL", "PREROUTING"]).splitlines()[2:]
    return {word: int(row.split()[0]) for word, row in zip((first, "admitted"), rows, strict=True)}


def _nft_counts(lane: Lane) -> dict[str, int]:
    """Packets by comment of the rules that end a packet's way. Only the whole ruleset is listed without its elements:
    for one table or chain, nft 1.0.6 reads and sorts a million of them."""
    text = lane.inside(["nft", "-t", "list", "ruleset"])
    found = re.findall(r'counter packets (\d+) bytes \d+.*comment "([^"]+)"', text)
    return {word: int(count) for count, word in found if int(count) and word.partition(" ")[0] in ENDS}


def _blocked_numbers(length: int, count: int) -> list[int]:
    """The /64s of the first sources; at other lengths a hundred that no source meets."""
    if length == 64:
        return [source_hi(n) << 64 for n in range(count)]
    return [DECOYS + (n << 32) << 64 | int(length == 128) for n in range(100)]


def _blocked(length: int, count: int) -> list[str]:
    return [_text(number) for number in _blocked_numbers(length, count)]


def _text(number: int) -> str:
    words: list[Any] = [f"{number >> shift & 0xFFFF:x}" for shift in range(112, -1, -16)]
    return ":".join(words)
