from pathlib import Path

import pytest

from edge.errors import UnavailableError, UsageError
from edge.lab import mta, plan
from edge.lab.mta import count_embedded, count_postfix
from edge.lab.network import Network

LOG = """\
Nov 22 08:27:49 mx postfix/smtpd[17367]: connect from unknown[2001:db8::1]
Nov 22 08:27:49 mx postfix/smtpd[17367]: EB7092188D8: client=unknown[2001:db8::1]
Nov 22 08:27:49 mx postfix/cleanup[17369]: EB7092188D8: message-id=<a.1@a.example>
Nov 22 08:27:49 mx postfix/qmgr[17310]: EB7092188D8: from=<a@b.example>, size=253, nrcpt=1 (queue active)
Nov 22 08:27:49 mx postfix/smtpd[17367]: connect from unknown[192.0.2.25]
Nov 22 08:27:49 mx postfix/smtpd[17367]: NOQUEUE: reject: RCPT from unknown[192.0.2.25]: 550 5.1.1 \
<connect from unknown[192.0.2.77]>: Recipient address rejected: User unknown in local recipient table; \
from=<a@b.example> to=<x@mx.lab.example> proto=SMTP helo=<x>
Nov 22 08:27:49 mx postfix/discard[17371]: EB7092188D8: to=<alice@mx.lab.example>, relay=none, delay=0.02, \
delays=0.01/0.01/0/0, dsn=2.0.0, status=sent (mx.lab.example)
Nov 22 08:27:49 mx postfix/cleanup[17369]: EDDEA2188D8: message-id=<a.2@a.example>
Nov 22 08:27:49 mx postfix/cleanup[17369]: EDDEA2188D8: reject: header X-Spam-Flag: YES from unknown[2001:db8::1]
Nov 22 08:27:50 mx postfix/smtpd[17367]: connect from unknown[2001:db8::1]
"""


def test_arrival_is_the_mtas_word() -> None:
    arrivals = count_postfix(LOG.splitlines(keepends=True))
    assert arrivals.connects == {"2001:db8::1": 2, "192.0.2.25": 1}
    assert arrivals.delivered == {"<a.1@a.example>"}  # the second was refused by its content


def test_a_message_that_is_only_queued_is_not_delivered() -> None:
    lines = [line for line in LOG.splitlines(keepends=True) if "discard" not in line]
    assert count_postfix(lines).delivered == set()


def test_the_embedded_servers_journal_is_counted_up_to_a_line_still_being_written() -> None:
    lines = [
        '{"event": "ready"}\n',
        '{"event": "connect", "src": "2001:db8::1"}\n',
        '{"event": "connect", "src": "2001:db8::1"}\n',
        '{"event": "accept", "src": "2001:db8::1", "message_id": "<1@a.example>"}\n',
        '{"event": "accept", "src": "2001:d',
    ]
    arrivals = count_embedded(lines)
    assert arrivals.connects == {"2001:db8::1": 2}
    assert arrivals.delivered == {"<1@a.example>"}


def test_installed_postfix_is_untouched(tmp_path: Path) -> None:
    settings = dict(line.split(" = ", 1) for line in mta.main_cf(tmp_path).splitlines())
    for key in ("queue_directory", "data_directory", "maillog_file", "maillog_file_prefixes"):
        assert settings[key].startswith(str(tmp_path))
    assert settings["alias_maps"] == settings["alias_database"] == ""
    assert settings["default_transport"].startswith("error:")
    assert all(line.split()[4] == "n" for line in mta.master_cf().splitlines())  # no chroot


def test_choose_says_what_is_missing_and_why_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Network(pid=1)
    with pytest.raises(UsageError, match="expected auto, postfix or embedded, found 'exim'"):
        mta.choose("exim", net, tmp_path, tmp_path / "events")
    monkeypatch.setattr(mta, "ADMIN_PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="install the package postfix"):
        mta.choose("postfix", net, tmp_path, tmp_path / "events")
    chosen, why = mta.choose("auto", net, tmp_path, tmp_path / "events")
    assert (chosen.name, why) == ("embedded", "Postfix is not installed")
    program = tmp_path / "postfix"
    program.touch(mode=0o755)
    chosen, why = mta.choose("auto", net, tmp_path, tmp_path / "events")
    assert (chosen.name, why) == ("postfix", "Postfix is installed")
    chosen, why = mta.choose("embedded", net, tmp_path, tmp_path / "events")
    assert (chosen.name, why) == ("embedded", "as asked")


def test_users_and_domains_of_the_plan_are_in_the_configuration(tmp_path: Path) -> None:
    text = mta.main_cf(tmp_path)
    assert all(f"{user}=ok" in text for user in plan.USERS)
    assert plan.LISTED_DOMAIN in text
