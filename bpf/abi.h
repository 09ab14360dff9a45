/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the kernel programs and the daemon share: the one place where a shared
 * struct, enum or field is written. `make abi` generates edge/abi.py from the
 * debug information of this file; CI compares the two, and the loader compares
 * them again with what bcc compiled.
 *
 * Rules: no implicit padding, u64 first, host byte order. Addresses are numbers:
 * `hi` is the upper half of an address as a number, so 2001:db8::/32 is
 * 0x20010db800000000 here and in Python alike.
 */
#ifndef EDGE_ABI_H
#define EDGE_ABI_H

/* Raised by hand when the meaning of a field changes without its shape. */
#define EDGE_ABI_VERSION 1

/* The prefix lengths at which state is kept, longest first. */
enum level {
	LEVEL_128,
	LEVEL_64,
	LEVEL_56,
	LEVEL_48,
	LEVEL_32,
	LEVELS,
};

/* Ports come in two services with limits, standing and blocks of their own. */
enum service {
	SERVICE_MX,		/* port 25: mail from other servers */
	SERVICE_SUBMISSION,	/* ports 465 and 587: mail from own users */
	SERVICES,
};

/* Every way a packet can leave the program: the counter's index, the metric's
 * label and the word in `edge explain`. The first group is not a new connection
 * to a protected port. */
enum reason {
	REASON_NOT_IP,			/* another EtherType */
	REASON_NOT_TCP,			/* another transport */
	REASON_NOT_SYN,			/* TCP, not a first SYN */
	REASON_OTHER_PORT,		/* a SYN to a port that is not protected */
	REASON_OTHER_DESTINATION,	/* a SYN to an address that is not protected */
	/* what cannot be judged passes (and may be dropped in strict mode) */
	REASON_TRUNCATED,		/* ends before the TCP header does */
	REASON_MALFORMED,		/* a length or a version that cannot be */
	REASON_TOO_MANY_HEADERS,	/* more extension headers than the bound */
	REASON_FRAGMENT,		/* a fragment without the TCP header */
	REASON_ESP,			/* the inner packet is not visible here */
	/* judged, and passed without asking the limiter */
	REASON_EXEMPT,			/* loopback, link-local, private source */
	REASON_BOGON,			/* real IPv6 source inside 0:ffff::/32 */
	REASON_ALLOWED,			/* an allow entry is the longest match */
	/* the limiter */
	REASON_CONFORMING,		/* admitted by every level that was asked */
	REASON_CONFORMING_GOOD,		/* the same, a good entry cut the chain */
	REASON_UNTRACKED,		/* no level had room: the shared budget admitted it */
	REASON_VERIFIED,		/* no level had room: a verified sender */
	REASON_PROVED,			/* no SYN: the RST by which a client answered its challenge */
	/* refused */
	REASON_BLOCKED_LEARNED,		/* longest match: a learned block */
	REASON_BLOCKED_LIST,		/* longest match: a block list */
	REASON_BLOCKED_OPERATOR,	/* longest match: an operator's block */
	REASON_LIMIT_128,
	REASON_LIMIT_64,
	REASON_LIMIT_56,
	REASON_LIMIT_48,
	REASON_LIMIT_32,
	REASON_OPEN_128,		/* as many open connections as the level allows */
	REASON_OPEN_64,
	REASON_OPEN_56,
	REASON_OPEN_48,
	REASON_OPEN_32,
	REASON_LIMIT_UNTRACKED,		/* no level had room, shared budget spent */
	REASON_RACE_LOST,		/* other CPUs won every retry; charges refunded */
	REASON_CHALLENGED,		/* a forged level's limit is spent: answered by a cookie instead */
	/* the program itself; expected to stay 0 */
	REASON_INTERNAL,		/* a map was missing: passed */
	REASONS,
};

/* What an entry says of its prefix. GOOD, SUSPECT and BAD choose the limit;
 * ALLOW has none; BLOCK refuses. NEW is the absence of an entry. */
enum standing {
	STANDING_NEW,
	STANDING_GOOD,
	STANDING_SUSPECT,
	STANDING_BAD,
	STANDING_ALLOW,
	STANDING_BLOCK,
	STANDINGS,
};

/* Who made an entry; at the same prefix the higher number wins. */
enum origin {
	ORIGIN_LEARNED,
	ORIGIN_LIST,
	ORIGIN_OPERATOR,
	ORIGIN_EXEMPT,	/* connected, mynetworks, relays: by configuration */
	ORIGINS,
};

enum mode {
	MODE_OBSERVE,	/* judge and count, pass everything */
	MODE_ENFORCE,
};

/* Bits of struct control.flags. */
enum control_flag {
	CONTROL_STRICT = 1,		/* drop what cannot be judged */
	CONTROL_EXEMPT_PRIVATE = 2,	/* pass private and local sources */
	CONTROL_LISTED_ONLY = 4,	/* protect only `protected` addresses */
	CONTROL_DEAD_KEEPS_BLOCKS = 8,	/* learned blocks outlive the controller */
	CONTROL_CHALLENGE = 16,		/* challenge where a forged level's limit is spent */
};

/* map identity[1]: who made the pinned objects. Writer: loader, once. */
struct identity {
	__u64 abi_id;		/* hash of abi.py's layouts: maps may be adopted */
	__u64 build_id;		/* hash of program text and flags: program may be */
	__u64 seed;		/* keys the index of the row tables */
	__u64 created_ns;	/* CLOCK_MONOTONIC */
	__u64 cookie_key[2];	/* secret of the challenge */
};

/* map control[1]: what the daemon tells the programs. Writer: daemon. */
struct control {
	__u64 heartbeat_ns;		/* CLOCK_MONOTONIC of the last tick */
	__u64 heartbeat_grace_ns;	/* older: learned entries no longer apply */
	__u32 mode;			/* enum mode */
	__u32 flags;			/* enum control_flag */
	__u32 policy_levels;		/* bit LEVEL_x: the policy map may hold one */
	__u32 policy_ranges;		/* entries in the range trie */
	__u64 untracked_interval_ns;	/* GCRA of the budget shared when no level has room */
	__u64 untracked_tolerance_ns;
	__u64 flood_until_ns;	/* CLOCK_MONOTONIC: until then most SYNs of the whole host are forged */
	__u32 forged_levels;	/* bit LEVEL_x: the map `forged` may hold one */
	__u32 pad;
	/* open connections from which a prefix is worth asking about, by service * LEVELS + level; 0: never */
	__u32 crowded_from[SERVICES * LEVELS];
};

/* key of map destinations: a protected address, IPv4 as ::a.b.c.d. Writer: daemon. */
struct address {
	__u64 hi;
	__u64 lo;
};

/* map limits[SERVICES * STANDINGS * LEVELS]: GCRA parameters. Writer: daemon.
 * emission_interval_ns 0 = no limit at this level. */
struct limit {
	__u64 emission_interval_ns;	/* 1 / sustained rate */
	__u64 burst_tolerance_ns;	/* (burst - 1) * emission interval */
	__u64 open;			/* most connections open at once; 0 = no limit */
};

/* map policy: key of one entry at a level's length. Writer: daemon. */
struct policy_key {
	__u64 hi;
	__u64 lo;	/* 0 unless length is 128 */
	__u32 length;
	__u32 service;
};

/* map policy_ranges: LPM key of an entry between the levels. The first byte is
 * the service, so prefixlen is 8 + the prefix length. Writer: daemon. */
struct range_key {
	__u32 prefixlen;
	__u8 service;
	__u8 address[16];
	__u8 pad[3];
};

/* value of both. */
struct policy_entry {
	__u64 expires_ns;	/* CLOCK_MONOTONIC; 0 = never */
	__u32 decision;		/* id in the journal */
	__u8 standing;
	__u8 origin;
	__u8 length;
	__u8 pad;
};

/* map policy_lines: one cache line, four entries of the map policy. A tag holds the bits of the prefix's mixed key
 * that the line's index does not, and below them, from the lowest: service, level, standing (NEW: the way is free),
 * origin, and in the first tag whether the line has MORE entries, in the map policy only. Writer: daemon. */
#define POLICY_WAYS 4
#define POLICY_LEVEL_SHIFT 1
#define POLICY_STANDING_SHIFT 4
#define POLICY_ORIGIN_SHIFT 7
#define POLICY_MORE_SHIFT 9
#define POLICY_TAG_BITS 10
struct policy_line {
	__u64 tag[POLICY_WAYS];
	__u64 expires_ns[POLICY_WAYS];	/* as in struct policy_entry */
};

/* maps rows_*: one cache line, four rows. A row is free when its theoretical
 * arrival time has passed: a refilled bucket holds no information.
 * Writer: the XDP program. */
#define ROWS_PER_LINE 4
struct line {
	__u64 tag[ROWS_PER_LINE];
	__u64 tat_ns[ROWS_PER_LINE];
};

/* map counters[REASONS], per CPU. Writer: the XDP program. */
struct counter {
	__u64 passed;
	__u64 dropped;
};

/* map connections: what is known of the connections of one prefix at one level, two cache lines, in sets of four.
 * Only completed handshakes make and change one. A row with an open connection is never given away.
 * Writer: the sockops program. */
#define TALLIES_PER_SET 4
#define SKETCH_WORDS 4
#define SKETCH_WINDOW_S 600
struct tally {
	__u64 tag;		/* see rows.h; 0: free, 1: changing hands */
	__u64 open;		/* connections */
	__u64 completed;	/* handshakes */
	__u64 newcomers;	/* of those, from a child that had no row (address of a /64, /64 of a shorter prefix) */
	__u64 last_ns;		/* CLOCK_MONOTONIC of the last change */
	__u64 crowded;		/* 1: counted in the map `crowded` */
	__u64 window;		/* which window `recent` counts */
	__u64 claimed;		/* in a set's first row, 1: a CPU gives one of its rows away */
	__u64 recent[SKETCH_WORDS];	/* distinct children in that window (sketch.h) */
	__u64 before[SKETCH_WORDS];	/* and in the one before */
};

/* map held, per socket: the rows that count it, as index + 1; 0: that level had no room. Writer: the sockops program. */
struct held {
	__u32 row[LEVELS];
};

/* map crowded_levels[1]: prefixes with as many open connections as control.crowded_from. Writer: the sockops program. */
struct crowded_levels {
	__u32 prefixes[LEVELS];
};

/* map verdicts[1], per CPU: how this CPU judged its last SYN. Writer: the XDP program. Its entry point
 * for recorded packets judges every packet here, by the clock it finds in now_ns. */
struct verdict {
	__u64 now_ns;		/* CLOCK_MONOTONIC, or the recording's clock */
	__u64 hi;		/* the source as keyed */
	__u64 lo;
	__u32 reason;		/* enum reason */
	__u32 length;		/* of the entry or the limit that decided; 0: none */
	__u16 dport;
	__u8 service;
	__u8 ipv4;		/* 1: keyed by an IPv4 address */
	__u8 syn;		/* 1: a new connection to a protected port */
	__u8 drop;
	__u8 cut;		/* first level that was not asked; LEVELS: all were */
	__u8 standing[LEVELS];	/* of each level's own entry */
	__u8 forged;		/* bit LEVEL_x: most SYNs of this prefix are forged */
	__u8 own;		/* bit LEVEL_x: and it is asked for the budget of its verified senders */
	__u8 pad[2];
};

/* Every shared type, for the generator: one left out is missing in abi.py. */
#define EDGE_ABI_ENUMS(X) X(level) X(service) X(reason) X(standing) X(origin) X(mode) X(control_flag)
#define EDGE_ABI_STRUCTS(X) \
	X(identity) X(control) X(limit) X(address) X(policy_key) X(range_key) X(policy_entry) \
	X(policy_line) X(line) X(counter) X(tally) X(held) X(crowded_levels) X(verdict)

#endif
