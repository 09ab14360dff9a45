/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Gives each run of a program another source, since BPF_PROG_TEST_RUN repeats one packet.
 *
 * The source is top:low:~low:~top, so that the TCP checksum stays right. `low` is the number times an odd
 * constant: a bijection, so numbers below n are n different /64s. `top` is 2001:db8, or one of 65,536
 * provider prefixes inside 2a00::/12.
 */
#define STEER_FIXED 0		/* the packet as it is */
#define STEER_RANDOM 1		/* any of `sources` */
#define STEER_NEXT 2		/* one after the other from `next` on */

struct steering {
	u64 next;
	u32 sources;
	u32 order;	/* STEER_x */
	u32 spread;	/* 1: over many /32s */
	u32 ifindex;	/* where the generator sends */
	u64 frame[12];	/* what it sends: the first 94 bytes */
};
BPF_F_TABLE("array", u32, struct steering, steering, 1, 0);

#define FRAME_BYTES 94
#define SOURCE_OFFSET 22	/* Ethernet 14, IPv6 8 */

/* 0 if the frame is too short. */
static __always_inline int steer(struct xdp_md *ctx, struct steering *to)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	u32 *source = data + SOURCE_OFFSET;
	u32 number, low, top;

	if (to->order == STEER_FIXED)
		return 1;
	if (data + FRAME_BYTES > end)
		return 0;
	number = bpf_get_prandom_u32();	/* asked in any case, so that both orders cost the same */
	number = to->order == STEER_NEXT ? (u32)to->next++ : (u32)(((u64)number * to->sources) >> 32);
	low = number * 0x9e3779b1u;
	top = to->spread ? 0x2a000000 | ((low * 0x85ebca6bu) >> 16) << 4 : 0x20010db8;
	low = __builtin_bswap32(low);
	top = __builtin_bswap32(top);
	source[0] = top;
	source[1] = low;
	source[2] = ~low;
	source[3] = ~top;
	return 1;
}
