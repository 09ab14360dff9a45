/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Every map, with its row, key, writer, reader, size, and what happens when it is full.
 *
 * Sizes come from the configuration as -D constants (edge/kernel/program.py). With EDGE_PINS defined a
 * map is pinned in that directory, or taken from there; without, it is private to the process: tests
 * and `edge packets` run on private copies, never on the live maps.
 */
#ifdef EDGE_PINS
#define EDGE_MAP(type, key, value, name, size, flags) \
	BPF_TABLE_PINNED7(type, key, value, name, size, EDGE_PINS "/" #name, flags)
#else
#define EDGE_MAP(type, key, value, name, size, flags) BPF_F_TABLE(type, key, value, name, size, flags)
#endif

/* identity[0]: layout, build, seed. Writer: loader, once. Readers: program (seed), loader, daemon. */
EDGE_MAP("array", u32, struct identity, identity, 1, 0);

/* control[0]: heartbeat, mode, presence. Writer: daemon. Reader: program. */
EDGE_MAP("array", u32, struct control, control, 1, 0);

/* limits[(service * STANDINGS + standing) * LEVELS + level]. Writer: daemon. Reader: program. */
EDGE_MAP("array", u32, struct limit, limits, SERVICES * STANDINGS * LEVELS, 0);

/* services[port]: 0 = not protected, else service + 1. Writer: daemon. Reader: program. */
EDGE_MAP("array", u32, u8, services, 65536, 0);

/* destinations: protected addresses, asked only with CONTROL_LISTED_ONLY. Writer: daemon. Reader:
 * program. Full: the daemon refuses the configuration. */
EDGE_MAP("hash", struct address, u8, destinations, 4096, 0);

/* policy: entries at the levels' lengths, the record of what is installed. Writer: daemon. Readers: daemon; program,
 * for entries that found no room in their line. Full: the daemon keeps what is there, counts and logs what found
 * no room; nothing is lost in nftables. */
EDGE_MAP("hash", struct policy_key, struct policy_entry, policy, EDGE_POLICY_ENTRIES, 0);

/* policy_lines: the same entries where a packet finds them with one cache line. Writer: daemon, through a mapping.
 * Reader: program. Full (more than four in a line): the rest is looked up in `policy`. */
EDGE_MAP("array", u32, struct policy_line, policy_lines, EDGE_POLICY_LINES, BPF_F_MMAPABLE);

/* policy_filter: one bit for each mixed key and service at which a level may have an entry, EDGE_FILTER_BITS
 * a level. A clear bit saves the look at a line, which is likely cold. Writer: daemon, through a
 * mapping; a bit is set before its entry is written and cleared after the last entry under it is gone.
 * Reader: program. Full: more lookups, no wrong answer. */
EDGE_MAP("array", u32, u64, policy_filter, LEVELS * (EDGE_FILTER_BITS / 64), BPF_F_MMAPABLE);

/* policy_ranges: entries between the levels. Asked only while control.policy_ranges is not 0, because a
 * trie costs more than the whole rest of the way. Writer: daemon. Reader: program. Full: as policy. */
EDGE_MAP("lpm_trie", struct range_key, struct policy_entry, policy_ranges, EDGE_POLICY_RANGES, BPF_F_NO_PREALLOC);

/* rows: GCRA state, one region of lines a level (EDGE_LINES_x lines from EDGE_BASE_x on). Writer:
 * program. Reader: daemon, through one memory mapping. Full (four live rows in a line): the prefix is
 * charged at its shorter levels only; nothing live is ever evicted. */
EDGE_MAP("array", u32, struct line, rows, EDGE_LINES, BPF_F_MMAPABLE);

/* untracked[0]: TAT of the budget shared by those for whom no level had room. Writer: program. */
EDGE_MAP("array", u32, u64, untracked, 1, 0);

/* counters[reason], per CPU. Writer: program. Reader: daemon. */
EDGE_MAP("percpu_array", u32, struct counter, counters, REASONS, 0);

/* connections: a tally of connections for each prefix that completed a handshake, one region of sets a level
 * (EDGE_SETS_x sets from EDGE_SET_BASE_x on). Writer: sockops program. Readers: daemon, through one memory
 * mapping; XDP program, only where a prefix is crowded or forged, or no level had room. Full (four rows with
 * open connections in a set): the connection is not counted at that level; only completed handshakes write
 * here, so forged SYNs cannot push anyone out. */
EDGE_MAP("array", u32, struct tally, connections, EDGE_SETS * TALLIES_PER_SET, BPF_F_MMAPABLE);

/* held: which rows count a socket's connection, kept with the socket, so that its end is counted where its
 * beginning was. Writer and reader: sockops program. Full (no memory): the connection is not counted. */
EDGE_MAP("sk_storage", int, struct held, held, 0, BPF_F_NO_PREALLOC);

/* crowded_levels[0]: how many prefixes of a level have as many open connections as the tightest limit allows,
 * so that a SYN asks about open connections only while somebody is near a limit. Writer: sockops program.
 * Reader: XDP program. */
EDGE_MAP("array", u32, struct crowded_levels, crowded_levels, 1, 0);

/* crowded[level * CROWDED_SLOTS + slot]: the same by a few bits of the mixed key. Writer: sockops program.
 * Reader: XDP program. */
EDGE_MAP("array", u32, u32, crowded, LEVELS * CROWDED_SLOTS, 0);

/* corrections: open connections that `connections` does not know of, or counts too many, by the kernel's socket
 * table. Writer: daemon. Readers: both programs. Full: the daemon counts and logs what found no room. */
EDGE_MAP("hash", struct policy_key, s64, corrections, 16384, BPF_F_NO_PREALLOC);

/* uncounted[level]: connections for which a level had no room. Writer: sockops program. Reader: daemon. */
EDGE_MAP("array", u32, u64, uncounted, LEVELS, 0);

/* forged: prefixes most of whose SYNs are forged, until when (CLOCK_MONOTONIC). Writer: daemon. Reader: XDP
 * program. Full: the daemon leaves the others out. */
EDGE_MAP("hash", struct policy_key, u64, forged, 4096, BPF_F_NO_PREALLOC);

/* proved: connections whose client answered a challenge, until when (CLOCK_MONOTONIC). Writer and reader: XDP
 * program. Full: the least recently used goes (LRU): only clients that receive at their address write here, and one
 * that lost its proof is challenged again. */
struct proof_key {
	u64 hi, lo;	/* as keyed */
	u32 ports;
	u32 pad;
};
EDGE_MAP("lru_hash", struct proof_key, u64, proved, 65536, 0);

/* seen: which SYNs came in the last windows, by a few bits of a keyed hash: a word for each of the last four
 * windows. Writer and reader: XDP program, only for SYNs that are to be challenged. Full (a million SYNs a second
 * fill a fifth of it): some SYNs are taken for retransmissions, and meet the shared budget instead. */
#define SEEN_WINDOWS 4
#define SEEN_LINES 131072
struct seen_line {
	u64 window[SEEN_WINDOWS];
};
EDGE_MAP("array", u32, struct seen_line, seen, SEEN_LINES, 0);

/* verdicts[0], per CPU: how this CPU judged its last SYN; the clock of recorded packets comes in here.
 * Writer: program. Reader: `edge packets`. Kept in a map and not on the stack (512 bytes), and so that
 * the verifier forgets which of many ways led to a value: it would otherwise follow each of them through
 * the limiter. */
EDGE_MAP("percpu_array", u32, struct verdict, verdicts, 1, 0);

/* scratch[0], per CPU: what each level needs to decide and to charge, between asking and charging. For
 * the same two reasons. Writer and reader: program. */
struct asked {
	u64 mixed;	/* mixed key of the prefix at this level */
	u64 tag;
	u64 use;	/* 1: this level's rate is asked */
	u64 open;	/* most open connections; 0: not asked */
	struct row row;
};
struct found {
	u64 doubt;	/* 1: the clock that is read once a tick does not say whether some level refuses */
	u64 asked;	/* 1: some level's rate was asked */
	u64 room;	/* 1: and some level keeps count of it */
	u64 lost;	/* the level whose row another CPU changed first, or LEVELS */
};
struct scratch {
	struct asked asked[LEVELS];
	struct found found;
	struct policy_entry entry;	/* the one found last */
	u64 tick;	/* when `tick_ns` was read, in jiffies */
	u64 tick_ns;	/* CLOCK_MONOTONIC */
	struct plain plain;	/* what a challenge needs of the frame */
	u64 is_plain;
};
EDGE_MAP("percpu_array", u32, struct scratch, scratch, 1, 0);
