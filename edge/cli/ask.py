"""The verbs that ask the daemon: status, explain, list, block, unblock, allow, unallow."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edge.cli.session import Session

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LONGEST_S = 10 * 365 * 86400
SERVICES = ("all", "mx", "submission")


def duration(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """A time span such as 30s, 10m, 2h, 7d or 1h30m as seconds: more than 0, at most ten years."""
    if value is None:
        return None
    if not re.fullmatch(r"(?:[0-9]{1,9}[smhd])+", value):
        raise click.BadParameter(f"expected a time such as 30s, 10m, 2h or 7d, found {value!r}", ctx, param)
    seconds = sum(int(number) * UNITS_S[unit] for number, unit in re.findall(r"([0-9]+)([smhd])", value))
    if not 0 < seconds <= LONGEST_S:
        raise click.BadParameter(
            f"expected more than 0s and at most {LONGEST_S // 86400}d, found {value!r}", ctx, param
        )
    return float(seconds)


def prefix_text(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A prefix or an address, checked here so that a slip is named before the daemon is asked."""
    from edge.core.prefix import Prefix
    from edge.errors import InputError

    try:
        if value is not None:
            Prefix.parse(value)
    except InputError as error:
        raise click.BadParameter(str(error), ctx, param) from None
    return value


def _asks(function: Callable[..., None]) -> Callable[..., None]:
    """The options of every verb that asks the daemon."""
    function = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")(function)
    function = click.option(
        "--socket", type=click.Path(path_type=Path), help="The daemon's socket (default: control.socket)."
    )(function)
    return click.pass_obj(function)


def _service(function: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--service", type=click.Choice(SERVICES), default="all", show_default=True, help="Which service it is about."
    )(function)


@click.command()
@_asks
def status(session: Session, socket: Path | None, as_json: bool) -> None:
    """Show what the daemon and the kernel are doing."""
    answer = _ask(session, socket, "status")
    _show(answer, as_json, "status")


@click.command()
@click.argument("what", metavar="ADDRESS|PREFIX", callback=prefix_text)
@click.option("--service", type=click.Choice(SERVICES[1:]), default="mx", show_default=True)
@_asks
def explain(session: Session, what: str, service: str, socket: Path | None, as_json: bool) -> None:
    """Say what would happen to a sender, and why."""
    answer = _ask(session, socket, "explain", what=what, service=service)
    _show(answer, as_json, "explain")


@click.command(name="list")
@click.option("--standing", type=click.Choice(("block", "allow", "good", "suspect", "bad")), help="Only this standing.")
@click.option("--contained", callback=prefix_text, metavar="PREFIX", help="Only entries inside or around this prefix.")
@_asks
def list_(session: Session, standing: str | None, contained: str | None, socket: Path | None, as_json: bool) -> None:
    """List the entries in force: worst standing first."""
    wanted = {"standing": standing, "contained": contained}
    answer = _ask(session, socket, "list", **{key: value for key, value in wanted.items() if value is not None})
    _show(answer, as_json, "entries")


def _put(verb: str, text: str) -> click.Command:
    """`block` or `allow`."""

    @click.command(name=verb, help=text)
    @click.argument("prefix", callback=prefix_text)
    @_service
    @click.option("--for", "for_s", callback=duration, metavar="TIME", help="30s, 10m, 2h, 7d (default: until undone).")
    @click.option("--reason", default="", help="Kept with the entry and shown by list and explain.")
    @_asks
    def put(
        session: Session,
        prefix: str,
        service: str,
        for_s: float | None,
        reason: str,
        socket: Path | None,
        as_json: bool,
    ) -> None:
        from edge.core.prefix import Prefix

        if verb == "block" and Prefix.parse(prefix).length == 128:
            click.echo(f"note: {prefix} is one of 2^64 addresses of its /64; its owner can take another", err=True)
        answer = _ask(session, socket, verb, prefix=prefix, service=service, for_s=for_s, reason=reason)
        _show_change(answer, as_json, f"{prefix}: {verb}, service {service}")

    return put


def _drop(verb: str, help_text: str) -> click.Command:
    """`unblock` or `unallow`."""

    @click.command(name=verb, help=help_text)
    @click.argument("prefix", callback=prefix_text)
    @_service
    @_asks
    def drop(session: Session, prefix: str, service: str, socket: Path | None, as_json: bool) -> None:
        answer = _ask(session, socket, verb, prefix=prefix, service=service)
        _show_change(answer, as_json, f"{prefix}: {verb}, service {service}")

    return drop


def _ask(session: Session, socket: Path | None, verb: str, **arguments: Any) -> dict[str, Any]:
    """The daemon's answer; the socket is the one given, else the configured one."""
    from edge.control import call

    path = socket or Path(session.config().control.socket)
    return call(path, verb, **arguments)


def _show(answer: dict[str, Any], as_json: bool, how: str) -> None:
    """Print an answer: as JSON, or with the function of edge.render that is called `how`."""
    if as_json:
        _print_json(answer)
        return
    from edge import render

    getattr(render, how)(render.console(sys.stdout), answer)


def _show_change(answer: dict[str, Any], as_json: bool, what: str) -> None:
    if as_json:
        _print_json(answer)
        return
    from edge import render

    render.changed(render.console(sys.stdout), answer, what)


def _print_json(answer: dict[str, Any]) -> None:
    click.echo(json.dumps(answer, indent=2))


COMMANDS: tuple[click.Command, ...] = (
    status,
    explain,
    list_,
    _put("block", "Refuse new connections from a prefix."),
    _drop("unblock", "Take back an operator's block of a prefix, and end a learned one at just this prefix."),
    _put("allow", "Never limit or refuse a prefix."),
    _drop("unallow", "Take back an operator's allow of a prefix."),
)
