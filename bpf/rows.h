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

/* Bits that the line's index holds are 0, but for the service and which of the prefix's rows it is. */
INLINE __u64 row_tag(__u64 mixed, __u64 line_mask, __u64 service)
{
	return (mixed & ~line_mask) | service;
}

/* The tag of a prefix's entry in a line of the map policy_lines, without what the entry says. */
INLINE __u64 policy_tag(__u64 mixed, __u64 line_mask, __u32 level, __u64 service)
{
	return (mixed & ~line_mask) | (__u64)level << POLICY_LEVEL_SHIFT | service;
}

/* What an entry says of its prefix, and an entry that is in the map policy only. */
#define POLICY_SAYS ((1ull << POLICY_TAG_BITS) - (1ull << POLICY_STANDING_SHIFT))

/* Look a prefix up in its line: 1 and `found`, or 0. A tag is read once, for it may change. */
INLINE int find_in_line(const volatile struct policy_line *line, __u64 wanted, volatile struct policy_entry *found)
{
	__u64 tag;

	if (!(((tag = line->tag[0]) ^ wanted) & ~POLICY_SAYS))
		found->expires_ns = line->expires_ns[0];
	else if (!(((tag = line->tag[1]) ^ wanted) & ~POLICY_SAYS))
		found->expires_ns = line->expires_ns[1];
	else if (!(((tag = line->tag[2]) ^ wanted) & ~POLICY_SAYS))
		found->expires_ns = line->expires_ns[2];
	else if (!(((tag = line->tag[3]) ^ wanted) & ~POLICY_SAYS))
		found->expires_ns = line->expires_ns[3];
	else
		return 0;
	found->standing = tag >> POLICY_STANDING_SHIFT & 7;
	found->origin = tag >> POLICY_ORIGIN_SHIFT & 3;
	return found->standing != STANDING_NEW;
}

/* The row of a prefix in its line: its own, else the one with the earliest TAT. */
struct row {
	__u64 way;	/* 0..3 */
	__u64 held;	/* 1: the tag is ours */
	__u64 tat;	/* its arrival time when it was found */
	__u64 next;	/* what a charge makes of that; 0: not charged */
};

/* Arithmetic: which way it is cannot be predicted. */
INLINE __u64 earliest_way(const volatile struct line *line)
{
	__u64 a = line->tat_ns[0], b = line->tat_ns[1], c = line->tat_ns[2], d = line->tat_ns[3];
	__u64 b_first = less(b, a), d_first = less(d, c);
	__u64 cd_first = less(choose(d_first, d, c), choose(b_first, b, a));

	return cd_first << 1 | choose(cd_first, d_first, b_first);
}

/* Branches: most prefixes are the first in their line. The way goes through `row`, which is in a map, so that
 * the verifier forgets which branch chose it. */
INLINE void find_row(const volatile struct line *line, __u64 tag, volatile struct row *row)
{
	row->held = 1;
	if (line->tag[0] == tag) {
		row->way = 0;
	} else if (line->tag[1] == tag) {
		row->way = 1;
	} else if (line->tag[2] == tag) {
		row->way = 2;
	} else if (line->tag[3] == tag) {
		row->way = 3;
	} else {
		row->way = earliest_way(line);
		row->held = 0;
	}
	row->tat = line->tat_ns[row->way & 3];
}

#endif
