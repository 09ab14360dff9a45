import random
import struct
from ipaddress import IPv6Address

from edge.lab.forge import internet_checksum, syn_frame


def test_frames_are_valid() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(101):
        source, target = IPv6Address(rng.getrandbits(128)), IPv6Address(rng.getrandbits(128))
        frame = syn_frame(source, target, source_port=rng.randrange(1, 65536), port=25, sequence=rng.getrandbits(32))
        ethernet, ip, tcp = frame[:14], frame[14:54], frame[54:]
        assert ethernet[12:] == b"\x86\xdd"
        assert ip[0] >> 4 == 6
        assert struct.unpack("!H", ip[4:6])[0] == len(tcp) == 24
        assert (ip[8:24], ip[24:40]) == (source.packed, target.packed)
        assert tcp[13] == 0x02  # SYN and nothing else
        assert tcp[12] >> 4 == 6
        pseudo = source.packed + target.packed + struct.pack("!I3xB", len(tcp), 6)
        assert internet_checksum(pseudo + tcp) == 0


def test_checksum_is_that_of_rfc_1071() -> None:
    assert internet_checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF ^ 0xDDF2
