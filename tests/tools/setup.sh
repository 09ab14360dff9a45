#!/usr/bin/env bash
# Install what a make target needs: packages of the distribution (as root, by apt-get) and .venv.
#
#   setup.sh venv | check | demo | test | bench
#
# It calls apt-get only when a package is missing, removes no package, starts no service, and leaves an
# installed mail server alone. A second call only looks.
set -euo pipefail
cd -P "$(dirname "$0")/../.."

readonly STAMP=.venv/.edge-setup
readonly POLICY=/usr/sbin/policy-rc.d
readonly POLICY_MARK='# edge-throttler: no service starts while packages are being installed'
readonly VERSION='import sys; print(sys.version_info[:2])'
readonly LOCK=/run/lock/edge-throttler-setup.lock

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 69; }

# The packages of a target, one "name: reason" a line.
wanted() {
    echo 'python3-venv: makes .venv'
    case $1 in venv | demo | test | bench)
        echo 'python3-bpfcc: bcc, the compiler of the kernel programs, and libbpf'
        echo 'python3-nftables: nftables from Python'
        echo 'nftables: the nft command'
        echo 'iproute2: ip, for interfaces and namespaces'
        libpcap_present || echo 'libpcap0.8: reads captures for edge packets'
        ;;
    esac
    case $1 in check | test)
        echo 'gcc: compiles bpf/abi.h, and the pure C headers for tests'
        echo 'libc6-dev: C headers for it'
        ;;
    esac
    case $1 in test)
        echo 'prometheus: promtool, and the scrape test'
        echo 'python3-apt: what Ansible drives apt with'
        echo 'tshark: the decoder that edge packets is compared with'
        mta_present || echo 'postfix: the real mail server of the end-to-end tests'
        ;;
    esac
    # What the limiter is compared with. The benchmark says which of the last three it did not find.
    case $1 in bench)
        echo 'ethtool: lets a veth without XDP take redirected frames'
        echo 'iptables: ip6tables and its hashlimit'
        echo 'ipset: sets of networks for ip6tables'
        ! known xdp-tools || echo 'xdp-tools: xdp-filter'
        ;;
    esac
}

# Whether the distribution has the package at all.
known() {
    [[ -n $(apt-cache policy "$1" | awk '/Candidate:/ && $2 != "(none)"') ]]
}

# By the library: its package has another name since Debian 13 and Ubuntu 24.04, and answers to the old one.
libpcap_present() {
    PATH=$PATH:/sbin:/usr/sbin ldconfig -p | grep -E 'libpcap\.so\.(0\.8|1) ' >/dev/null
}

# Any package that provides mail-transport-agent, or a sendmail put there by hand.
mta_present() {
    [[ -e /usr/sbin/sendmail ]] && return
    dpkg-query -W -f '${db:Status-Status} ${Provides}\n' 2>/dev/null |
        grep -E '^installed .*(^|[ ,])mail-transport-agent([ ,]|$)' >/dev/null
}

installed() {
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

missing() {
    local package reason
    while IFS=': ' read -r package reason; do
        installed "$package" || printf '%s: %s\n' "$package" "$reason"
    done < <(wanted "$1")
}

# invoke-rc.d and deb-systemd-invoke ask this file before they start anything; 101 means no.
policy_put() {
    if [[ -f $POLICY ]] && grep -qxF "$POLICY_MARK" "$POLICY"; then
        rm -f "$POLICY" # left by a run that was killed; the lock says nobody uses it
    fi
    if [[ -e $POLICY || -L $POLICY ]]; then
        local status=0
        "$POLICY" prometheus start >/dev/null 2>&1 || status=$?
        [[ $status == 101 ]] ||
            die "$POLICY exists and lets services start (exit $status, expected 101). Install these by hand: $*"
        return
    fi
    trap policy_remove EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    printf '#!/bin/sh\n%s\nexit 101\n' "$POLICY_MARK" >"$POLICY.edge-$$"
    chmod 755 "$POLICY.edge-$$"
    mv "$POLICY.edge-$$" "$POLICY"
}

policy_remove() {
    rm -f "$POLICY.edge-$$"
    if [[ -f $POLICY ]] && grep -qxF "$POLICY_MARK" "$POLICY"; then rm -f "$POLICY"; fi
}

# --no-remove: where an installation would take another package away (another MTA), it fails instead.
apt_install() {
    NEEDRESTART_SUSPEND=1 DEBIAN_FRONTEND=noninteractive APT_LISTCHANGES_FRONTEND=none \
        apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
        --no-install-recommends --no-remove install "$@" >&2
}

# `apt-get update` only where the lists do not know a package, or know a version that is gone.
apt_get() {
    local package
    for package in "$@"; do
        if ! known "$package"; then
            say 'apt-get update: the package lists are missing or old'
            apt-get -q update >&2
            apt_install "$@"
            return
        fi
    done
    apt_install "$@" && return
    say 'apt-get update: the installation failed, perhaps because the package lists are old'
    apt-get -q update >&2
    apt_install "$@"
}

packages() {
    local todo names
    if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
        packages_without_apt "$1"
        return
    fi
    todo=$(missing "$1")
    [[ -z $todo ]] && return
    mapfile -t names < <(cut -d: -f1 <<<"$todo")
    if [[ $(id -u) != 0 ]]; then
        # Without root, .venv and the unit tests need only these.
        if [[ $1 == venv || $1 == check ]] && ! grep -qE '^(python3-venv|gcc|libc6-dev):' <<<"$todo"; then
            say "not installed, needed to load kernel programs: ${names[*]}"
            return
        fi
        die "these packages are missing, and installing needs root: apt-get install --no-install-recommends ${names[*]}"
    fi
    mkdir -p "${LOCK%/*}"
    exec 9>"$LOCK"
    flock 9
    todo=$(missing "$1")
    [[ -z $todo ]] && return
    mapfile -t names < <(cut -d: -f1 <<<"$todo")
    say 'installing:'
    sed 's/^/setup:   /' <<<"$todo" >&2
    policy_put "${names[@]}"
    if [[ " ${names[*]} " == *' postfix '* ]]; then
        echo 'postfix postfix/main_mailer_type select No configuration' | debconf-set-selections
    fi
    if [[ " ${names[*]} " == *' tshark '* ]]; then
        echo 'wireshark-common wireshark-common/install-setuid boolean false' | debconf-set-selections
    fi
    apt_get "${names[@]}"
    policy_remove
    flock -u 9
    if grep -qE '^(postfix|prometheus):' <<<"$todo"; then
        say 'none of these services was started. Where systemd runs, their packages enable them for the next boot;'
        say 'the tests do not need that: systemctl disable prometheus postfix'
    fi
}

packages_without_apt() {
    local rhel='python3.11 python3-bcc python3-nftables nftables iproute libpcap'
    [[ $1 != check && $1 != test ]] || rhel+=' gcc glibc-devel'
    [[ $1 != bench ]] || rhel+=' ethtool iptables ipset xdp-tools'
    [[ $1 != test ]] || rhel+=' wireshark-cli prometheus, and postfix where no mail server is installed'
    say "no apt-get here, so nothing is installed; needed on a RHEL-like system (dnf install): $rhel"
}

# /usr/bin/python3 comes first: bcc and nftables are packages of that one.
python_found() {
    local candidate
    for candidate in /usr/bin/python3 /usr/bin/python3.{14,13,12,11}; do
        if [[ -x $candidate ]] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer: /usr/bin/python3 is $(/usr/bin/python3 --version 2>&1 || true)"
}

# Scripts in .venv carry its path, so one that was moved or copied is of no use; nor is one of another Python.
venv_usable() {
    [[ -x .venv/bin/python && -f .venv/bin/pip ]] &&
        [[ $(head -n 1 .venv/bin/pip) == "#!$PWD/.venv/bin/python"* ]] &&
        grep -qx 'include-system-site-packages = true' .venv/pyvenv.cfg &&
        [[ $(.venv/bin/python -c "$VERSION") == "$("$1" -c "$VERSION")" ]]
}

venv() {
    local python stamp
    python=$(python_found)
    stamp=$(sha256sum pyproject.toml tests/tools/setup.sh)
    if venv_usable "$python"; then
        [[ -x .venv/bin/edge && -f $STAMP && $(<"$STAMP") == "$stamp" ]] && return
        rm -f "$STAMP"
    else
        rm -rf .venv
        "$python" -m venv --system-site-packages .venv
    fi
    say "filling .venv from PyPI with $python (up to a minute)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,lab]' >&2
    echo "$stamp" >"$STAMP"
}

main() {
    case ${1-} in
    venv | check) ;;
    demo | test | bench) [[ $(id -u) == 0 ]] || die "make $1 loads kernel programs and makes network namespaces: run it as root" ;;
    *)
        say 'usage: setup.sh venv|check|demo|test|bench'
        exit 64
        ;;
    esac
    packages "$1"
    venv
}

main "$@"
