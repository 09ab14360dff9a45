/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Keys: two 64-bit numbers an address, IPv4 inside the same space. edge/core/prefix.py does the same
 * for text; tests hold the two together.
 */
#ifndef EDGE_PREFIX_H
#define EDGE_PREFIX_H

#include "base.h"
#include "abi.h"

struct source {
	__u64 hi;
	__u64 lo;	/* 0 for IPv4 */
	__u64 ipv4;	/* 1: keyed by an IPv4 address */
};

INLINE __u64 ipv4_key(__u32 address)
{
	return 0x0000ffff00000000ull | address;
}

/* Length of each level; a switch, because bcc has no constant arrays. */
INLINE __u32 level_length(__u32 level)
{
	switch (level) {
	case LEVEL_128:
		return 128;
	case LEVEL_64:
		return 64;
	case LEVEL_56:
		return 56;
	case LEVEL_48:
		return 48;
	default:
		return 32;
	}
}

/* The upper half masked to a level. */
INLINE __u64 level_hi(__u64 hi, __u32 level)
{
	switch (level) {
	case LEVEL_128:
	case LEVEL_64:
		return hi;
	case LEVEL_56:
		return hi & ~0xffull;
	case LEVEL_48:
		return hi & ~0xffffull;
	default:
		return hi & ~0xffffffffull;
	}
}

/* The key of a source's prefix at a level; the service is the caller's. */
INLINE void policy_key_at(__u64 hi, __u64 lo, __u32 level, struct policy_key *key)
{
	key->hi = level_hi(hi, level);
	key->lo = level == LEVEL_128 ? lo : 0;
	key->length = level_length(level);
}

/* Loopback, link-local, ULA, unspecified (RFC 4291, 4193). Only as written in the packet: an IPv4
 * address inside an IPv6 one is not private, or a forger could exempt itself with 6to4. */
INLINE int ipv6_is_private(__u64 hi, __u64 lo)
{
	return (hi == 0 && lo <= 1) || (hi >> 54) == (0xfe80 >> 6) || (hi >> 57) == (0xfc00 >> 9);
}

/* RFC 1122 (0/8, 127/8), RFC 1918, RFC 3927 (169.254/16). */
INLINE int ipv4_is_private(__u32 address)
{
	__u32 first = address >> 24;

	return first == 0 || first == 10 || first == 127 || (address >> 20) == 0xac1 ||
	       (address >> 16) == 0xc0a8 || (address >> 16) == 0xa9fe;
}

/* Key an IPv6 source. 0 on success, 1 for a bogon: a real source inside 0:ffff::/32, where IPv4 lives.
 * Forms that carry an IPv4 address: mapped (RFC 4291), NAT64 (6052, 8215), 6to4 (3056), Teredo (4380). */
INLINE int key_ipv6(__u64 hi, __u64 lo, struct source *source)
{
	source->ipv4 = 1;
	source->lo = 0;
	if ((hi == 0 && lo >> 32 == 0xffff) || (hi == 0x0064ff9b00000000ull && lo >> 32 == 0) ||
	    hi >> 16 == 0x0064ff9b0001ull) {
		source->hi = ipv4_key((__u32)lo);
	} else if (hi >> 48 == 0x2002) {
		source->hi = ipv4_key((__u32)(hi >> 16));
	} else if (hi >> 32 == 0x20010000ull) {
		source->hi = ipv4_key(~(__u32)lo);
	} else {
		source->hi = hi;
		source->lo = lo;
		source->ipv4 = 0;
		return hi >> 32 == 0x0000ffff;
	}
	return 0;
}

INLINE void key_ipv4(__u32 address, struct source *source)
{
	source->hi = ipv4_key(address);
	source->lo = 0;
	source->ipv4 = 1;
}

#endif
