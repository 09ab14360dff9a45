"""bpf/challenge.h under the host compiler: the cookie is SipHash, the answer is well formed, and no byte too far."""

from __future__ import annotations

import ctypes as c
import os
import random
import struct
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest

from edge.kernel.program import directory
from tests import packets as p

SEED = 20270
HERE = Path(__file__).resolve().parent
KEY = (0x0706050403020100, 0x0F0E0D0C0B0A0908)
_U64 = (1 << 64) - 1
SYN_ACK = 0x12


def siphash(key: tuple[int, int], data: bytes) -> int:
    """SipHash-2-4, written from the paper (Aumasson, Bernstein: INDOCRYPT 2012, section 2)."""
    v0, v1 = key[0] ^ 0x736F6D6570736575, key[1] ^ 0x646F72616E646F6D
    v2, v3 = key[0] ^ 0x6C7967656E657261, key[1] ^ 0x7465646279746573

    def turn(x: int, by: int) -> int:
        return (x << by | x >> 64 - by) & _U64

    def rounds(count: int) -> None:
        nonlocal v0, v1, v2, v3
        for _ in range(count):
            v0, v2 = v0 + v1 & _U64, v2 + v3 & _U64
            v1, v3 = turn(v1, 13) ^ v0, turn(v3, 16) ^ v2
            v0, v2 = turn(v0, 32), v2 + v1 & _U64
            v0 = v0 + v3 & _U64
            v1, v3 = turn(v1, 17) ^ v2, turn(v3, 21) ^ v0
            v2 = turn(v2, 32)

    padded = data + bytes(-(len(data) + 1) % 8) + bytes([len(data) & 255])
    for (word,) in struct.iter_unpack("<Q", padded):
        v3 ^= word
        rounds(2)
        v0 ^= word
    v2 ^= 0xFF
    rounds(4)
    return v0 ^ v1 ^ v2 ^ v3


class Host:
    """The compiled library."""

    def __init__(self, path: Path) -> None:
        self.library = c.CDLL(str(path))
        self.library.siphash_of.restype = c.c_uint64
        self.library.answer_to.restype = c.c_size_t
        for name in ("remember", "remembered"):
            getattr(self.library, name).restype = c.c_uint64
            getattr(self.library, name).argtypes = [c.c_uint64] * 3

    def siphash(self, key: tuple[int, int], words: tuple[int, ...]) -> int:
        return int(self.library.siphash_of((c.c_uint64 * 2)(*key), (c.c_uint64 * 5)(*words)))

    def answer(self, frame: bytes, slot: int = 7) -> tuple[bytes, int] | None:
        answered, right = c.create_string_buffer(len(frame)), c.c_uint32()
        size = self.library.answer_to(
            frame, c.c_size_t(len(frame)), (c.c_uint64 * 2)(*KEY), c.c_uint32(slot), answered, c.byref(right)
        )
        return (answered.raw[:size], right.value) if size else None


def build(path: Path, *flags: str) -> Path:
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-sign-compare", "-Wno-unknown-pragmas")
    sources = (str(HERE / "challenge_host.c"), f"-I{directory()}", "-Wno-address-of-packed-member")
    subprocess.run(["gcc", "-O1", "-g", "-shared", "-fPIC", *warnings, *flags, "-o", path, *sources], check=True)
    return path


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(build(tmp_path_factory.mktemp("challenge") / "challenge.so"))


def test_the_model_is_siphash() -> None:
    """Test vectors of the paper's appendix A and of its reference implementation."""
    assert siphash(KEY, bytes(range(15))) == 0xA129CA6149BE45E5
    assert siphash(KEY, b"") == 0x726FDB47DD0E0E31


def test_cookie_is_siphash(host: Host) -> None:
    print("seed", SEED)
    draw = random.Random(SEED)
    for _ in range(101):
        key = draw.getrandbits(64), draw.getrandbits(64)
        words = tuple(draw.getrandbits(64) for _ in range(5))
        assert host.siphash(key, words) == siphash(key, struct.pack("<5Q", *words))


def checksum_holds(data: bytes) -> bool:
    """RFC 1071: the one's complement sum over everything, the checksum included, is all ones."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return bool(total == 0xFFFF)


@pytest.mark.parametrize("source", ["2001:db8:1:2::25", "192.0.2.25"])
@pytest.mark.parametrize("tags", [0, 1, 2])
def test_the_answer_is_a_syn_ack_of_something_else(host: Host, source: str, tags: int) -> None:
    plain = p.syn(source, 25)
    frame = plain[:12] + tags * bytes.fromhex("81000007") + plain[12:]
    answered = host.answer(frame)
    assert answered is not None
    answer, right = answered
    assert len(answer) <= len(frame)
    assert (answer[:6], answer[6:12]) == (frame[6:12], frame[:6])
    network = 14 + 4 * tags
    assert answer[12:network] == frame[12:network]
    theirs, ours = frame[network:], answer[network:]
    size = 16 if ":" in source else 4
    at = 8 if ":" in source else 12
    assert ours[at : at + size] == theirs[at + size : at + 2 * size]
    assert ours[at + size : at + 2 * size] == theirs[at : at + size] == ip_address(source).packed
    header = 40 if ":" in source else 20
    tcp = ours[header:]
    assert len(tcp) == 20
    assert (tcp[:2], tcp[2:4]) == (theirs[header + 2 : header + 4], theirs[header : header + 2])
    assert struct.unpack("!II", tcp[4:12]) == (0, right)
    assert (tcp[12] >> 4, tcp[13], tcp[14:16]) == (5, SYN_ACK, b"\0\0")
    assert checksum_holds(ours[at : at + 2 * size] + struct.pack("!II", 20, 6) + tcp)
    if ":" in source:
        assert struct.unpack("!IHBB", ours[:8]) == (6 << 28, 20, 6, 64)
    else:
        assert checksum_holds(ours[:20])
        assert struct.unpack("!BBHHHBB", ours[:10]) == (0x45, 0, 40, 0, 0x4000, 64, 6)


def test_the_cookie_is_bound_to_connection_and_time(host: Host) -> None:
    def right(frame: bytes, slot: int = 7) -> int:
        answered = host.answer(frame, slot)
        assert answered is not None
        return answered[1]

    first = right(p.syn("2001:db8:1:2::25", 25))
    assert right(p.syn("2001:db8:1:2::25", 25)) == first
    assert len({first, right(p.syn("2001:db8:1:2::26", 25)), right(p.syn("2001:db8:1:2::25", 587))}) == 3
    assert right(p.syn("2001:db8:1:2::25", 25), 8) != first


def test_what_is_not_plain_has_no_answer(host: Host) -> None:
    tcp = p.tcp(25)
    frames = {
        "extension header": p.ethernet(p.ipv6("2001:db8::1", p.extension(6, tcp), following=60)),
        "first fragment": p.ethernet(p.ipv6("2001:db8::1", p.fragment(6, tcp, more=True), following=44)),
        "UDP": p.ethernet(p.ipv6("2001:db8::1", tcp, following=17)),
        "neither": p.ethernet(tcp, 0x0806),
    }
    for what, frame in frames.items():
        assert host.answer(frame) is None, what
    options = bytearray(p.syn("192.0.2.25"))
    options[14] = 0x46
    assert host.answer(bytes(options)) is None
    fragments = bytearray(p.syn("192.0.2.25"))
    fragments[20] = 0x20
    assert host.answer(bytes(fragments)) is None


def test_words_of_another_window_are_empty(host: Host) -> None:
    word = 0
    for window, bit in ((5, 3), (5, 47), (5, 3)):
        word = host.library.remember(word, window, bit)
    assert [bit for bit in range(48) if host.library.remembered(word, 5, bit)] == [3, 47]
    assert not any(host.library.remembered(word, window, 3) for window in (4, 6, 9, 5 + (1 << 15)))
    word = host.library.remember(word, 9, 0)
    assert [bit for bit in range(48) if host.library.remembered(word, 9, bit)] == [0]


def test_every_truncation_stays_within_the_frame(tmp_path: Path) -> None:
    """Under the sanitizers, in a process of its own: they must be loaded first."""
    library = build(
        tmp_path / "sanitized.so",
        "-fsanitize=address,undefined",
        "-fno-sanitize=alignment",
        "-fno-sanitize-recover=all",
    )
    preload = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {"LD_PRELOAD": preload.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.bpf.test_challenge_host import Host, p\n"
        "host = Host(Path(sys.argv[1])); found = 0\n"
        "for source in ('2001:db8::1', '192.0.2.1'):\n"
        "  for tags in range(4):\n"
        "    frame = p.syn(source); frame = frame[:12] + tags * bytes.fromhex('81000007') + frame[12:]\n"
        "    for length in range(1, len(frame) + 1): found += host.answer(frame[:length]) is not None\n"
        "print(found)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
