/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Completed handshakes, counted per /64 and service as the kernel's TCP completes and closes them.
 *
 * A SYN can be forged, a completed handshake cannot: the peer proved that it receives at its address.
 * So this, and the MTA's own word, is all that reputation is fed from. Attached to a cgroup; counts
 * listeners created inside it.
 */

#define TCP_STATE_CLOSE 7

INLINE int remote_source(struct bpf_sock_ops *ops, struct source *source)
{
	/* Two neighbouring 32-bit context fields read as one 64-bit load are refused by the verifier. */
	volatile struct bpf_sock_ops *fields = ops;
	u64 hi, lo;

	if (ops->family == 2 /* AF_INET */) {
		key_ipv4(ntohl(fields->remote_ip4), source);
		return 0;
	}
	hi = (u64)ntohl(fields->remote_ip6[0]) << 32;
	hi |= ntohl(fields->remote_ip6[1]);
	lo = (u64)ntohl(fields->remote_ip6[2]) << 32;
	lo |= ntohl(fields->remote_ip6[3]);
	return key_ipv6(hi, lo, source);
}

int edge_sockops(struct bpf_sock_ops *ops)
{
	struct handshakes fresh = {}, *seen;
	struct handshake_key key = {};
	struct source source = {};
	u32 port = ops->local_port;
	u8 *service;

	if (ops->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB && ops->op != BPF_SOCK_OPS_STATE_CB)
		return 1;
	service = services.lookup(&port);
	if (!service || !*service || remote_source(ops, &source))
		return 1;
	key.hi = source.hi;
	key.service = *service - 1;
	if (ops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) {
		seen = handshakes.lookup_or_try_init(&key, &fresh);
		if (!seen)
			return 1;
		__sync_fetch_and_add(&seen->completed, 1);
		seen->last_ns = bpf_ktime_get_ns();
		/* only sockets counted here report their end */
		bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG);
	} else if (ops->args[1] == TCP_STATE_CLOSE) {
		seen = handshakes.lookup(&key);
		if (seen)
			__sync_fetch_and_add(&seen->closed, 1);
	}
	return 1;
}
