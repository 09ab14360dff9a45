/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The few words the pure headers need, for bcc's clang and for the host compiler alike.
 */
#ifndef EDGE_BASE_H
#define EDGE_BASE_H

#include <linux/types.h>

#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif
#define INLINE static __always_inline

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define FROM_BE16(x) __builtin_bswap16(x)
#define FROM_BE32(x) __builtin_bswap32(x)
#define FROM_BE64(x) __builtin_bswap64(x)
#else
#define FROM_BE16(x) (x)
#define FROM_BE32(x) (x)
#define FROM_BE64(x) (x)
#endif

/* Hides a value from the optimiser, so that arithmetic below stays arithmetic. The verifier follows
 * every branch; with five levels decided in one go, branches would multiply to more states than it
 * accepts. */
#define OPAQUE(x) asm volatile("" : "+r"(x))

/* 1 if a < b, else 0; both below 2^63 (times in nanoseconds are, for 292 years). */
INLINE __u64 less(__u64 a, __u64 b)
{
	__u64 r = (a - b) >> 63;

	OPAQUE(r);
	return r;
}

/* 1 if x is 0, else 0. */
INLINE __u64 is_zero(__u64 x)
{
	__u64 negative;

	OPAQUE(x);
	negative = -x;
	OPAQUE(negative);
	x = ((x | negative) >> 63) ^ 1;
	OPAQUE(x);
	return x;
}

/* a if condition is 1, b if it is 0. */
INLINE __u64 choose(__u64 condition, __u64 a, __u64 b)
{
	return b ^ ((a ^ b) & -condition);
}

INLINE __u64 larger(__u64 a, __u64 b)
{
	return choose(less(a, b), b, a);
}

#endif
