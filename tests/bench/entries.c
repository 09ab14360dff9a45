/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Entry points of the benchmark, compiled after the text of the limiter.
 */

/* The limiter on another source each run; what it passes ends here, as with every contender. */
int bench_limiter(struct xdp_md *ctx)
{
	struct steering *to;
	u32 zero = 0;

	to = steering.lookup(&zero);
	if (!to || !steer(ctx, to))
		return XDP_ABORTED;
	run(ctx, 0);
	return XDP_DROP;
}

/* The limiter on frames that come from elsewhere. */
int bench_drop(struct xdp_md *ctx)
{
	run(ctx, 0);
	return XDP_DROP;
}

INLINE int parse_only(struct xdp_md *ctx)
{
	struct packet packet = {};

	return parse((void *)(long)ctx->data, (void *)(long)ctx->data_end, &packet) == PARSED_SYN &&
	       packet.port == 25;
}

/* Only parses to the TCP header; the answer must depend on it, or the compiler leaves the parser out. */
int bench_parse(struct xdp_md *ctx)
{
	return parse_only(ctx) ? XDP_TX : XDP_PASS;
}

/* The same where the frame must end. */
int bench_parse_drop(struct xdp_md *ctx)
{
	return parse_only(ctx) ? XDP_ABORTED : XDP_DROP;
}

int bench_parse_steered(struct xdp_md *ctx)
{
	struct steering *to;
	u32 zero = 0;

	to = steering.lookup(&zero);
	if (!to || !steer(ctx, to))
		return XDP_ABORTED;
	return parse_only(ctx) ? XDP_DROP : XDP_PASS;
}

int bench_empty(struct xdp_md *ctx)
{
	return XDP_PASS;
}
