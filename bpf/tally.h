/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Where a prefix's tally of connections is: sets of four rows, found by the same keyed mix as the
 * limiter's rows (rows.h), one region of sets a level.
 *
 * What an attacker could try: complete handshakes from more prefixes than there are rows, so that known
 * senders lose theirs. A row with an open connection stays; of the others that one goes first which was
 * used least and longest ago. What is lost with a row is a count of the past, never a limit in force.
 */
#ifndef EDGE_TALLY_H
#define EDGE_TALLY_H

#include "base.h"
#include "abi.h"

/* Tags that are no prefix's. A prefix's has TALLY_HELD set, and the service in the lowest bit. */
#define TALLY_FREE 0ull
#define TALLY_BUSY 1ull
#define TALLY_HELD 2ull

/* By how much longer than another's a row is kept for each handshake it has seen, and how many count:
 * who came once makes way before who has come for days, and a sweep of new prefixes eats itself. */
#define KEPT_NS_A_HANDSHAKE 60000000000ull
#define KEPT_HANDSHAKES 1440ull

INLINE __u64 tally_tag(__u64 mixed, __u64 set_mask, __u64 service)
{
	return (mixed & ~set_mask) | TALLY_HELD | service;
}

/* A service has no more than two values, and a set's index has at least two bits. */
INLINE __u64 tally_service(__u64 tag)
{
	return tag & 1;
}

/* When a row without open connections was last worth as much as a new one. */
INLINE __u64 tally_worth(__u64 last_ns, __u64 completed)
{
	return last_ns + choose(less(completed, KEPT_HANDSHAKES), completed, KEPT_HANDSHAKES) * KEPT_NS_A_HANDSHAKE;
}

#endif
