/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The challenge where it meets the maps: sending it, taking its answer, and the way around it for clients
 * that cannot answer.
 *
 * A firewall before the client may swallow the odd SYN-ACK. Such a client sends the same SYN again and
 * again; a later one is let through, as an unverified one, under the budget that all of them share.
 */

INLINE void proof_of(const struct source *source, u32 ports, struct proof_key *key)
{
	key->hi = source->hi;
	key->lo = source->lo;
	key->ports = ports;
	key->pad = 0;
}

/* If a RST answers a challenge, remember it: 1. */
INLINE int take_answer(struct xdp_md *ctx)
{
	struct source source = {};
	struct scratch *working;
	struct proof_key key;
	struct plain *packet;
	struct identity *made;
	u64 now, until, right = 0;
	u32 zero = 0, port;
	u8 *service;

	working = scratch.lookup(&zero);
	made = identity.lookup(&zero);
	if (!working || !made)
		return 0;
	packet = &working->plain;
	if (!is_plain((void *)(long)ctx->data, (void *)(long)ctx->data_end, packet))
		return 0;
	if ((packet->flags & (TCP_RST | TCP_SYN | TCP_ACK)) != TCP_RST)
		return 0;
	port = packet->ports & 0xffff;
	service = services.lookup(&port);
	if (!service || !*service)
		return 0;
	now = bpf_ktime_get_ns();
#pragma nounroll
	for (u64 age = 0; age < 2; age++)
		right |= is_zero(packet->sequence ^ cookie(made->cookie_key, packet, (u32)(now >> COOKIE_SLOT_BITS) - age));
	if (!right)
		return 0;
	if (packet->ipv4)
		key_ipv4((u32)packet->source_lo, &source);
	else if (key_ipv6(packet->source_hi, packet->source_lo, &source))
		return 0;
	proof_of(&source, packet->ports, &key);
	until = now + PROOF_NS;
	proved.update(&key, &until);
	return 1;
}

/* Whether this connection's client answered a challenge. */
INLINE u64 has_proof(const struct verdict *out, u32 ports, u64 now)
{
	struct source source = { .hi = out->hi, .lo = out->lo };
	struct proof_key key;
	u64 *until;

	proof_of(&source, ports, &key);
	until = proved.lookup(&key);
	return until && *until > now;
}

/* Whether this very SYN came before, a window or more ago; remembers it in any case. */
INLINE u64 is_late_retransmission(const struct plain *packet, u64 seed, u64 now)
{
	u64 print = mix(mix(mix(packet->source_hi ^ seed) ^ packet->source_lo) ^
			((u64)packet->ports << 32 | packet->sequence));
	u64 window = now / SEEN_WINDOW_NS, bit = ((print >> 32 & 0xffff) * SEEN_BITS) >> 16, late;
	u32 index = (u32)print & (SEEN_LINES - 1);
	struct seen_line *line = seen.lookup(&index);

	if (!line)
		return 1;
	late = seen_in(line->window[(window - 1) & 3], window - 1, bit) |
	       seen_in(line->window[(window - 2) & 3], window - 2, bit) |
	       seen_in(line->window[(window - 3) & 3], window - 3, bit);
	/* two CPUs at once may lose one of two bits: that client waits for its next retransmission */
	line->window[window & 3] = seen_with(line->window[window & 3], window, bit);
	return late;
}

/* Answer a SYN, a plain one (scratch), in place: XDP_TX, or XDP_DROP if that cannot be done. */
INLINE int answer(struct xdp_md *ctx, u64 now)
{
	struct scratch *working;
	struct identity *made;
	struct plain *packet;
	u32 zero = 0, right;
	u64 size;

	made = identity.lookup(&zero);
	working = scratch.lookup(&zero);
	if (!made || !working)
		return XDP_DROP;
	packet = &working->plain;
	/* a difference first: the compiler would else do arithmetic on the end alone, which the verifier refuses */
	size = ctx->data_end - ctx->data;
	OPAQUE(size);
	if (bpf_xdp_adjust_tail(ctx, (int)(answer_length(packet) - size)))
		return XDP_DROP;
	right = cookie(made->cookie_key, packet, (u32)(now >> COOKIE_SLOT_BITS));
	/* the one cookie in 2^32 that would acknowledge the SYN */
	if (right == packet->sequence + 1)
		return XDP_DROP;
	if (!write_answer((void *)(long)ctx->data, (void *)(long)ctx->data_end, packet, right))
		return XDP_DROP;
	return XDP_TX;
}
