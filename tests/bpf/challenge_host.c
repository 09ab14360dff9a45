/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * bpf/challenge.h under the host compiler. Each frame ends where its heap block ends, so that the sanitizers
 * report one byte read or written too far.
 */
#include <stdlib.h>
#include <string.h>

#include "challenge.h"

__u64 siphash_of(const __u64 *key, const __u64 *words)
{
	return siphash(key, words);
}

/* The answer to a frame, written to `answered` (as long as the frame): its length, or 0 if there is none. */
size_t answer_to(const unsigned char *frame, size_t length, const __u64 *key, __u32 slot, unsigned char *answered,
		 __u32 *right)
{
	struct plain packet = {};
	unsigned char *block = malloc(length), *shorter;
	size_t size = 0;

	if (!block)
		abort();
	memcpy(block, frame, length);
	if (is_plain(block, block + length, &packet)) {
		size = answer_length(&packet);
		if (size > length)
			abort();
		shorter = malloc(size);
		if (!shorter)
			abort();
		memcpy(shorter, block, size);
		*right = cookie(key, &packet, slot);
		if (!write_answer(shorter, shorter + size, &packet, *right))
			abort();
		memcpy(answered, shorter, size);
		free(shorter);
	}
	free(block);
	return size;
}

__u64 remember(__u64 word, __u64 window, __u64 bit)
{
	return seen_with(word, window, bit);
}

__u64 remembered(__u64 word, __u64 window, __u64 bit)
{
	return seen_in(word, window, bit);
}
