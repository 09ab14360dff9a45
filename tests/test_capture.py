import struct
from pathlib import Path

import pytest

from edge.capture import Capture, Captured
from edge.errors import InputError
from tests import packets as p
from tests.bpf.frames import pcap

A, A4 = "2001:db8:1:2::3", "198.51.100.7"
SIX, FOUR = p.ipv6(A, p.tcp()), p.ipv4(A4, p.tcp())


def block(kind: int, body: bytes, order: str) -> bytes:
    body += bytes(-len(body) % 4)
    length = len(body) + 12
    return struct.pack(f"{order}II", kind, length) + body + struct.pack(f"{order}I", length)


def section(order: str) -> bytes:
    return block(0x0A0D0D0A, struct.pack(f"{order}IHHq", 0x1A2B3C4D, 1, 0, -1), order)


def interface(order: str, *, link: int = 1, resolution: int = 9) -> bytes:
    options = struct.pack(f"{order}HHB3xHH", 9, 1, resolution, 0, 0)
    return block(1, struct.pack(f"{order}HHI", link, 0, 0) + options, order)


def packet(frame: bytes, at: int, order: str, interface_id: int = 0) -> bytes:
    head = struct.pack(f"{order}IIIII", interface_id, at >> 32, at & 0xFFFFFFFF, len(frame), len(frame))
    return block(6, head + frame, order)


def read(path: Path) -> list[tuple[int, bytes]]:
    with Capture(str(path)) as capture:
        return [(captured.at_ns, captured.frame) for captured in capture]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("magic", "unit_ns"), [(0xA1B2C3D4, 1000), (0xA1B23C4D, 1)])
def test_pcap(tmp_path: Path, order: str, magic: int, unit_ns: int) -> None:
    path = tmp_path / "x.pcap"
    frame = p.syn(A)
    head = struct.pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, 65535, 1)
    path.write_bytes(head + struct.pack(f"{order}IIII", 1_790_000_000, 7, len(frame), len(frame)) + frame)
    assert read(path) == [(1_790_000_000 * 10**9 + 7 * unit_ns, frame)]


@pytest.mark.parametrize("order", ["<", ">"])
def test_pcapng_with_interfaces_and_sections_of_its_own(tmp_path: Path, order: str) -> None:
    path = tmp_path / "x.pcapng"
    first, second, third = p.syn(A), p.syn(A, 587), p.syn(A4)
    path.write_bytes(
        section(order)
        + interface(order)
        + packet(first, 1_790_000_000_000_000_001, order)
        + interface(order, resolution=6)
        + block(5, bytes(12), order)  # statistics: not a packet
        + packet(second, 1_790_000_000_000_002, order, 1)
        + section(order)
        + interface(order)
        + packet(third, 1_790_000_000_000_000_003, order)
    )
    start = 1_790_000_000 * 10**9
    assert read(path) == [(start + 1, first), (start + 2000, second), (start + 3, third)]


@pytest.mark.parametrize(
    ("link", "captured", "kind", "network"),
    [
        (101, SIX, 0x86DD, SIX),
        (101, FOUR, 0x0800, FOUR),
        (228, FOUR, 0x0800, FOUR),
        (229, SIX, 0x86DD, SIX),
        (113, struct.pack("!HHH8xH", 0, 1, 6, 0x86DD) + SIX, 0x86DD, SIX),
        (113, struct.pack("!HHH8xH", 0, 1, 6, 0x8100) + p.vlan(FOUR, 0x0800), 0x8100, p.vlan(FOUR, 0x0800)),
        (113, struct.pack("!HHH8xH", 0, 824, 6, 0x0800) + FOUR, 0, FOUR),  # netlink
        (276, struct.pack("!HHIHBB8x", 0x0800, 0, 2, 1, 0, 6) + FOUR, 0x0800, FOUR),
        (276, struct.pack("!HHIHBB8x", 0x86DD, 0, 2, 803, 0, 6) + SIX, 0, SIX),  # radiotap
        *((0, struct.pack(f"{order}I", 2) + FOUR, 0x0800, FOUR) for order in "<>"),
        *((0, struct.pack("<I", family) + SIX, 0x86DD, SIX) for family in (10, 24, 28, 30)),
        (0, struct.pack("<I", 7) + SIX, 0, SIX),
        (108, struct.pack("!I", 30) + SIX, 0x86DD, SIX),
    ],
)
def test_network_header_is_kept(tmp_path: Path, link: int, captured: bytes, kind: int, network: bytes) -> None:
    path = tmp_path / "x.pcap"
    pcap(path, [captured], link=link)
    ((_, frame),) = read(path)
    assert frame[12:] == struct.pack("!H", kind) + network


@pytest.mark.parametrize("link", [0, 101, 108, 113, 228, 229, 276])
def test_what_ends_inside_the_link_header_is_no_frame(tmp_path: Path, link: int) -> None:
    path = tmp_path / "x.pcap"
    pcap(path, [b"", b"\0"], link=link)
    frames = [frame for _, frame in read(path)]
    assert len(frames) == 2
    if link in (0, 108, 113, 276):
        assert frames == [b"", b""]


def test_another_link_type_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.pcap"
    pcap(path, [bytes(100)], link=105)
    with pytest.raises(InputError, match=r"x\.pcap: .*found link type 105 \(802\.11\)"):
        Capture(str(path))


@pytest.mark.parametrize("content", [b"", b"\xd4\xc3", b"From root Mon Jan  1\n" * 9, bytes(100)])
def test_what_is_no_capture_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mbox"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"mbox: expected a pcap or pcapng capture, found: "):
        Capture(str(path))


@pytest.mark.parametrize("suffix", ["pcap", "pcapng"])
def test_everything_readable_comes_first(tmp_path: Path, suffix: str) -> None:
    """A file cut at every byte of its last packet, and one whose last length is a lie."""
    path = tmp_path / f"x.{suffix}"
    frame = p.syn(A)
    if suffix == "pcap":
        pcap(path, [frame] * 3)
        last = 16 + len(frame)
        lie = struct.pack("<IIII", 1, 0, 0x7FFFFFFF, 0x7FFFFFFF)
    else:
        one = packet(frame, 7, "<")
        path.write_bytes(section("<") + interface("<") + one * 3)
        last = len(one)
        lie = struct.pack("<II", 6, 0x7FFFFFFF)
    whole = path.read_bytes()
    damaged = [whole[:-cut] for cut in range(1, last)] + [whole[:-last] + lie + whole[-last:]]
    for content in damaged:
        path.write_bytes(content)
        got: list[Captured] = []
        with pytest.raises(InputError, match="expected packet 3 or the end, found: "), Capture(str(path)) as capture:
            got.extend(capture)
        assert [captured.frame for captured in got] == [frame, frame]
