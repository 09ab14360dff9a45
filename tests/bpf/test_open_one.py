"""bpf/edge_sockops.c on CPUs that take turns after any access to memory: no schedule miscounts a connection.

The program is built for the host with -fsanitize=thread, not for its library but for its hooks: the compiler calls us
at every access, and there the next CPU goes on where the schedule says so. All schedules with up to two or three such
turns are tried. What the compiler or the CPU may reorder is not.
"""

from __future__ import annotations

import ctypes as c
import subprocess
from collections.abc import Sequence
from enum import IntFlag
from pathlib import Path

import numpy as np
import pytest

from edge.abi import TALLY, Level, Service
from edge.core.prefix import IPV4_SPACE, Prefix
from edge.kernel.program import directory

CONSTANTS = " ".join(
    f"-DEDGE_SETS_{length}=4 -DEDGE_SET_BASE_{length}={4 * at} -DEDGE_LINES_{length}=4 -DEDGE_BASE_{length}={4 * at}"
    for at, length in enumerate((128, 64, 56, 48, 32))
)

HOST = r"""
#include <arpa/inet.h>
#include <linux/bpf.h>
#include <string.h>
#include <ucontext.h>

typedef __u8 u8;
typedef __u32 u32;
typedef __u64 u64;
typedef __s64 s64;

#include "base.h"
#include "abi.h"
#include "prefix.h"
#include "rows.h"
#include "tally.h"
#include "sketch.h"
#include "regions.h"

#define SETS 4
#define ROWS (LEVELS * SETS * TALLIES_PER_SET)
#define SLOTS (LEVELS * CROWDED_SLOTS)
#define MOST_CPUS 3
#define MOST_CONNECTIONS 64
#define QUIET __attribute__((no_sanitize_thread))

/* What the CPUs share: at accesses to this they take turns. */
static struct {
	struct tally rows[ROWS];
	struct crowded_levels levels;
	u32 crowded[SLOTS];
	u64 uncounted[LEVELS];
} shared;
static struct control settings;
static struct identity made = { .seed = 0x9e3779b97f4a7c15ull };
static struct held of_connection[MOST_CONNECTIONS];
static struct policy_key corrected;
static u64 clock_ns;
static s64 correction;

#define MAP(type, key, name, found) \
	static type *name##_at(key *at) { return (void)at, found; } \
	static struct { type *(*lookup)(key *); } name = { name##_at };
MAP(struct tally, u32, connections, *at < ROWS ? &shared.rows[*at] : NULL)
MAP(struct crowded_levels, u32, crowded_levels, &shared.levels)
MAP(u32, u32, crowded, *at < SLOTS ? &shared.crowded[*at] : NULL)
MAP(u64, u32, uncounted, &shared.uncounted[*at])
MAP(s64, struct policy_key, corrections, !memcmp(at, &corrected, sizeof(*at)) ? &correction : NULL)
MAP(struct control, u32, control, &settings)
MAP(struct identity, u32, identity, &made)
static struct held *storage(struct bpf_sock *socket, int value, u64 flags)
{
	return (void)value, (void)flags, (struct held *)socket;
}
static struct { struct held *(*sk_storage_get)(struct bpf_sock *, int, u64); } held = { storage };
static u64 bpf_ktime_get_ns(void) { return clock_ns += 1000; }
#define bpf_sock_ops_cb_flags_set(ops, flags)
#define EDGE_RECORDED
#include "edge_sockops.c"

/* What a CPU does: a connection begins, or ends; of an IPv4 address, or where `lo` is not 0 of one in a /64 of
 * 2001:db8::/32. */
struct deed {
	u32 connection, address, service, begins, lo;
};

static struct cpu {
	ucontext_t context;
	const struct deed *deeds;
	u32 count, is_over;
	char stack[65536];
} cpus[MOST_CPUS];
static ucontext_t back;
static u32 cpu_count, current, turns_left, is_running;
static u64 steps;
static const u64 *next_turn;

static void do_one(const struct deed *deed)
{
	struct bpf_sock_ops ops;
	struct source source;

	memset(&ops, 0, sizeof(ops));
	ops.sk = (struct bpf_sock *)&of_connection[deed->connection];
	key_ipv4(deed->address, &source);
	if (deed->lo)
		key_ipv6(0x20010db8ull << 32 | deed->address, deed->lo, &source);
	if (deed->begins)
		opened(&ops, &source, deed->service);
	else
		closed(&ops, &source);
}

QUIET static void take_turns(void)
{
	u32 from = current, to = from;

	do
		to = (to + 1) % cpu_count;
	while (to != from && cpus[to].is_over);
	if (cpus[to].is_over)
		setcontext(&back);
	current = to;
	if (to != from)
		swapcontext(&cpus[from].context, &cpus[to].context);
}

static void live(void)
{
	struct cpu *own = &cpus[current];

	for (u32 i = 0; i < own->count; i++)
		do_one(&own->deeds[i]);
	own->is_over = 1;
	take_turns();
}

QUIET static void step(const volatile void *at)
{
	if (!is_running || (const char *)at < (const char *)&shared || (const char *)at >= (const char *)(&shared + 1))
		return;
	steps++;
	if (turns_left && steps >= *next_turn) {
		next_turn++;
		turns_left--;
		take_turns();
	}
}

#define HOOK(name) QUIET void __tsan_##name(void *at) { step(at); }
HOOK(func_entry) HOOK(func_exit) HOOK(init) HOOK(read_range) HOOK(write_range)
HOOK(read1) HOOK(read2) HOOK(read4) HOOK(read8) HOOK(read16) HOOK(write1) HOOK(write4) HOOK(write8) HOOK(write16)
#define ATOMICS(bits) \
	QUIET u##bits __tsan_atomic##bits##_fetch_add(volatile u##bits *at, u##bits by, int order) \
	{ return step(at), __sync_fetch_and_add(at, by + 0 * order); } \
	QUIET u##bits __tsan_atomic##bits##_fetch_or(volatile u##bits *at, u##bits bits_, int order) \
	{ return step(at), __sync_fetch_and_or(at, bits_ + 0 * order); } \
	QUIET u##bits __tsan_atomic##bits##_exchange(volatile u##bits *at, u##bits put, int order) \
	{ return step(at), __sync_lock_test_and_set(at, put + 0 * order); } \
	QUIET _Bool __tsan_atomic##bits##_compare_exchange_strong(volatile u##bits *at, u##bits *old, \
		u##bits put, int order, int other) \
	{ \
		u##bits wanted = *old; \
		step(at); \
		*old = __sync_val_compare_and_swap(at, wanted, put + 0 * (order + other)); \
		return *old == wanted; \
	}
ATOMICS(32) ATOMICS(64)

enum { OPEN = 1, ROW = 2, TWICE = 4, BUSY = 8, SUM = 16, UNSEEN = 32, MARK = 64, COMPLETED = 128 };

/* What is wrong while no CPU is in the middle of anything and these connections are open. */
static u32 look(const struct deed *alive, u32 count)
{
	u64 open[ROWS] = {}, missing[LEVELS] = {};
	u32 slots[SLOTS] = {}, levels[LEVELS] = {}, wrong = 0;

	for (u32 i = 0; i < count; i++)
		for (u32 level = LEVEL_64; level <= LEVEL_48; level++) {
			u64 mixed = mixed_key(level_hi(ipv4_key(alive[i].address), level), 0, made.seed);
			u32 row = of_connection[alive[i].connection].row[level];

			missing[level] += !row;
			if (!row)
				continue;
			open[--row]++;
			if (row - tally_first(level, mixed) >= TALLIES_PER_SET ||
				shared.rows[row].tag != tally_tag(mixed, SETS - 1, alive[i].service))
				wrong |= ROW;
		}
	for (u32 i = 0; i < ROWS; i++) {
		struct tally *row = &shared.rows[i];
		u32 level = i / TALLIES_PER_SET / SETS, set = i / TALLIES_PER_SET, from = settings.crowded_from[level];

		wrong |= row->open != open[i] ? OPEN : 0;
		wrong |= row->tag == TALLY_BUSY ? BUSY : 0;
		wrong |= row->completed < row->open ? COMPLETED : 0;
		wrong |= from && row->crowded != (row->open >= from) ? MARK : 0;
		for (u32 j = set * TALLIES_PER_SET; j < i; j++)
			wrong |= row->tag && shared.rows[j].tag == row->tag ? TWICE : 0;
		levels[level] += row->crowded;
		slots[crowded_slot(level, (row->tag & ~(SETS - 1ull)) | set % SETS)] += row->crowded;
	}
	for (u32 level = 0; level < LEVELS; level++)
		wrong |= missing[level] > shared.uncounted[level] ? UNSEEN : 0;
	if (memcmp(slots, shared.crowded, sizeof(slots)) || memcmp(levels, &shared.levels, sizeof(levels)))
		wrong |= SUM;
	return wrong;
}

void start(u32 crowded_from)
{
	memset(&shared, 0, sizeof(shared));
	memset(of_connection, 0, sizeof(of_connection));
	for (u32 i = 0; i < SERVICES * LEVELS; i++)
		settings.crowded_from[i] = crowded_from;
	clock_ns = 1000000000000ull;
	memset(&corrected, 0, sizeof(corrected));
}

/* One deed after another, on one CPU, some time later. */
void play(const struct deed *deeds, u32 count, u64 later_ns)
{
	clock_ns += later_ns;
	for (u32 i = 0; i < count; i++)
		do_one(&deeds[i]);
}

void correct(u64 hi, u32 service, s64 by)
{
	corrected = (struct policy_key){ .hi = hi, .length = 64, .service = service };
	correction = by;
}

/* A prefix's row, or NULL. */
const struct tally *row_of(u64 hi, u32 level, u32 service)
{
	u64 mixed = mixed_key(level_hi(hi, level), 0, made.seed);

	for (u32 i = tally_first(level, mixed); i < tally_first(level, mixed) + TALLIES_PER_SET; i++)
		if (shared.rows[i].tag == tally_tag(mixed, SETS - 1, service))
			return &shared.rows[i];
	return NULL;
}

u32 crowded_prefixes(u32 level) { return shared.levels.prefixes[level]; }

/* Do `before`, then let the CPUs take turns, then close what is left. What was wrong; in the upper half, in the end. */
static u32 run(const struct deed *before, u32 before_count, const struct deed *deeds, const u32 *counts, u32 cpu_number,
		u32 crowded_from, const u64 *turns, u32 turn_count)
{
	struct deed alive[MOST_CONNECTIONS];
	u32 begun[MOST_CONNECTIONS] = {}, left = 0, wrong, total = 0;

	start(crowded_from);
	play(before, before_count, 0);
	cpu_count = cpu_number;
	for (u32 i = 0; i < cpu_count; total += counts[i++]) {
		cpus[i].deeds = deeds + total;
		cpus[i].count = counts[i];
		cpus[i].is_over = 0;
		getcontext(&cpus[i].context);
		cpus[i].context.uc_stack.ss_sp = cpus[i].stack;
		cpus[i].context.uc_stack.ss_size = sizeof(cpus[i].stack);
		makecontext(&cpus[i].context, live, 0);
	}
	current = steps = 0;
	next_turn = turns;
	turns_left = turn_count;
	is_running = 1;
	swapcontext(&back, &cpus[0].context);
	is_running = 0;
	for (u32 i = 0; i < before_count + total; i++) {
		const struct deed *deed = i < before_count ? &before[i] : &deeds[i - before_count];

		begun[deed->connection] += deed->begins ? 1 : -1;
	}
	for (u32 i = 0; i < before_count + total; i++) {
		const struct deed *deed = i < before_count ? &before[i] : &deeds[i - before_count];

		if (deed->begins && begun[deed->connection]-- == 1)
			alive[left++] = *deed;
	}
	wrong = look(alive, left);
	for (u32 i = 0; i < left; i++) {
		alive[i].begins = 0;
		do_one(&alive[i]);
	}
	return wrong | look(NULL, 0) << 16;
}

/* Every schedule with up to `most` turns, none later than `latest` accesses: all that was wrong. */
u32 explore(const struct deed *before, u32 before_count, const struct deed *deeds, const u32 *counts, u32 cpu_number,
		u32 crowded_from, u32 most, u64 latest, u64 *tried, u64 *example)
{
	u64 at[3], end[3];
	u32 all = 0;

	for (u32 count = 1; count <= most; count++) {
		for (u32 i = 0; i < 3; i++)
			end[i] = i < count ? latest : 0;
		for (at[0] = 1; at[0] <= end[0]; at[0]++)
			for (at[1] = at[0] + 1; at[1] <= end[1] || !end[1]; at[1]++) {
				for (at[2] = at[1] + 1; at[2] <= end[2] || !end[2]; at[2]++) {
					u32 wrong = run(before, before_count, deeds, counts, cpu_number, crowded_from, at, count);

					if (wrong & ~all)
						memcpy(example, at, sizeof(at));
					all |= wrong;
					++*tried;
					if (!end[2])
						break;
				}
				if (!end[1])
					break;
			}
	}
	return all;
}

u32 set_of(u32 address, u32 level)
{
	return mixed_key(level_hi(ipv4_key(address), level), 0, made.seed) & (SETS - 1);
}
"""


class Wrong(IntFlag):
    """What a schedule can get wrong; in the upper half of an answer: once all is closed."""

    OPEN = 1  # a row's count is not that of the connections it counts
    ROW = 2  # a connection is counted in another prefix's row
    TWICE = 4  # a prefix has two rows
    BUSY = 8  # a row is left in between
    SUM = 16  # the counters of crowded prefixes are not the sum of the marks
    UNSEEN = 32  # a connection is neither counted nor counted as one for which there was no room
    MARK = 64  # a mark is not true to its count: allowed, by one connection
    COMPLETED = 128


class Deed(c.Structure):
    _fields_ = [(name, c.c_uint32) for name in ("connection", "address", "service", "begins", "lo")]


Cpus = Sequence[Sequence[Deed]]


def begin(connection: int, address: int, service: Service = Service.MX, lo: int = 0) -> Deed:
    return Deed(connection, address, service, 1, lo)


def end(connection: int, address: int, service: Service = Service.MX, lo: int = 0) -> Deed:
    return Deed(connection, address, service, 0, lo)


class Schedules:
    """The compiled program and its turns."""

    def __init__(self, directory_: Path) -> None:
        source, made = directory_ / "host.c", directory_ / "host.so"
        source.write_text(HOST)
        quiet = "-Wno-unused-function -Wno-sign-compare -Wno-unknown-pragmas"
        quiet += " -Wno-builtin-declaration-mismatch -Wno-clobbered"
        flags = f"-O1 -g -fPIC -Wall -Wextra -Werror {quiet} {CONSTANTS} -DCROWDED_SLOTS=16 -I{directory()}".split()
        # linked without the sanitizer's library: its hooks are ours
        subprocess.run(["gcc", "-fsanitize=thread", "-c", *flags, "-o", f"{made}.o", str(source)], check=True)
        subprocess.run(["gcc", "-shared", "-o", str(made), f"{made}.o"], check=True)
        self._library = c.CDLL(str(made))
        self.addresses = self.meeting(range(0xC0000200, 0xC0000300), Level.L64)

    def meeting(self, addresses: Sequence[int], level: Level) -> list[int]:
        """Those that meet in one set."""
        return [at for at in addresses if not self._library.set_of(c.c_uint32(at), int(level))]

    def explore(
        self, before: Sequence[Deed], cpus: Cpus, *, crowded_from: int = 0, most: int = 2, latest: int = 320
    ) -> tuple[Wrong, Wrong]:
        """Everything that went wrong in any schedule: when the CPUs had done their deeds, and when all was closed."""
        deeds = [deed for cpu in cpus for deed in cpu]
        tried, example = c.c_uint64(), (c.c_uint64 * 3)()
        wrong = self._library.explore(
            (Deed * len(before))(*before),
            len(before),
            (Deed * len(deeds))(*deeds),
            (c.c_uint32 * len(cpus))(*map(len, cpus)),
            len(cpus),
            crowded_from,
            most,
            c.c_uint64(latest),
            c.byref(tried),
            example,
        )
        assert tried.value > 1009
        print(f"{tried.value} schedules; turns of the last that got something new wrong: {list(example)}")
        return Wrong(wrong & 0xFFFF), Wrong(wrong >> 16)

    def play(self, *deeds: Deed, later_s: float = 0.0) -> None:
        """One after another, as many seconds later."""
        self._library.play((Deed * len(deeds))(*deeds), len(deeds), c.c_uint64(int(later_s * 1e9)))

    def start(self, *, crowded_from: int = 0) -> None:
        self._library.start(crowded_from)

    def correct(self, prefix: Prefix, by: int, service: Service = Service.MX) -> None:
        """What the daemon says of one /64."""
        self._library.correct(c.c_uint64(prefix.hi), int(service), c.c_int64(by))

    def row(self, at: int | Prefix, level: Level = Level.L64, service: Service = Service.MX) -> np.void | None:
        """The row of an IPv4 address or of a prefix, as it is now."""
        hi = at.hi if isinstance(at, Prefix) else IPV4_SPACE << 32 | at
        self._library.row_of.restype = c.c_void_p
        found = self._library.row_of(c.c_uint64(hi), int(level), int(service))
        row: np.void | None = None if found is None else np.frombuffer(c.string_at(found, TALLY.itemsize), TALLY)[0]
        return row

    def crowded(self, level: Level = Level.L64) -> int:
        return int(self._library.crowded_prefixes(int(level)))


NOTHING = Wrong(0), Wrong(0)


@pytest.fixture(scope="module")
def schedules(tmp_path_factory: pytest.TempPathFactory) -> Schedules:
    return Schedules(tmp_path_factory.mktemp("open_one"))


def full(schedules: Schedules, times: int = 1) -> list[Deed]:
    """A set whose first row is Q's, closed; the three others hold an open connection each."""
    q, *others = schedules.addresses[1:5]
    return [*[one for _ in range(times) for one in (begin(0, q), end(0, q))], *map(begin, (1, 2, 3), others)]


def test_a_new_prefix_gets_one_row(schedules: Schedules) -> None:
    """Two CPUs take its first two connections at once."""
    p = schedules.addresses[0]
    assert schedules.explore([], [[begin(10, p)], [begin(11, p)]]) == NOTHING
    assert schedules.explore(full(schedules), [[begin(10, p)], [begin(11, p)]]) == NOTHING


def test_a_row_that_comes_free_meanwhile_makes_no_second_row(schedules: Schedules) -> None:
    p, _, r = schedules.addresses[:3]
    assert schedules.explore(full(schedules, 3), [[begin(10, p)], [end(1, r), begin(11, p)]]) == NOTHING


def test_open_rows_stay(schedules: Schedules) -> None:
    """One CPU gives Q's row away while the other takes a connection of Q."""
    p, q = schedules.addresses[:2]
    for most, latest in ((2, 320), (3, 67)):
        cpus = [[begin(11, q)], [begin(10, p)]]
        assert schedules.explore(full(schedules), cpus, most=most, latest=latest) == NOTHING


def test_services_have_rows_of_their_own(schedules: Schedules) -> None:
    p, _, r = schedules.addresses[:3]
    cpus = [[begin(10, p)], [end(1, r), begin(11, p, Service.SUBMISSION)]]
    assert schedules.explore(full(schedules), cpus) == NOTHING


def test_end_where_begun_on_three_cpus(schedules: Schedules) -> None:
    p, q, r, s = schedules.addresses[:4]
    cpus = [[begin(10, p), end(10, p)], [end(1, r), begin(11, q)], [end(2, s), begin(12, r)]]
    assert schedules.explore(full(schedules), cpus, latest=240) == NOTHING


@pytest.mark.parametrize("crowded_from", [2, 3, 4])
def test_marks_are_counted_and_go_with_the_connections(schedules: Schedules, crowded_from: int) -> None:
    p = schedules.addresses[0]
    before = [begin(1, p), begin(2, p)]
    for cpus in (
        [[begin(10, p)], [end(1, p), end(2, p)]],
        [[end(1, p)], [end(2, p)]],
        [[begin(10, p)], [begin(11, p)]],
    ):
        now, later = schedules.explore(before, cpus, crowded_from=crowded_from)
        assert now in (0, Wrong.MARK)  # one connection behind
        assert later == 0


def test_two_ends_at_a_limit_of_one_may_leave_a_mark(schedules: Schedules) -> None:
    """Each sees the other's connection still open; it costs a look until somebody takes the row over."""
    p = schedules.addresses[0]
    cpus = [[end(1, p)], [end(2, p)]]
    assert schedules.explore([begin(1, p), begin(2, p)], cpus, crowded_from=1) == (Wrong.MARK, Wrong.MARK)


def used(address: int, times: int = 1) -> list[Deed]:
    """So many connections, one after another, closed."""
    return [one for _ in range(times) for one in (begin(20, address), end(20, address))]


def test_the_row_used_least_and_longest_ago_goes_first(schedules: Schedules) -> None:
    *old, new, another = schedules.addresses[:6]
    schedules.start()
    for address, times in zip(old, (5, 3, 2, 2), strict=True):
        schedules.play(*used(address, times), later_s=7.0)
    schedules.play(begin(1, new))
    assert [schedules.row(address) is None for address in old] == [False, False, True, False]
    schedules.play(begin(2, another), later_s=30.0)  # the new one is open; the fourth is older than the second is rare
    assert [schedules.row(address) is None for address in old] == [False, False, True, True]
    schedules.play(end(2, another), later_s=191.0)  # a minute for each handshake: now the first is worth more than that
    schedules.play(*used(schedules.addresses[6]))
    assert [schedules.row(address) is None for address in old] == [False, True, True, True]


def test_a_day_of_handshakes_is_the_most_that_counts(schedules: Schedules) -> None:
    busy, later, *others, new = schedules.addresses[:5]
    schedules.start()
    schedules.play(*used(busy, 3001))
    schedules.play(*used(later, 1447), later_s=1.0)
    schedules.play(*map(begin, (1, 2), others), begin(3, new))
    assert schedules.row(busy) is None
    assert schedules.row(later) is not None


def test_a_row_starts_afresh_with_its_new_owner(schedules: Schedules) -> None:
    *old, new = schedules.addresses[:5]
    schedules.start(crowded_from=2)
    for address in old:
        schedules.play(*used(address, 11), later_s=601.0)  # a window each
    schedules.play(begin(1, new))
    row, above = schedules.row(new), schedules.row(new, Level.L56)
    assert row is not None
    assert above is not None
    assert (row["open"], row["completed"], row["newcomers"], row["crowded"]) == (1, 1, 0, 0)
    assert int(row["before"].sum()) == 0
    assert sum(int(word).bit_count() for word in row["recent"]) == 1
    assert (above["completed"], above["newcomers"]) == (45, 5)


def test_newcomers_are_those_without_a_row(schedules: Schedules) -> None:
    """Of a /64 its addresses, of a shorter prefix its /64s; a row that is given away begins with none."""
    old = schedules.meeting(range(0xC6000000, 0xC6010000, 256), Level.L56)[:5]
    schedules.start()
    for network in old:
        for host in (1, 2, 3, 2):
            schedules.play(*used(network + host), later_s=7.0)
    last = schedules.row(old[-1], Level.L56)
    assert last is not None
    assert (last["completed"], last["newcomers"]) == (4, 3)
    inside = Prefix.parse("2001:db8:0:7::/64")
    for lo in (1, 2, 3, 2):
        schedules.play(begin(1, 7, lo=lo), end(1, 7, lo=lo))
    row, above = schedules.row(inside), schedules.row(inside, Level.L48)
    assert row is not None
    assert above is not None
    assert (row["completed"], row["newcomers"], above["completed"], above["newcomers"]) == (4, 3, 4, 1)
    assert sum(int(word).bit_count() for word in row["recent"]) > 1
    assert sum(int(word).bit_count() for word in above["recent"]) == 1


def test_crowded_is_what_has_as_many_open_as_the_limit(schedules: Schedules) -> None:
    p = schedules.addresses[0]
    schedules.start(crowded_from=2)
    found = []
    for deed in (begin(1, p), begin(2, p), begin(3, p), end(1, p), end(2, p), end(3, p)):
        schedules.play(deed)
        found.append(schedules.crowded())
    assert found == [0, 1, 1, 1, 0, 0]


def test_a_correction_makes_and_ends_a_crowd(schedules: Schedules) -> None:
    """A mark that only the correction made stays when all is closed, and goes with the row."""
    p, *others, new = schedules.addresses[:5]
    at = Prefix(IPV4_SPACE << 32 | p, 0, 64)
    schedules.start(crowded_from=2)
    schedules.correct(at, 1)
    schedules.play(begin(1, p))
    assert schedules.crowded() == 1
    schedules.correct(at, -1)
    schedules.play(begin(2, p))
    assert schedules.crowded() == 0
    schedules.correct(at, 2)
    schedules.play(end(1, p), end(2, p))
    assert schedules.crowded() == 1
    schedules.play(*map(begin, (1, 2, 3), others), begin(4, new))
    assert schedules.row(p) is None
    assert schedules.crowded() == 0


def test_a_correction_is_for_one_service_and_found_again_at_the_end(schedules: Schedules) -> None:
    for service, crowds in ((Service.SUBMISSION, 1), (Service.MX, 0)):
        schedules.start(crowded_from=3)
        schedules.correct(Prefix.parse("2001:db8:0:7::/64"), 2, Service.SUBMISSION)
        schedules.play(begin(1, 7, service, lo=9), begin(2, 7, service, lo=11))
        assert schedules.crowded() == crowds
        schedules.play(end(1, 7, service, lo=9))
        assert schedules.crowded() == crowds
        schedules.play(end(2, 7, service, lo=11))
        assert schedules.crowded() == 0
