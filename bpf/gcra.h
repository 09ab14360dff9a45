/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The generic cell rate algorithm: one theoretical arrival time (TAT) per prefix.
 *
 * A connection at `now` conforms if TAT <= now + burst tolerance; it then moves the TAT to
 * max(TAT, now) + emission interval. Over any time t at most burst + rate * t are admitted.
 * Source: ITU-T I.371, "virtual scheduling"; throttled/throttled names the parameters the same way.
 * Pure: compiles with the host compiler too and is tested against the Python model.
 */
#ifndef EDGE_GCRA_H
#define EDGE_GCRA_H

#include "base.h"
#include "abi.h"

/* CPUs read their clocks at different moments, and a virtual CPU may be paused in between: a TAT this
 * much further ahead than the limit allows was still charged under it. */
#define CLOCK_SLACK_NS 1000000000ull

/* By how much the clock that is read once a tick may lag: two ticks at HZ=100, the slowest there is. Should it lag
 * more (the CPU that keeps the time is paused), prefixes are refused for as much longer. */
#define TICK_NS 20000000ull

/* What a connection now makes of a TAT; 0: it exceeds the limit. A TAT further ahead than this limit can put it was
 * charged under a tighter one (a bad prefix that was released): such a row starts with its burst spent instead of
 * serving the old sentence. */
INLINE __u64 gcra_charge(__u64 tat, __u64 now, const struct limit *limit)
{
	__u64 spent = now + limit->burst_tolerance_ns;

	if (tat <= spent)
		return larger(tat, now) + limit->emission_interval_ns;
	if (tat <= spent + limit->emission_interval_ns + CLOCK_SLACK_NS)
		return 0;
	return spent + limit->emission_interval_ns;
}

/* 1 if a connection at any time from `now` to a tick later would exceed the limit. */
INLINE int gcra_is_spent(__u64 tat, __u64 now, const struct limit *limit)
{
	__u64 spent = now + limit->burst_tolerance_ns;

	return tat > spent + TICK_NS && tat <= spent + limit->emission_interval_ns + CLOCK_SLACK_NS;
}

#endif
