/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * How many distinct children a prefix has, in 256 bits: a bitmap of several resolutions.
 *
 * A child (an address of a /64, a /64 of a shorter prefix) always sets the same bit, which its keyed hash
 * chooses: 15 of 16 children one of 128 bits; the others one of 4 regions of 32 bits, each for 8 times
 * fewer children than the one before. Few children are counted by the 128 bits, many by the region that
 * is neither empty nor full. edge/core/sketch.py reads the number and states its error.
 * Sources: Whang, Vander-Zanden, Taylor, "A linear-time probabilistic counting algorithm" (TODS 1990);
 * Estan, Varghese, Fisk, "Bitmap algorithms for counting active flows on high speed links" (IMC 2003).
 *
 * Why not HyperLogLog in the same space, 64 registers of 4 bits: up to 400 children, where decisions are
 * made, its error is larger (11 % against 6 % at 64 children, 12 % against 9 % at 257), and only from
 * 500 on smaller (13 % against 19 to 24 % from 1,000 on). And its registers have to be raised by compare-and-swap,
 * which can fail; a bit is set by one instruction, once, and no race loses it.
 *
 * What an attacker could try: choose children that share a bit, to be counted as one. The seed is random
 * and readable by root alone.
 * Pure: compiles with the host compiler too and is tested against a Python model.
 */
#ifndef EDGE_SKETCH_H
#define EDGE_SKETCH_H

#include "base.h"
#include "abi.h"

/* The bit of a child, 0..255. `hash` is its keyed 64-bit mix: the 13 highest bits choose the region, the
 * lowest the bit in it. */
INLINE __u64 sketch_bit(__u64 hash)
{
	__u64 rare = hash >> 51;	/* 0..8191 */
	__u64 region = less(rare, 512 / 8) + less(rare, 512 / 64) + less(rare, 512 / 512);

	return choose(less(rare, 8192 / 16), 128 + 32 * region + (hash & 31), hash & 127);
}

/* Count a child; again or from several CPUs at once makes no difference. */
INLINE void sketch_add(volatile __u64 *words, __u64 hash)
{
	__u64 at = sketch_bit(hash), bit = 1ull << (at & 63);
	volatile __u64 *word = &words[(at >> 6) & (SKETCH_WORDS - 1)];

	/* a known child, the usual one, writes nothing */
	if (!(*word & bit))
		__sync_fetch_and_or(word, bit);
}

/* Call before adding: when a new window begins, what was recent becomes what was before. One CPU does it,
 * the others go on.
 *
 * A child that another CPU adds in that moment, between the swap and the exchange a few instructions
 * later, is moved along: it counts in the window before, one window less long. If the row had slept for
 * more than a window it is dropped, and counts again with its next connection. A CPU that is stopped in
 * here for a whole window drops the window before. A reader may meanwhile see the old sketches under the
 * new window, or a word's children in neither: one reading is wrong, the next is not.
 * A CPU that still lives in the last window adds to the new one. */
INLINE void sketch_roll(volatile __u64 *window, volatile __u64 *recent, volatile __u64 *before, __u64 now_window)
{
	__u64 last = *window, kept;

	if (last >= now_window || __sync_val_compare_and_swap(window, last, now_window) != last)
		return;
#pragma unroll
	for (int i = 0; i < SKETCH_WORDS; i++) {
		/* an exchange: what is added after it stays */
		kept = __sync_lock_test_and_set(&recent[i], 0);
		before[i] = last + 1 == now_window ? kept : 0;
	}
}

#endif
