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

/* From where the next arrival is counted. A TAT further ahead than this limit can put it was charged
 * under a tighter limit (a bad prefix that was released): such a row starts with its burst spent
 * instead of serving the old sentence. */
INLINE __u64 gcra_base(__u64 tat, __u64 now, const struct limit *limit)
{
	__u64 spent = now + limit->burst_tolerance_ns;
	__u64 base = larger(tat, now);

	return choose(less(spent + limit->emission_interval_ns + CLOCK_SLACK_NS, base), spent, base);
}

/* 1 if a connection now would exceed the limit. */
INLINE __u64 gcra_exceeds(__u64 base, __u64 now, const struct limit *limit)
{
	return less(now + limit->burst_tolerance_ns, base);
}

#endif
