"""The verbs that work on this host: load, run, detach, check-config, packets, lab, version."""

from __future__ import annotations

import gc
import sys

import click

from edge.cli.session import Session


@click.command()
@click.option("--replace", is_flag=True, help="Displace an XDP program that is not ours.")
@click.option("--user", help="Give the pins to this user, as whom the daemon will run.")
@click.pass_obj
def load(session: Session, replace: bool, user: str | None) -> None:
    """Compile and attach the kernel programs, as root.

    What runs already is adopted; an upgrade swaps the program without a gap. Needed once before an unprivileged daemon.
    """
    config = session.logged_config()
    from edge.kernel import loader

    loader.load(config, replace=replace, user=user)


@click.command()
@click.option("--replace", is_flag=True, help="Displace an XDP program that is not ours.")
@click.pass_obj
def run(session: Session, replace: bool) -> int:
    """Run the daemon in the foreground.

    As root it loads the kernel programs first; as another user it needs `edge load` to have been run.
    """
    # what is imported stays: looking for garbage among it takes a tenth of the time until the first tick
    gc.disable()
    try:
        config = session.logged_config()
        from edge import daemon

        gc.freeze()
    finally:
        gc.enable()
    return daemon.run(config, replace=replace)


@click.command()
@click.pass_obj
def detach(session: Session) -> None:
    """Take everything of ours out of the kernel.

    Programs, links, maps and pins go; limits end with that. Stop the daemon first.
    """
    config = session.logged_config()
    from edge.kernel import loader

    removed = loader.detach(config)
    click.echo("removed: " + ", ".join(removed) if removed else f"nothing of ours at {config.paths.pins}")


@click.command(name="check-config")
@click.option(
    "--print-defaults", is_flag=True, help="Print a complete commented file with the defaults, and check nothing."
)
@click.pass_obj
def check_config(session: Session, print_defaults: bool) -> None:
    """Say what is wrong with the configuration.

    Touches nothing. Exit 78 when the daemon would refuse it; warnings alone are no error.
    """
    from edge.config import DEFAULT_PATH, default_text, warnings

    if print_defaults:
        click.echo(default_text(), nl=False)
        return
    config = session.config()
    path = session.config_path or DEFAULT_PATH
    for warning in warnings(config):
        click.echo(f"{path}: warning: {warning}", err=True)
    there = session.config_path is not None or path.exists()
    click.echo(f"{path}: usable, mode {config.mode}" if there else f"{path}: not there, defaults apply")


@click.command()
@click.argument("capture", metavar="CAPTURE", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--ports", metavar="LIST|all", help="Protect these ports (25,2525) instead of the mx ports.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a packet.")
@click.pass_obj
def packets(session: Session, capture: str, ports: str | None, as_json: bool) -> None:
    """Say what the program decides of every packet of a capture.

    CAPTURE is a pcap or pcapng file, - for standard input. Runs as root on a private copy of program and tables, with
    the configuration in mode enforce and the capture's own time; what a running daemon has learned is not in it.
    """
    config = session.logged_config()
    from edge.packets import run as run_packets

    run_packets(config, capture, ports, as_json=as_json, out=sys.stdout, err=sys.stderr)


@click.command()
@click.option("--mta", type=click.Choice(("auto", "postfix", "embedded")), default="auto", show_default=True)
@click.option("--seconds", type=int, help="How long mail is sent.")
@click.option("--keep", is_flag=True, help="Leave everything in place for a look around.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def lab(mta: str, seconds: int | None, keep: bool, as_json: bool) -> int:
    """Show it at work against real mail and attacks.

    Runs in network namespaces of its own, as root, for about a minute, and removes everything it made.
    """
    from edge.lab.main import run as run_lab

    return run_lab(mta=mta, json_output=as_json, keep=keep, seconds=seconds)


@click.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    click.echo(installed("edge-throttler"))


COMMANDS: tuple[click.Command, ...] = (load, run, detach, check_config, packets, lab, version)
