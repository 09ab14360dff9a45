/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Where each level's region of a table begins and how large it is, from the sizes the program was compiled
 * with (edge/kernel/program.py). Switches, because bcc has no constant arrays.
 */
INLINE u32 level_base(u32 level)
{
	switch (level) {
	case LEVEL_128:
		return EDGE_BASE_128;
	case LEVEL_64:
		return EDGE_BASE_64;
	case LEVEL_56:
		return EDGE_BASE_56;
	case LEVEL_48:
		return EDGE_BASE_48;
	default:
		return EDGE_BASE_32;
	}
}

INLINE u64 level_mask(u32 level)
{
	switch (level) {
	case LEVEL_128:
		return EDGE_LINES_128 - 1;
	case LEVEL_64:
		return EDGE_LINES_64 - 1;
	case LEVEL_56:
		return EDGE_LINES_56 - 1;
	case LEVEL_48:
		return EDGE_LINES_48 - 1;
	default:
		return EDGE_LINES_32 - 1;
	}
}

INLINE u64 tally_set_mask(u32 level)
{
	switch (level) {
	case LEVEL_128:
		return EDGE_SETS_128 - 1;
	case LEVEL_64:
		return EDGE_SETS_64 - 1;
	case LEVEL_56:
		return EDGE_SETS_56 - 1;
	case LEVEL_48:
		return EDGE_SETS_48 - 1;
	default:
		return EDGE_SETS_32 - 1;
	}
}

/* Index of the first of the four rows in which a prefix's tally may be. */
INLINE u32 tally_first(u32 level, u64 mixed)
{
	u32 set = (u32)(mixed & tally_set_mask(level));

	switch (level) {
	case LEVEL_128:
		return (EDGE_SET_BASE_128 + set) * TALLIES_PER_SET;
	case LEVEL_64:
		return (EDGE_SET_BASE_64 + set) * TALLIES_PER_SET;
	case LEVEL_56:
		return (EDGE_SET_BASE_56 + set) * TALLIES_PER_SET;
	case LEVEL_48:
		return (EDGE_SET_BASE_48 + set) * TALLIES_PER_SET;
	default:
		return (EDGE_SET_BASE_32 + set) * TALLIES_PER_SET;
	}
}

/* Index in the map `crowded`. */
INLINE u32 crowded_slot(u32 level, u64 mixed)
{
	return level * CROWDED_SLOTS + (u32)(mixed >> 32 & (CROWDED_SLOTS - 1));
}
