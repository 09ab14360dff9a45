/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The limiter: parse, policy by longest match, GCRA at every level, verdict, count.
 *
 * Invariants:
 *   admitted-by-all: a SYN passes only if every level asked admits it, its rate and its open connections.
 *   charged-if-admitted: a level is charged only for a SYN that passes; on a lost race charges are
 *     given back and the decision is made again, at last refused (REASON_RACE_LOST).
 *   refusing-writes-nothing: a refused SYN writes no shared line, only this CPU's counter.
 *   doubt-passes: what cannot be parsed or looked up passes and is counted.
 *
 * What an attacker could try: forged sources (they spend their prefix's budget here, never its
 * standing: nothing in this program feeds reputation); sweeps of new prefixes (rows free themselves,
 * a full line charges the shorter prefix); every prefix at once (the shared budget).
 */

/* Every retry means that another CPU got through, so losing four in a row is a flood's problem. */
#define MAX_ATTEMPTS 4

/* Nested expired range entries looked behind for one that is in force. */
#define MAX_EXPIRED_RANGES 4

/* Where one level's limit and line are; the rest of what it needs is in the map `scratch`. */
struct place {
	struct line *line;
	const struct limit *limit;
};

INLINE void count(u32 reason, int drop)
{
	struct counter *counter = counters.lookup(&reason);

	if (!counter)
		return;
	if (drop)
		counter->dropped++;
	else
		counter->passed++;
}

INLINE int is_refusal(u32 reason)
{
	return reason >= REASON_BLOCKED_LEARNED && reason <= REASON_CHALLENGED;
}

INLINE int is_unjudged(u32 reason)
{
	return reason >= REASON_TRUNCATED && reason <= REASON_ESP;
}

/* Whether an entry counts now: not expired, and not a dead controller's lesson. */
INLINE int in_force(const struct policy_entry *entry, u64 now, int dead)
{
	if (entry->expires_ns && entry->expires_ns <= now)
		return 0;
	return !(dead && entry->origin == ORIGIN_LEARNED);
}

INLINE u32 blocked_reason(u32 origin)
{
	return origin == ORIGIN_LEARNED ? REASON_BLOCKED_LEARNED :
	       origin == ORIGIN_LIST	? REASON_BLOCKED_LIST :
					  REASON_BLOCKED_OPERATOR;
}

/* Let an entry decide, if none more specific has. 1 if the walk ends here. */
INLINE int decide(const struct policy_entry *entry, u32 level, u32 length, struct verdict *out)
{
	if (entry->standing == STANDING_BLOCK) {
		/* a hole inside this block decided already: the block is not asked */
		if (out->length)
			return 0;
		out->reason = blocked_reason(entry->origin);
		out->length = length;
		return 1;
	}
	if (entry->standing == STANDING_ALLOW && !out->length)
		out->reason = REASON_ALLOWED;
	if (!out->length)
		out->length = length;
	if (entry->standing == STANDING_ALLOW) {
		/* with a more specific suspect below, only the longer levels are asked */
		out->cut = level;
		return 1;
	}
	return 0;
}

/* Whether the daemon says that this level may have an entry for the mixed key. */
INLINE int may_have_entry(u64 mixed, u32 level, u32 service)
{
	u32 bit = (u32)((mixed >> 32) + service) & (EDGE_FILTER_BITS - 1);
	u32 index = level * (EDGE_FILTER_BITS / 64) + bit / 64;
	u64 *word = policy_filter.lookup(&index);

	return !word || *word & (1ull << (bit & 63));
}

/* The entry of a prefix at a level's length: from its line, or, if it found no room there, from the hash. */
INLINE int find_entry(struct policy_key *key, u64 mixed, u32 level, struct policy_entry *found)
{
	u32 index = (u32)(mixed & (EDGE_POLICY_LINES - 1));
	struct policy_entry *entry;
	struct policy_line *line;

	line = policy_lines.lookup(&index);
	if (!line)
		return 0;
	if (find_in_line(line, policy_tag(mixed, EDGE_POLICY_LINES - 1, level, key->service), found))
		return 1;
	if (!(line->tag[0] >> POLICY_MORE_SHIFT & 1))
		return 0;
	entry = policy.lookup(key);
	if (!entry)
		return 0;
	*found = *entry;
	return 1;
}

/* The longest match decides between pass, block and limit; each level's own standing chooses its limit;
 * GOOD and ALLOW cut the chain, so that shorter levels are neither asked nor charged. */
INLINE void match_policy(u64 now, u64 seed, const struct control *settings, struct scratch *working,
			 struct verdict *out)
{
	int dead = settings->heartbeat_ns + settings->heartbeat_grace_ns < now &&
		   !(settings->flags & CONTROL_DEAD_KEEPS_BLOCKS);
	struct policy_entry *range = NULL, *entry = &working->entry;
	struct asked *asked = working->asked;
	struct policy_key key = {};
	u32 range_length = 0;

	if (settings->policy_ranges) {
		struct range_key trie = { .prefixlen = 8 + 128, .service = out->service };

		*(u32 *)&trie.address[0] = htonl((u32)(out->hi >> 32));
		*(u32 *)&trie.address[4] = htonl((u32)out->hi);
		*(u32 *)&trie.address[8] = htonl((u32)(out->lo >> 32));
		*(u32 *)&trie.address[12] = htonl((u32)out->lo);
		/* the longest in force: the daemon removes what has expired within a tick, if it lives */
		for (u64 i = 0; i < MAX_EXPIRED_RANGES; i++) {
			range = policy_ranges.lookup(&trie);
			/* an IPv6 range such as ::/8 must not catch the IPv4 addresses that ride inside it */
			if (!range || (out->ipv4 && range->length < 32))
				break;
			if (in_force(range, now, dead)) {
				range_length = range->length;
				break;
			}
			if (!range->length)
				break;
			trie.prefixlen = 8 + range->length - 1;
		}
	}
	key.service = out->service;
#pragma unroll
	for (u32 level = 0; level < LEVELS; level++) {
		/* the range entry has its turn between the levels */
		if (range && range_length > level_length(level)) {
			if (decide(range, level, range_length, out))
				return;
			range_length = 0;
		}
		if (out->ipv4 && (level == LEVEL_128 || level == LEVEL_32))
			continue;
		/* rows at /128 exist for entries only, so its key is needed for nothing else */
		if (level == LEVEL_128 && !(settings->policy_levels & (1 << level)))
			continue;
		policy_key_at(out->hi, out->lo, level, &key);
		asked[level].mixed = mixed_key(key.hi, key.lo, seed);
		if (!(settings->policy_levels & (1 << level)) ||
		    !may_have_entry(asked[level].mixed, level, out->service))
			continue;
		if (!find_entry(&key, asked[level].mixed, level, entry) || !in_force(entry, now, dead))
			continue;
		if (decide(entry, level, level_length(level), out))
			return;
		if (entry->standing == STANDING_BLOCK)
			continue;
		out->standing[level] = entry->standing;
		if (entry->standing == STANDING_GOOD) {
			out->cut = level + 1;
			return;
		}
	}
	if (range && range_length)
		decide(range, LEVELS, range_length, out);
}

/* The time, read once a tick: exact reading costs as much as the rest of a decision. It never runs ahead, and is good
 * enough for what expires, and to refuse whoever is far beyond a limit. */
INLINE u64 tick_clock(struct scratch *working)
{
	u64 tick = bpf_jiffies64();

	if (working->tick != tick) {
		working->tick = tick;
		working->tick_ns = bpf_ktime_get_ns();
	}
	return working->tick_ns;
}

/* The levels at which a source has state, a bit each. */
INLINE u64 levels_with_state(const struct verdict *out)
{
	u64 levels = (1ull << (out->cut & 7)) - 1;

	/* /128 state exists for explicit entries only; IPv4 has no /128 and nothing above its /16 */
	levels &= ~(is_zero(out->standing[LEVEL_128]) << LEVEL_128);
	return levels & ~((out->ipv4 & 1) * (1ull << LEVEL_128 | 1ull << LEVEL_32));
}

/* Find the line and the limit of every level. 0 if a map is missing. Lines are asked for before anybody looks at
 * one: the misses of cold ones then overlap. */
INLINE int prepare(const struct verdict *out, struct asked *asked, struct place *places)
{
	u64 levels = levels_with_state(out);

#pragma unroll
	for (u32 level = 0; level < LEVELS; level++) {
		u32 index = ((out->service & 1) * STANDINGS + (out->standing[level] & 3)) * LEVELS + level;
		u64 mixed = asked[level].mixed;
		const struct limit *limit;
		struct line *line;

		limit = limits.lookup(&index);
		index = level_base(level) + (u32)(mixed & level_mask(level));
		line = rows.lookup(&index);
		if (!limit || !line)
			return 0;
		places[level].limit = limit;
		places[level].line = line;
		asked[level].use = 0;
		asked[level].open = 0;
		asked[level].row.next = 0;
		if (!(levels >> level & 1))
			continue;
		asked[level].open = limit->open;
		if (!limit->emission_interval_ns)
			continue;
		asked[level].use = 1;
		asked[level].tag = row_tag(mixed, level_mask(level), out->service & 1);
		(void)*(volatile u64 *)&line->tat_ns[0];
	}
	return 1;
}

/* Find every level's row, shortest prefix first. The level that refuses whatever the exact time is, or LEVELS. */
INLINE u32 find_rows(struct asked *asked, struct place *places, u64 now, volatile struct found *found)
{
	found->doubt = 0;
#pragma unroll
	for (int level = LEVELS - 1; level >= 0; level--) {
		const struct limit *limit = places[level].limit;
		volatile struct row *row = &asked[level].row;

		if (!asked[level].use)
			continue;
		find_row(places[level].line, asked[level].tag, row);
		if (!row->held || row->tat <= now + limit->burst_tolerance_ns)
			continue;
		if (!found->doubt && gcra_is_spent(row->tat, now, limit))
			return level;
		/* by the exact time this level may refuse; then no longer one is asked */
		found->doubt = 1;
	}
	return LEVELS;
}

/* Ask all levels by the exact time, shortest first, writing nothing shared. The level that refuses, or LEVELS. */
INLINE u32 ask(struct asked *asked, struct place *places, u64 now, volatile struct found *found)
{
	found->asked = 0;
	found->room = 0;
#pragma unroll
	for (int level = LEVELS - 1; level >= 0; level--) {
		const struct limit *limit = places[level].limit;
		volatile struct row *row = &asked[level].row;

		if (!asked[level].use)
			continue;
		found->asked = 1;
		row->next = 0;
		/* a row that is not held is free or of no concern: it refuses nothing */
		if (!row->held && row->tat > now)
			continue;
		row->next = gcra_charge(row->tat, now, limit);
		if (!row->next)
			return level;
		found->room = 1;
	}
	return LEVELS;
}

/* Give back what was charged at the levels before `lost`. */
INLINE void give_back(struct asked *asked, struct place *places, u64 lost)
{
#pragma unroll
	for (u64 level = 0; level < LEVELS; level++) {
		struct row *row = &asked[level].row;

		if (level > lost && row->next)
			__sync_fetch_and_add(&places[level].line->tat_ns[row->way & 3],
					     -places[level].limit->emission_interval_ns);
	}
}

/* Charge every level asked, shortest first; on a lost race give all back. 1 if all were charged. */
INLINE int charge(struct asked *asked, struct place *places, volatile struct found *found)
{
	found->lost = LEVELS;
#pragma unroll
	for (int level = LEVELS - 1; level >= 0; level--) {
		struct row *row = &asked[level].row;
		struct line *line = places[level].line;
		u64 way = row->way & 3;

		if (!row->next)
			continue;
		if (__sync_val_compare_and_swap(&line->tat_ns[way], row->tat, row->next) != row->tat) {
			found->lost = level;
			break;
		}
		/* A claimed row belongs to its new owner from here on. Another CPU that still sees the old
		 * tag may charge the old prefix's connection to it: at most one a CPU, as promised. */
		if (!row->held)
			*(volatile u64 *)&line->tag[way] = asked[level].tag;
	}
	if (found->lost == LEVELS)
		return 1;
	give_back(asked, places, found->lost);
	return 0;
}

/* What the handshakes of a prefix say: how many of its connections are open, and whether there ever was one. */
INLINE void read_tally(u32 level, u64 mixed, u64 service, u64 *open, u64 *known)
{
	u64 tag = tally_tag(mixed, tally_set_mask(level), service & 1), is_own;
	u32 index = tally_first(level, mixed);
	struct tally *row;

	*open = 0;
	*known = 0;
#pragma nounroll
	for (u64 way = 0; way < TALLIES_PER_SET; way++, index++) {
		row = connections.lookup(&index);
		if (!row)
			return;
		is_own = is_zero(row->tag ^ tag);
		*known |= is_own;
		*open |= row->open & -is_own;
	}
}

/* Whether a source's prefix at a level ever completed a handshake. */
INLINE u64 is_known(u32 level, u64 seed, const struct verdict *out)
{
	u64 open, known;

	read_tally(level, mixed_key(out->hi, level == LEVEL_128 ? out->lo : 0, seed), out->service, &open, &known);
	return known;
}

/* The shortest level asked at which as many connections are open as its limit allows, or LEVELS. Suspect and bad
 * senders, who may have few, are always looked at, the others only where the map `crowded` says so. */
INLINE u32 crowded_level(const struct asked *asked, const struct verdict *out)
{
	struct policy_key key = { .service = out->service };
	struct crowded_levels *levels;
	u32 zero = 0, refused = LEVELS, tight;

	/* SUSPECT and BAD have this bit, NEW and GOOD have not */
	tight = (out->standing[LEVEL_128] | out->standing[LEVEL_64] | out->standing[LEVEL_56] |
		 out->standing[LEVEL_48] | out->standing[LEVEL_32]) &
		STANDING_SUSPECT;
	levels = crowded_levels.lookup(&zero);
	if (!levels)
		return LEVELS;
	if (!tight && !(levels->prefixes[LEVEL_128] | levels->prefixes[LEVEL_64] | levels->prefixes[LEVEL_56] |
			levels->prefixes[LEVEL_48] | levels->prefixes[LEVEL_32]))
		return LEVELS;
#pragma unroll
	for (u32 level = 0; level < LEVELS; level++) {
		u32 slot = crowded_slot(level, asked[level].mixed), *marked;
		u64 most = asked[level].open, open, known;
		s64 *correction;

		if (!most)
			continue;
		marked = crowded.lookup(&slot);
		if (!(out->standing[level] & STANDING_SUSPECT) && (!marked || !*marked))
			continue;
		policy_key_at(out->hi, out->lo, level, &key);
		read_tally(level, asked[level].mixed, out->service, &open, &known);
		correction = corrections.lookup(&key);
		if (correction)
			open += *correction;
		/* more corrected away than is there: others closed meanwhile */
		if ((s64)open >= (s64)most)
			refused = level;
	}
	return refused;
}

/* Where most SYNs of a prefix are forged, those of its senders who completed a handshake before are charged to
 * a row of their own, and so are connections whose client answered a challenge, each with the same limit: what
 * a forger spends is the others'. It bounds as well who forges his own network to be spared: he gets three times
 * its limit. A forger of a verified sender's very address spends the verified senders' budget; only a challenge
 * tells the two apart. */
INLINE void spare_verified(u64 now, u64 seed, const struct control *settings, struct scratch *working,
			   struct verdict *out)
{
	struct policy_key key = { .service = out->service };
	u64 forged_here = 0, known_address = 0, known_64, row = ROW_OF_VERIFIED;
	struct asked *asked = working->asked;

#pragma unroll
	for (u32 level = LEVEL_64; level < LEVELS; level++) {
		u64 *until;

		if (!asked[level].use || !(settings->forged_levels & (1 << level)))
			continue;
		policy_key_at(out->hi, out->lo, level, &key);
		until = forged.lookup(&key);
		if (until && *until > now)
			forged_here |= 1 << level;
	}
	if (!forged_here)
		return;
	out->forged = forged_here;
	if (working->is_plain && has_proof(out, working->plain.ports, now)) {
		out->own = forged_here;
		row = ROW_OF_PROVED;
	} else {
		if (!out->ipv4)
			known_address = is_known(LEVEL_128, seed, out);
		known_64 = is_known(LEVEL_64, seed, out);
		out->own = forged_here & ((known_address << LEVEL_64) | (known_64 * (~0ull << LEVEL_56)));
	}
#pragma unroll
	for (u32 level = LEVEL_64; level < LEVELS; level++)
		asked[level].tag |= row & -((u64)(out->own >> level) & 1);
}

/* The one budget of all that no row keeps count of: 1 if it admits this connection. */
INLINE int charge_shared(u64 now, const struct control *settings)
{
	struct limit limit = { .emission_interval_ns = settings->untracked_interval_ns,
			       .burst_tolerance_ns = settings->untracked_tolerance_ns };
	u64 *tat, before, after;
	u32 zero = 0;

	tat = untracked.lookup(&zero);
	if (!tat)
		return 1;
	before = *(volatile u64 *)tat;
	after = gcra_charge(before, now, &limit);
	return after && __sync_val_compare_and_swap(tat, before, after) == before;
}

/* No level has room for this prefix: a verified sender passes, the others share one counted budget. */
INLINE u32 judge_untracked(u64 now, u64 seed, const struct control *settings, const struct verdict *out)
{
	if (is_known(LEVEL_64, seed, out))
		return REASON_VERIFIED;
	return charge_shared(now, settings) ? REASON_UNTRACKED : REASON_LIMIT_UNTRACKED;
}

/* The limit of a level is spent, for `reason`. Where that was a forger's doing, ask the client first. */
INLINE u32 refuse_or_challenge(u32 reason, u64 now, u64 seed, const struct control *settings,
			       const struct scratch *working, const struct verdict *out)
{
	if (!working->is_plain || !(out->forged >> ((reason - REASON_LIMIT_128) & 7) & 1) ||
	    has_proof(out, working->plain.ports, now))
		return reason;
	if (is_late_retransmission(&working->plain, seed, now) && charge_shared(now, settings))
		return REASON_UNTRACKED;
	return REASON_CHALLENGED;
}

/* While most SYNs of the whole host are forged, from everywhere, no prefix's limit is spent: 1 if this client is to
 * be asked first, which costs less than the kernel's own answer. Verified senders are not. */
INLINE int is_stranger(u64 now, u64 seed, const struct control *settings, const struct scratch *working,
		       const struct verdict *out)
{
	if (out->cut < LEVELS || has_proof(out, working->plain.ports, now))
		return 0;
	return !is_known(LEVEL_64, seed, out) &&
	       !(is_late_retransmission(&working->plain, seed, now) && charge_shared(now, settings));
}

INLINE u32 limit_rate(u64 now, u64 seed, int recorded, const struct control *settings, struct scratch *working,
		      struct verdict *out)
{
	struct asked *asked = working->asked;
	struct place places[LEVELS];
	u32 refused;

	if (!prepare(out, asked, places))
		return REASON_INTERNAL;
	if (settings->forged_levels)
		spare_verified(now, seed, settings, working, out);
	refused = crowded_level(asked, out);
	if (refused < LEVELS) {
		out->length = level_length(refused);
		return REASON_OPEN_128 + refused;
	}
#pragma nounroll
	for (u64 attempt = 0; attempt < MAX_ATTEMPTS; attempt++) {
		refused = find_rows(asked, places, now, &working->found);
		if (refused == LEVELS) {
			if (!recorded)
				out->now_ns = bpf_ktime_get_ns();
			now = *(volatile u64 *)&out->now_ns;
			refused = ask(asked, places, now, &working->found);
		}
		if (refused < LEVELS) {
			out->length = level_length(refused);
			return REASON_LIMIT_128 + refused;
		}
		if (working->found.asked && !working->found.room)
			return judge_untracked(now, seed, settings, out);
		if (charge(asked, places, &working->found))
			return out->cut < LEVELS ? REASON_CONFORMING_GOOD : REASON_CONFORMING;
	}
	return REASON_RACE_LOST;
}

/* From a SYN to the reason it passes or is refused for. */
INLINE u32 judge(struct xdp_md *ctx, const struct packet *packet, int recorded, const struct control *settings,
		 struct verdict *out)
{
	struct source source = {};
	u32 port = packet->port, zero = 0;
	struct scratch *working;
	struct identity *made;
	u32 reason, flood;
	u8 *service;
	u64 now;

	service = services.lookup(&port);
	if (!service || !*service)
		return REASON_OTHER_PORT;
	out->service = (*service - 1) & 1;
	if (settings->flags & CONTROL_LISTED_ONLY) {
		struct address destination = { .hi = packet->destination_hi, .lo = packet->destination_lo };

		if (!destinations.lookup(&destination))
			return REASON_OTHER_DESTINATION;
	}
	out->syn = 1;
	if (packet->ipv4)
		key_ipv4((u32)packet->source_lo, &source);
	else if (key_ipv6(packet->source_hi, packet->source_lo, &source))
		return REASON_BOGON;
	out->hi = source.hi;
	out->lo = source.lo;
	out->ipv4 = source.ipv4;
	if (settings->flags & CONTROL_EXEMPT_PRIVATE &&
	    (packet->ipv4 ? ipv4_is_private((u32)packet->source_lo) :
			    ipv6_is_private(packet->source_hi, packet->source_lo)))
		return REASON_EXEMPT;
	made = identity.lookup(&zero);
	working = scratch.lookup(&zero);
	if (!made || !working)
		return REASON_INTERNAL;
	now = recorded ? out->now_ns : tick_clock(working);
	out->now_ns = now;
	match_policy(now, made->seed, settings, working, out);
	if (out->reason != REASON_INTERNAL)
		return out->reason;
	/* through the map, so that the verifier forgets which of many ways led here */
	now = *(volatile u64 *)&out->now_ns;
	flood = settings->flood_until_ns > now;
	working->is_plain = (flood || settings->forged_levels) && settings->flags & CONTROL_CHALLENGE &&
			    is_plain((void *)(long)ctx->data, (void *)(long)ctx->data_end, &working->plain);
	if (flood && working->is_plain && is_stranger(now, made->seed, settings, working, out))
		return REASON_CHALLENGED;
	out->reason = limit_rate(now, made->seed, recorded, settings, working, out);
	reason = *(volatile u32 *)&out->reason;
	if (working->is_plain && reason >= REASON_LIMIT_128 && reason <= REASON_LIMIT_32)
		reason = refuse_or_challenge(reason, now, made->seed, settings, working, out);
	return reason;
}

INLINE int finish(u32 reason, const struct control *settings)
{
	int drop = settings->mode == MODE_ENFORCE &&
		   (is_refusal(reason) || (is_unjudged(reason) && settings->flags & CONTROL_STRICT));

	count(reason, drop);
	return drop ? XDP_DROP : XDP_PASS;
}

/* Judge one packet; `recorded`: by the clock in `verdicts`, leaving the decision there in any case. */
INLINE int run(struct xdp_md *ctx, int recorded)
{
	struct packet packet = {};
	struct control *settings;
	struct verdict *out;
	u32 zero = 0, reason;
	int parsed, action;
	u64 now;

	settings = control.lookup(&zero);
	if (!settings)
		return XDP_PASS;
	parsed = parse((void *)(long)ctx->data, (void *)(long)ctx->data_end, &packet);
	if (parsed != PARSED_SYN && !recorded) {
		if (parsed == REASON_NOT_SYN && settings->flags & CONTROL_CHALLENGE &&
		    take_answer(ctx))
			parsed = REASON_PROVED;
		return finish(parsed, settings);
	}
	out = verdicts.lookup(&zero);
	if (!out)
		return XDP_PASS;
	now = out->now_ns;
	__builtin_memset(out, 0, sizeof(*out));
	out->now_ns = now;
	out->dport = packet.port;
	out->cut = LEVELS;
	out->reason = REASON_INTERNAL;
	reason = parsed == PARSED_SYN ? judge(ctx, &packet, recorded, settings, out) : parsed;
	action = finish(reason, settings);
	out->reason = reason;
	out->drop = action == XDP_DROP;
	if (out->drop && reason == REASON_CHALLENGED && !recorded)
		return answer(ctx, out->now_ns);
	return action;
}

/* One of the two, the other is not compiled: most of a start is the compiler's. */
#ifdef EDGE_RECORDED
int edge_xdp_recorded(struct xdp_md *ctx)
{
	return run(ctx, 1);
}
#else
int edge_xdp(struct xdp_md *ctx)
{
	return run(ctx, 0);
}
#endif
