/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Connections, counted per prefix at every level as the kernel's TCP completes their handshake and closes
 * them: how many are open, how many there were, from how many different children.
 *
 * A SYN can be forged, a completed handshake cannot: the peer proved that it receives at its address. So
 * this, and the MTA's own word, is all that reputation is fed from, and the only thing that makes a sender
 * verified. Attached to a cgroup; counts listeners created inside it.
 *
 * Invariants:
 *   end-where-begun: a connection's end is counted in the rows that counted its beginning, which stay its
 *     prefix's meanwhile; a level that had no room for it does not see its end either.
 *   open-rows-stay: a row with an open connection is never given to another prefix.
 */

#define TCP_STATE_CLOSE 7

/* Worth of a row that is not to be had: later than any clock. */
#define NO_WORTH (1ull << 62)

/* Another CPU holds a row it is giving away for some fifty instructions. */
#define CLAIM_ATTEMPTS 8

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

/* One more (or, with -1, one less) crowded prefix. */
INLINE void count_crowded(u32 level, u64 mixed, int by)
{
	struct crowded_levels *levels;
	u32 zero = 0, slot = crowded_slot(level, mixed), *count;

	levels = crowded_levels.lookup(&zero);
	count = crowded.lookup(&slot);
	if (!levels || !count || level >= LEVELS)
		return;
	__sync_fetch_and_add(count, by);
	__sync_fetch_and_add(&levels->prefixes[level], by);
}

/* Keep a row's mark true to its count. Two CPUs at once may leave it one connection behind: a mark too many
 * costs a look, one too few lets one connection more through. */
INLINE void mark_crowded(struct tally *row, u32 level, u64 mixed, u64 wanted)
{
	if (row->crowded == wanted)
		return;
	if (__sync_val_compare_and_swap(&row->crowded, wanted ^ 1, wanted) == (wanted ^ 1))
		count_crowded(level, mixed, wanted ? 1 : -1);
}

/* Whether a prefix with so many open connections has what the tightest limit of its level allows. */
INLINE u64 is_crowded(s64 open, struct policy_key *key, u32 level, const struct control *settings)
{
	u32 index = (key->service & 1) * LEVELS + level;
	s64 *correction;
	u32 from;

	if (index >= SERVICES * LEVELS)
		return 0;
	from = settings->crowded_from[index];
	if (!from)
		return 0;
	correction = corrections.lookup(key);
	if (correction)
		open += *correction;
	return open >= (s64)from;
}

/* Take over a row that nobody needs, under its new tag. 0 if somebody was faster. */
INLINE int take_over(struct tally *row, u32 level, u64 set, u64 tag)
{
	u64 old = row->tag;

	if (old == TALLY_BUSY || __sync_val_compare_and_swap(&row->tag, old, TALLY_BUSY) != old)
		return 0;
	if (*(volatile u64 *)&row->open) {
		/* a connection of the old prefix came in between: it stays */
		__sync_val_compare_and_swap(&row->tag, TALLY_BUSY, old);
		return 0;
	}
	if (row->crowded)
		count_crowded(level, (old & ~tally_set_mask(level)) | set, -1);
	row->crowded = 0;
	row->completed = 0;
	row->newcomers = 0;
	row->window = 0;
#pragma unroll
	for (int word = 0; word < SKETCH_WORDS; word++) {
		row->recent[word] = 0;
		row->before[word] = 0;
	}
	/* not a store: another CPU may just be taking back what it counted here for the old prefix */
	__sync_fetch_and_add(&row->open, 1);
	__sync_val_compare_and_swap(&row->tag, TALLY_BUSY, tag);
	return 1;
}

/* The rows of one set, seen by one prefix. Indices + 1; 0: none. */
struct set_view {
	u64 own;
	u64 spare;	/* the row without open connections that is worth least */
};

/* Look at a set. Arithmetic instead of branches, which the verifier would all follow, in each attempt. */
INLINE int view_set(u32 first, u64 tag, struct set_view *view)
{
	u64 least = NO_WORTH;

	view->own = 0;
	view->spare = 0;
#pragma unroll
	for (u32 way = 0; way < TALLIES_PER_SET; way++) {
		u32 index = first + way;
		struct tally *row = connections.lookup(&index);
		u64 found, worth, is_least;

		if (!row)
			return 0;
		found = *(volatile u64 *)&row->tag;
		view->own = choose(is_zero(found ^ tag), index + 1, view->own);
		worth = tally_worth(row->last_ns, row->completed) & -(is_zero(found) ^ 1);
		worth = choose(is_zero(row->open), worth, NO_WORTH);
		is_least = less(worth, least);
		least = choose(is_least, worth, least);
		view->spare = choose(is_least, index + 1, view->spare);
	}
	return 1;
}

/* Count a connection of a prefix: the index of its row + 1, or 0 if there was no room. `is_new` is 1 if the
 * prefix had no row. */
INLINE u32 open_one(u32 level, u64 mixed, u64 service, u64 *is_new)
{
	u64 set_mask = tally_set_mask(level), tag = tally_tag(mixed, set_mask, service), claimed = 0;
	u32 first = tally_first(level, mixed), index, found = 0;
	struct tally *row, *set = connections.lookup(&first);
	struct set_view view;

	*is_new = 0;
	if (!set)
		return 0;
#pragma nounroll
	for (u64 attempt = 0; attempt < CLAIM_ATTEMPTS; attempt++) {
		if (!view_set(first, tag, &view))
			break;
		if (!view.own && !claimed) {
			/* look again once no other CPU can be making the prefix a row */
			claimed = is_zero(__sync_val_compare_and_swap(&set->claimed, 0, 1));
			continue;
		}
		if (!(view.own | view.spare))
			break;
		index = (view.own ? view.own : view.spare) - 1;
		row = connections.lookup(&index);
		if (!row)
			break;
		if (!view.own) {
			if (!take_over(row, level, mixed & set_mask, tag))
				continue;
			*is_new = 1;
			found = index + 1;
			break;
		}
		__sync_fetch_and_add(&row->open, 1);
		if (*(volatile u64 *)&row->tag == tag) {
			found = index + 1;
			break;
		}
		/* it was given away in between */
		__sync_fetch_and_add(&row->open, -1);
	}
	if (claimed)
		__sync_val_compare_and_swap(&set->claimed, 1, 0);
	return found;
}

/* What each level learns from a completed handshake. */
INLINE void opened(struct bpf_sock_ops *ops, const struct source *source, u32 service)
{
	struct policy_key key = { .service = service };
	u64 now = bpf_ktime_get_ns(), new_address = 0, new_64 = 0;
	struct identity *made;
	struct control *settings;
	struct tally *row;
	struct bpf_sock *socket = ops->sk;
	struct held *held_by;
	u32 zero = 0;

	made = identity.lookup(&zero);
	settings = control.lookup(&zero);
	if (!made || !settings || !socket)
		return;
	held_by = held.sk_storage_get(socket, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!held_by)
		return;
#pragma nounroll
	for (u32 level = 0; level < LEVELS; level++) {
		u64 mixed, is_new, child;
		u32 index;

		if (source->ipv4 && (level == LEVEL_128 || level == LEVEL_32))
			continue;
		policy_key_at(source->hi, source->lo, level, &key);
		mixed = mixed_key(key.hi, key.lo, made->seed);
		index = open_one(level, mixed, service, &is_new);
		if (!index) {
			u64 *missed = uncounted.lookup(&level);

			if (missed)
				__sync_fetch_and_add(missed, 1);
			continue;
		}
		held_by->row[level] = index--;
		row = connections.lookup(&index);
		if (!row)
			continue;
		if (level == LEVEL_128)
			new_address = is_new;
		if (level == LEVEL_64)
			new_64 = is_new;
		__sync_fetch_and_add(&row->completed, 1);
		__sync_fetch_and_add(&row->newcomers, level == LEVEL_64 ? new_address : new_64);
		row->last_ns = now;
		child = level == LEVEL_64 ? source->lo : source->hi;
		if (level != LEVEL_128) {
			sketch_roll(&row->window, row->recent, row->before, now / (SKETCH_WINDOW_S * 1000000000ull));
			sketch_add(row->recent, mix(child ^ made->seed));
		}
		mark_crowded(row, level, mixed, is_crowded(row->open, &key, level, settings));
	}
	/* only sockets counted here report their end; what another program asked for stays */
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

INLINE void closed(struct bpf_sock_ops *ops, const struct source *source)
{
	struct policy_key key = {};
	u64 now = bpf_ktime_get_ns();
	struct identity *made;
	struct control *settings;
	struct bpf_sock *socket = ops->sk;
	struct held *held_by;
	struct tally *row;
	u32 zero = 0;

	made = identity.lookup(&zero);
	settings = control.lookup(&zero);
	if (!made || !settings || !socket)
		return;
	held_by = held.sk_storage_get(socket, 0, 0);
	if (!held_by)
		return;
#pragma nounroll
	for (u32 level = 0; level < LEVELS; level++) {
		u32 index = held_by->row[level];

		if (!index)
			continue;
		held_by->row[level] = 0;
		index--;
		row = connections.lookup(&index);
		if (!row)
			continue;
		policy_key_at(source->hi, source->lo, level, &key);
		/* not by the port: the configuration may have changed since */
		key.service = tally_service(row->tag);
		row->last_ns = now;
		/* the mark before the count: once nothing is open the row may be another's */
		mark_crowded(row, level, mixed_key(key.hi, key.lo, made->seed),
			     is_crowded(row->open - 1, &key, level, settings));
		__sync_fetch_and_add(&row->open, -1);
	}
}

#ifndef EDGE_RECORDED
int edge_sockops(struct bpf_sock_ops *ops)
{
	struct source source = {};
	u32 port = ops->local_port;
	u8 *service;

	if (ops->op == BPF_SOCK_OPS_STATE_CB) {
		if (ops->args[1] == TCP_STATE_CLOSE && !remote_source(ops, &source))
			closed(ops, &source);
		return 1;
	}
	if (ops->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	service = services.lookup(&port);
	if (service && *service && !remote_source(ops, &source))
		opened(ops, &source, (*service - 1) & 1);
	return 1;
}
#endif
