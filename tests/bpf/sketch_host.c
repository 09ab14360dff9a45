/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* bpf/sketch.h for the host: what the tests ask of it, many children a call. */
#include <sched.h>
#include <stddef.h>

#include "rows.h"
#include "sketch.h"

/* What a row holds of its prefix's children. */
struct sketches {
	__u64 window;
	__u64 recent[SKETCH_WORDS];
	__u64 before[SKETCH_WORDS];
};

void add_hashes(__u64 *words, const __u64 *hashes, size_t count)
{
	for (size_t i = 0; i < count; i++)
		sketch_add(words, hashes[i]);
}

/* The children `first`, `first` + step, ... hashed as the kernel program does. */
INLINE void add_children(__u64 *words, __u64 first, __u64 step, __u64 count, __u64 seed)
{
	for (__u64 i = 0; i < count; i++)
		sketch_add(words, mix((first + i * step) ^ seed));
}

/* `trials` sketches of `count` children each, every trial with a seed of its own. */
void sketch_many(__u64 *words, size_t trials, __u64 first, __u64 step, __u64 count, __u64 seed)
{
	for (size_t i = 0; i < trials; i++)
		add_children(words + i * SKETCH_WORDS, first, step, count, mix(seed + i));
}

/* One connection after another, as a CPU does it: roll, then add. */
void connect_children(struct sketches *row, __u64 now_window, const __u64 *hashes, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		sketch_roll(&row->window, row->recent, row->before, now_window);
		sketch_add(row->recent, hashes[i]);
	}
}

/* The same on each of `rows`, `count` children each, at once with another thread that is called like this:
 * the two wait for each other before every row. `arrived` starts at 0 and is shared. */
void race(struct sketches *rows, size_t number, __u64 now_window, const __u64 *hashes, size_t count,
	  volatile __u64 *arrived)
{
	for (size_t i = 0; i < number; i++) {
		__sync_fetch_and_add(arrived, 1);
		for (unsigned int spins = 1; *arrived < 2 * (i + 1); spins++)
			if (spins % 1024 == 0)
				sched_yield(); /* the other may need this CPU */
		connect_children(rows + i, now_window, hashes + i * count, count);
	}
}
