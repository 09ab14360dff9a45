/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The generator of live frames: writes the whole frame again (pages come back as the receiver left
 * them), then the source, and sends it to the interface under test.
 */
int generate(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	u64 *frame = data;
	struct steering *to;
	u32 zero = 0;

	to = steering.lookup(&zero);
	if (!to || data + FRAME_BYTES > end)
		return XDP_ABORTED;
#pragma unroll
	for (u32 i = 0; i < FRAME_BYTES / 8; i++)
		frame[i] = to->frame[i];
	*(u32 *)(data + 88) = (u32)to->frame[11];
	*(u16 *)(data + 92) = (u16)(to->frame[11] >> 32);
	steer(ctx, to);
	return bpf_redirect(to->ifindex, 0);
}

int drop(struct xdp_md *ctx)
{
	return XDP_DROP;
}
