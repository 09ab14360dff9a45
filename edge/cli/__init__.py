"""The command `edge`: what each verb takes, and which exit code it ends with.

Verbs that work on this host (edge.cli.host) import what they need when they run, so that `edge version` is quick and
the daemon never loads the compiler. Verbs that ask the daemon (edge.cli.ask) only talk to its socket.

Exit codes: 0 done, 64 called wrongly, 65 input refused, 69 kernel, nftables or daemon unavailable, 70 internal error,
78 configuration, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from edge.cli import ask, host
from edge.cli.session import Session
from edge.errors import EdgeError, UsageError

INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""

COMMANDS = (*ask.COMMANDS, *host.COMMANDS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every error is one message on standard error."""
    # numpy's linear algebra is not used; its threads, one a CPU, would spin for a tenth of a second when it is imported
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    session = Session()
    try:
        result = _commands().main(
            args=None if arguments is None else list(arguments), prog_name="edge", standalone_mode=False, obj=session
        )
    except click.ClickException as error:
        error.show()
        return UsageError.exit_code
    except click.Abort:
        return INTERRUPTED
    except EdgeError as error:
        if session.debug:
            raise
        click.echo(f"edge: {error}", err=True)
        return error.exit_code
    except Exception as error:  # the last place that can turn a defect into a message and a code
        if session.debug:
            raise
        click.echo(
            f"edge: internal error: {type(error).__name__}: {error} (`edge --debug ...` shows the traceback)",
            err=True,
        )
        return EdgeError.exit_code
    return result if isinstance(result, int) else 0


def _commands() -> click.Group:
    """The group with all its verbs."""

    @click.group(name="edge", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
    @click.option(
        "--config",
        "config_path",
        envvar="EDGE_CONFIG",
        type=click.Path(path_type=Path),
        help="Configuration file (default: /etc/edge/edge.toml).",
    )
    @click.option("--debug", is_flag=True, help="Log more, and show tracebacks.")
    @click.pass_obj
    def edge(session: Session, config_path: Path | None, debug: bool) -> None:
        """Limits and blocks SMTP connections by IPv6 prefix, in the kernel, on evidence."""
        session.config_path = config_path
        session.debug = debug

    for command in COMMANDS:
        edge.add_command(command)
    return edge


if __name__ == "__main__":
    sys.exit(main())
