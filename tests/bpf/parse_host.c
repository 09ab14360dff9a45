/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * bpf/parse.h under the host compiler's sanitizers.
 *
 * parse_one() is what a test asks of a frame. hammer() mutates frames by the million: each copy ends
 * where its heap block ends, so that one byte read too far is reported.
 */
#include <stdlib.h>
#include <string.h>

#include "parse.h"

/* The outcome; for a SYN also version, source and port. */
struct parsed {
	__u64 source_hi, source_lo;
	__u32 outcome, ipv4, port, pad;
};

static struct parsed judge(const unsigned char *frame, size_t length)
{
	unsigned char *block = malloc(length ? length : 1);
	struct packet packet = {};
	struct parsed result = {};

	if (!block)
		abort();
	memcpy(block, frame, length);
	/* an empty frame begins and ends behind the block */
	result.outcome = parse(block + (length ? 0 : 1), block + (length ? length : 1), &packet);
	if (result.outcome == PARSED_SYN) {
		result.source_hi = packet.source_hi;
		result.source_lo = packet.source_lo;
		result.ipv4 = packet.ipv4;
		result.port = packet.port;
	}
	free(block);
	return result;
}

void parse_one(const unsigned char *frame, size_t length, struct parsed *result)
{
	*result = judge(frame, length);
}

static __u64 next(__u64 *state)
{
	/* xorshift64* (Vigna 2016) */
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * 0x2545f4914f6cdd1dull;
}

/* Values that mean something to the parser come up more often than chance would have them. */
static unsigned char telling(__u64 *state)
{
	static const unsigned char values[] = { 0, 1, 2, 6, 43, 44, 50, 51, 60, 255, 0x08, 0x81, 0x88, 0xa8,
						0x86, 0xdd, 0x45, 0x46, 0x4f, 0x60, 0x50, 0xf0, 8, 16, 20, 40 };
	__u64 chance = next(state);

	return chance & 1 ? values[(chance >> 8) % sizeof(values)] : (unsigned char)(chance >> 8);
}

/* Mutate and cut `count` times, from `frames` (end to end, `lengths` long); counts[outcome] of each. */
void hammer(const unsigned char *frames, const size_t *lengths, size_t number, __u64 seed, __u64 count, __u64 *counts)
{
	unsigned char work[65536];
	size_t *starts = malloc(number * sizeof(*starts)), at = 0;
	__u64 state = seed | 1;

	if (!starts)
		abort();
	for (size_t i = 0; i < number; i++) {
		starts[i] = at;
		at += lengths[i];
	}
	for (__u64 i = 0; i < count; i++) {
		size_t which = next(&state) % number, length = lengths[which];

		if (length > sizeof(work))
			length = sizeof(work);
		memcpy(work, frames + starts[which], length);
		for (__u64 changes = next(&state) % 5; length && changes; changes--)
			work[next(&state) % length] = telling(&state);
		if (next(&state) % 3 == 0)
			length = next(&state) % (length + 1);
		counts[judge(work, length).outcome]++;
	}
	free(starts);
}
