/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Where a prefix's row is: set-associative lines of four rows, found by a keyed, invertible mix.
 *
 * The mix is a permutation of 64-bit numbers, so the line's index holds the low bits of the mixed key
 * and the tag needs only the others. The bits this frees in the tag carry the service. A reader turns
 * index and tag back into the prefix (edge/kernel/maps.py).
 *
 * What an attacker could try: choose prefixes that fall into one line to crowd a victim out of its
 * level. The seed is random, made with the tables and readable by root alone; without it lines cannot
 * be predicted, and a crowded-out prefix is still charged at its shorter levels.
 */
#ifndef EDGE_ROWS_H
#define EDGE_ROWS_H

#include "base.h"
#include "abi.h"

/* splitmix64's finalizer (Steele, Lea, Flood: OOPSLA 2014): a bijection with full avalanche. */
INLINE __u64 mix(__u64 x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebull;
	x ^= x >> 31;
	return x;
}

/* The mixed key of a prefix; `lo` counts at /128 only. */
INLINE __u64 mixed_key(__u64 hi, __u64 lo, __u64 seed)
{
	return lo ? mix(mix(hi ^ seed) ^ lo) : mix(hi ^ seed);
}

/* In a tag: the row is not the prefix's ordinary one but, while it is forged, the budget of its verified senders,
 * or of those who answered a challenge. */
#define ROW_OF_VERIFIED 2ull
#define ROW_OF_PROVED 4ull

/* Tag bits that tell rows of one line apart, for a level of `line_mask` + 1 lines. */
INLINE __u64 tag_bits(__u64 line_mask)
{
	return ~line_mask | ROW_OF_PROVED | ROW_OF_VERIFIED | 1;
}

INLINE __u64 row_tag(__u64 mixed, __u64 line_mask, __u64 service)
{
	return (mixed & ~line_mask) | service;
}

/* The row of a prefix in its line: its own (`held`), else the one with the earliest TAT, usable if that
 * has passed. */
struct row {
	__u64 tat;
	__u64 way;	/* 0..3 */
	__u64 held;	/* 1: the tag is ours */
	__u64 usable;	/* 1: held, or free */
};

INLINE void find_row(const volatile struct line *line, __u64 tag, __u64 bits, __u64 now, struct row *row)
{
	__u64 a = line->tat_ns[0], b = line->tat_ns[1], c = line->tat_ns[2], d = line->tat_ns[3];
	__u64 is_a = is_zero((line->tag[0] ^ tag) & bits);
	__u64 is_b = is_zero((line->tag[1] ^ tag) & bits) & (is_a ^ 1);
	__u64 is_c = is_zero((line->tag[2] ^ tag) & bits) & ((is_a | is_b) ^ 1);
	__u64 is_d = is_zero((line->tag[3] ^ tag) & bits) & ((is_a | is_b | is_c) ^ 1);
	__u64 b_first = less(b, a), d_first = less(d, c);
	__u64 ab = choose(b_first, b, a), cd = choose(d_first, d, c);
	__u64 cd_first = less(cd, ab);
	__u64 earliest = (cd_first << 1) | choose(cd_first, d_first, b_first);
	__u64 held = is_a | is_b | is_c | is_d;
	__u64 own = is_b | (is_c << 1) | (is_d * 3);
	__u64 own_tat = (a & -is_a) | (b & -is_b) | (c & -is_c) | (d & -is_d);

	row->held = held;
	row->way = choose(held, own, earliest);
	row->tat = choose(held, own_tat, choose(cd_first, cd, ab));
	row->usable = held | (less(now, row->tat) ^ 1);
}

#endif
