"""How answers look to people: plain tables that fit 80 to 100 columns, colour only on a terminal.

Text from the daemon may hold what a client chose (a reason, a name): it is shown with control characters escaped and
is never read as markup. `--json` shows the same answers without this module.

Invariants:
    output-cannot-be-forged: no text of an answer reaches the terminal as a control sequence or as markup.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from edge.log import printable

PIPED_WIDTH = 100
"""Columns when the output is not a terminal, which has no width of its own."""

STYLES = {
    "block": "bold red",
    "bad": "red",
    "suspect": "yellow",
    "limit": "yellow",
    "good": "green",
    "allow": "green",
    "pass": "green",
    "enforce": "bold",
}

STANDINGS = ("block", "bad", "suspect", "good", "allow")
"""Worst first: what an operator looks for."""

Answer = Mapping[str, Any]


def console(stream: TextIO) -> Console:
    """A console on `stream`; colour and the real width only where it is a terminal."""
    terminal = stream.isatty()
    return Console(file=stream, width=None if terminal else PIPED_WIDTH, highlight=False, soft_wrap=False)


def status(out: Console, answer: Answer) -> None:
    """`edge status`."""
    tick, nft = answer.get("tick") or {}, answer.get("nftables") or {}
    mode = str(answer.get("mode", "?"))
    head = _text(
        f"edge {answer.get('version', '?')}, process {answer.get('pid', '?')}, up {_span(answer.get('uptime_s'))}, "
    )
    _say(out, head + _styled(mode) + Text(" (judges and counts, refuses nothing)" if mode == "observe" else ""))
    _say(
        out,
        _text(
            f"tick {tick.get('count', 0)} every {_span(tick.get('interval_s'))}, last {tick.get('last_ms', 0):.1f} ms,"
            f" {tick.get('late', 0)} late; heartbeat {_span(answer.get('heartbeat_age_s'))} ago"
        ),
    )
    _say(out, _text(f"nftables {_nftables(nft)}"))
    for interface in answer.get("interfaces") or ():
        others = [name for name in interface.get("for") or () if name != interface.get("name")]
        whom = f" (for {', '.join(others)})" if others else ""
        _say(
            out,
            _text(
                f"interface {interface.get('name')}{whom}: XDP {interface.get('xdp')},"
                f" program {interface.get('program_id')}"
            ),
        )
    entries = answer.get("entries") or {}
    _print(
        out, ("Entries", *STANDINGS), [("in force", *(str(entries.get(s, 0)) for s in STANDINGS))], right=range(1, 6)
    )
    counters = sorted(
        (answer.get("counters") or {}).items(), key=lambda item: (-item[1]["dropped"], -item[1]["passed"], item[0])
    )
    busy = [(reason, f"{n['passed']:,}", f"{n['dropped']:,}") for reason, n in counters if n["passed"] or n["dropped"]]
    _print(out, ("Packets", "passed", "dropped"), busy or [("none yet", "0", "0")], right=(1, 2))
    rows = [
        (f"/{level}", f"{n['active']:,}", f"{n['capacity']:,}", _percent(n["active"], n["capacity"]))
        for level, n in sorted((answer.get("rows") or {}).items(), key=lambda item: -int(item[0]))
    ]
    _print(out, ("Rows", "active", "capacity", "used"), rows, right=(1, 2, 3))
    sources = [
        (
            s["name"],
            f"{s['events']:,}",
            f"{s['errors']:,}",
            f"{s['dropped']:,}",
            s.get("trouble") or _ago(s.get("last_event_age_s")),
        )
        for s in answer.get("evidence") or ()
    ]
    _print(out, ("Evidence", "events", "refused", "dropped", "last"), sources, right=(1, 2, 3, 4))


def entries(out: Console, answer: Answer) -> None:
    """`edge list`, and what `edge block` and its like changed."""
    found = sorted(answer.get("entries") or (), key=_entry_order)
    if not found:
        out.print("no entries")
        return
    rows = [
        (
            entry.get("prefix", "?"),
            entry.get("standing", "?"),
            entry.get("origin", "?"),
            entry.get("service", "?"),
            _expiry(entry.get("expires_in_s")),
            _places(entry),
        )
        for entry in found
    ]
    reasons = [str(entry.get("reason", "")) for entry in found]
    _print(out, ("Prefix", "standing", "origin", "service", "expires", "in"), rows, notes=reasons)


def explain(out: Console, answer: Answer) -> None:
    """`edge explain`: the verdict first, then what it rests on, level by level, then how it came about."""
    query, keyed_as = str(answer.get("query")), str(answer.get("keyed_as"))
    keyed = "" if keyed_as.partition("/")[0] == query.partition("/")[0] else f" (keyed as {keyed_as})"
    _say(out, _text(f"{query}{keyed}, service {answer.get('service')}: ") + _verdict(answer.get("verdict") or {}))
    levels = sorted(answer.get("levels") or (), key=_level_order)
    titles: tuple[str, ...] = ("Evidence", "bad", "good", "events", "last", "prior", "mean", "bound", "bad/good below")
    _print(out, titles, [_evidence(level) for level in levels], right=range(1, 9))
    titles = ("Kernel", "limit", "left", "open", "completed", "distinct", "prefix")
    _print(out, titles, [_kernel(level) for level in levels], right=(2, 3, 4, 5))
    out.print()
    for level in levels:
        entry = level.get("entry")
        if entry:
            standing = _styled(str(entry.get("standing")))
            seconds = entry.get("expires_in_s")
            endless = "by configuration" if entry.get("origin") == "exempt" else "until undone"
            lasts = endless if seconds is None else f"for another {_span(seconds)}"
            rest = f" ({entry.get('origin')}) {lasts}: {entry.get('reason')}"
            _say(out, _text(f"{level.get('prefix')}: ") + standing + _text(rest))
        if level.get("outlook"):
            _say(out, _text(f"{level.get('prefix')}: {level['outlook']}"))
    history = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row.get("at") or 0)),
            row.get("action", "?"),
            row.get("standing", "?"),
            row.get("prefix", "?"),
        )
        for row in answer.get("history") or ()
    ]
    reasons = [str(row.get("reason", "")) for row in answer.get("history") or ()]
    _print(out, ("History (UTC)", "action", "standing", "prefix"), history, notes=reasons)


def changed(out: Console, answer: Answer, what: str) -> None:
    """What a block, allow or their undoing did."""
    _say(out, _text(what if answer.get("changed") else f"nothing to do: {what}"))
    if answer.get("entries"):
        entries(out, answer)
    for entry in answer.get("removed") or ():
        gone = f"removed: {entry.get('prefix')}, service {entry.get('service')}, {entry.get('origin')}"
        _say(out, _text(f"{gone}: {entry.get('reason')}"))
    if answer.get("still_blocked_by"):
        _say(out, _text("still blocked by " + ", ".join(answer["still_blocked_by"])))


def _print(
    out: Console,
    titles: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Container[int] = (),
    notes: Sequence[str] = (),
) -> None:
    """One table below a blank line; nothing when it has no rows. No cell is ever cut or wrapped.

    `right` are the columns set to the right; a row's note stands behind it where the width allows, else below it.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if not cells:
        return
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    out.print()
    _say(out, Text("  ".join(_padded(*cell, right) for cell in zip(titles, widths, count())).rstrip(), style="bold"))
    room = out.width - sum(widths) - 2 * len(widths)
    for number, row in enumerate(cells):
        line = Text("  ").join(
            Text(_padded(cell, width, place, right), style=STYLES.get(cell, ""))
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        note = printable(notes[number]) if notes else ""
        if note and len(note) > room:
            line.rstrip()
            _say(out, line)
            _say(out, Text(f"    {note}"))
        else:
            _say(out, line + Text(f"  {note}" if note else ""))


def _say(out: Console, text: Text) -> None:
    """One line; a terminal that is too narrow wraps it itself, so that words can be copied whole."""
    text.rstrip()
    out.print(text, soft_wrap=True)


def _padded(cell: str, width: int, place: int, right: Container[int]) -> str:
    return cell.rjust(width) if place in right else cell.ljust(width)


def _evidence(level: Answer) -> tuple[str, ...]:
    prior, prior_from = _number(level.get("prior")), str(level.get("prior_from"))
    return (
        _length_text(level),
        _number(level.get("bad")),
        _number(level.get("good")),
        str(level.get("events", "-")),
        _ago(level.get("last_event_age_s")),
        f"{prior} from /{prior_from.rpartition('/')[2]}" if "/" in prior_from else prior,
        _number(level.get("mean")),
        _number(level.get("bound")),
        f"{level.get('bad_children', '-')}/{level.get('good_children', '-')}",
    )


def _kernel(level: Answer) -> tuple[str, ...]:
    limit, counted = level.get("limit") or {}, level.get("connections") or {}
    most = counted.get("most_open")
    return (
        _length_text(level),
        f"{limit.get('rate_per_min'):g}/min, burst {limit.get('burst')}" if limit.get("rate_per_min") else "none",
        _number(level.get("tokens_left")),
        f"{counted.get('open', '-')}" + (f" of {most}" if most else ""),
        f"{counted.get('completed', '-')}",
        "-" if counted.get("distinct") is None else f"{counted['distinct']:.0f}",
        str(level.get("prefix", "?")) + (", forged" if level.get("forged") else ""),
    )


def _verdict(verdict: Answer) -> Text:
    text = _styled(str(verdict.get("action", "?")))
    reason, prefix = verdict.get("reason"), verdict.get("prefix")
    return text + _text((f" by {prefix}" if prefix else "") + (f": {reason}" if reason else ""))


def _nftables(nft: Answer) -> str:
    if not nft.get("enabled"):
        return "off"
    state = "in sync" if nft.get("in_sync") else "NOT in sync"
    return f"{state}, {nft.get('elements', 0)} elements, {nft.get('repairs', 0)} repairs"


def _places(entry: Answer) -> str:
    """Where an entry is installed, in as few letters as can be read."""
    places = [name for name, key in (("xdp", "in_kernel"), ("nft", "in_nftables")) if entry.get(key)]
    return "+".join(places) or "-"


def _entry_order(entry: Answer) -> int:
    """Worst standing first; within one the daemon's order, by address."""
    standing = entry.get("standing")
    return STANDINGS.index(standing) if standing in STANDINGS else len(STANDINGS)


def _length_text(level: Answer) -> str:
    """The length as people write it: of an IPv4 prefix the IPv4 one."""
    return "/" + str(level.get("prefix", "/?")).rpartition("/")[2]


def _level_order(level: Answer) -> int:
    """Longest prefix first."""
    length = _length_text(level)[1:]
    return -int(length) if length.isdecimal() else 0


def _styled(text: str) -> Text:
    return Text(printable(text), style=STYLES.get(text, ""))


def _text(text: str) -> Text:
    return Text(printable(text))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _expiry(seconds: float | None) -> str:
    return "never" if seconds is None else _span(max(seconds, 0))


def _ago(seconds: float | None) -> str:
    return "-" if seconds is None else f"{_span(seconds)} ago"


def _span(seconds: float | None) -> str:
    """A time span in its two largest units: 850 ms, 42 s, 3 min 10 s, 2 h 5 min, 7 d."""
    if seconds is None:
        return "?"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = int(seconds % size // smaller)
            return f"{int(seconds // size)} {unit}" + (f" {rest} {smaller_unit}" if rest else "")
    return f"{seconds} s"
