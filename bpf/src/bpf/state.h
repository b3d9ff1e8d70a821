/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Maps, look-ups, and the two things every program does to a range of a volume: dirty bits and bytes in flight. */
#ifndef VARVE_STATE_H
#define VARVE_STATE_H

struct config config;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, DISKS_MAX);
	__type(key, u32);
	__type(value, struct disk);
} disks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, VOLUMES_MAX);
	__type(key, u32);
	__type(value, struct volume);
} volumes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, GROUPS_MAX);
	__type(key, u32);
	__type(value, struct group);
} groups SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, INFLIGHT_SLOTS);
	__type(key, u32);
	__type(value, s64);
} inflight SEC(".maps");

struct ring_map {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, GROUPS_MAX);
	__type(key, u32);
	__array(values, struct ring_map);
} rings SEC(".maps");

struct dirty_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, VOLUMES_MAX);
	__type(key, u32);
	__array(values, struct dirty_map);
} dirty SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, BIOS_MAX);
	__type(key, u64); /* address of the bio */
	__type(value, struct tracked);
} bios SEC(".maps");

#define always static __attribute__((always_inline)) inline
/* A global function: the verifier checks it once for any argument, not once per path that leads to a call. Without
 * that the programs are too complex for it. Pointers to memory may be NULL in its eyes, and hold only numbers. */
#define subprogram __attribute__((noinline))

#define add(where, n) ((void)__sync_fetch_and_add(&(where), (n)))

always u64 min64(u64 a, u64 b)
{
	return a < b ? a : b;
}

always u64 max64(u64 a, u64 b)
{
	return a > b ? a : b;
}

/* A flag of a bio, wherever the running kernel keeps it. */
#define req_flag(name) (1u << bpf_core_enum_value(enum req_flag_bits, name))

/*
 * A write that must not wait (io_uring sends all of its first attempts so) is refused whenever no request is free, and
 * is soon sent again. On request-based disks such a write is captured when it gets its request or is merged into one:
 * at submission it may still come to nothing, and would cost a dirty region each time.
 */
always bool is_deferred(u32 opf, u32 disk_flags)
{
	return disk_flags & DISK_REQUEST_BASED && opf & req_flag(__REQ_NOWAIT) && (opf & OP_MASK) == OP_WRITE;
}

always u32 disk_number(u32 major, u32 first_minor)
{
	return major << 20 | first_minor;
}

/* The common answer is "not watched", and it must cost next to nothing: one line of cache, no helper call. */
always struct disk *find_disk(u32 dev, u32 *index)
{
	u32 slot = dev * 2654435761u >> 20;
	for (int i = 0; i < DISK_PROBES; i++) {
		u32 at = (slot + i) & (DISKS_MAX - 1);
		struct disk *d = bpf_map_lookup_elem(&disks, &at);
		if (!d || !d->dev)
			return NULL;
		if (d->dev == dev) {
			*index = at;
			return d->n ? d : NULL;
		}
	}
	return NULL;
}

always struct disk *disk_at(u32 index)
{
	return bpf_map_lookup_elem(&disks, &index);
}

always struct volume *volume_at(u32 disk, u32 slot, u32 *index)
{
	struct disk *d = disk_at(disk);
	if (!d || slot >= DISK_VOLUMES)
		return NULL;
	*index = d->volume[slot];
	return bpf_map_lookup_elem(&volumes, index);
}

/* A stretch of a volume, in sectors from the volume's start. */
struct extent {
	u64 from;
	u64 sectors;
	u32 volume;
	u32 sign; /* of the bytes in flight: 1 adds, 0 subtracts */
};

/* The part of [sector, sector + n) inside the volume. */
always bool overlap(struct volume *v, u32 index, u64 sector, u64 n, struct extent *e)
{
	u64 start = v->start;
	u64 from = max64(sector, start);
	u64 to = min64(sector + n, start + v->sectors);
	if (from >= to)
		return 0;
	e->from = from - start;
	e->sectors = to - from;
	e->volume = index;
	return 1;
}

always void set_dirty(u32 volume, u64 word, u64 mask)
{
	void *map = bpf_map_lookup_elem(&dirty, &volume);
	if (!map)
		return;
	u32 key = word;
	u64 *bits = bpf_map_lookup_elem(map, &key);
	if (bits)
		__sync_fetch_and_or(bits, mask);
}

/* One region, inline: calls can only be eight deep, callbacks included. */
always void mark_region(u32 volume, u64 region)
{
	set_dirty(volume, region >> 6, 1ull << (region & 63));
}

/* 64 regions at a time: a discard of 4 GiB is 65 words. */
static long dirty_word(u32 i, void *ctx)
{
	struct extent *e = ctx;
	u64 first = e->from >> REGION_SECTOR_SHIFT;
	u64 last = (e->from + e->sectors - 1) >> REGION_SECTOR_SHIFT;
	u64 word = (first >> 6) + i;
	if (word > last >> 6)
		return 1;
	u64 mask = ~0ull;
	if (word == first >> 6)
		mask &= ~0ull << (first & 63);
	if (word == last >> 6)
		mask &= ~0ull >> (63 - (last & 63));
	set_dirty(e->volume, word, mask);
	return 0;
}

/* Must be done before the program returns: until then the write cannot complete. */
subprogram int mark_dirty(u32 volume, u64 from, u64 sectors)
{
	if (!sectors)
		return 0;
	struct extent e = { .volume = volume, .from = from, .sectors = sectors };
	u64 first = from >> (REGION_SECTOR_SHIFT + 6);
	u64 last = (from + sectors - 1) >> (REGION_SECTOR_SHIFT + 6);
	bpf_loop(last - first + 1, dirty_word, &e, 0);
	return 0;
}

/* Volumes start at different slots, so that the first regions of all volumes do not collide. */
always s64 *inflight_slot(u32 volume, u64 region)
{
	u32 slot = (volume * 40503u + (u32)region) & (INFLIGHT_SLOTS - 1);
	return bpf_map_lookup_elem(&inflight, &slot);
}

/* User space takes back what never completed in our eyes (see `tend`). If it completes after all, the count would go below
 * zero here: whoever trusted the zero before has to look at the region again, and what is not in the count stays out of it, for
 * a count that is off would be off until the disk is idle. */
always void account_slot(u32 volume, u64 region, s64 bytes, u32 sign)
{
	s64 *slot = inflight_slot(volume, region);
	if (!slot)
		return;
	if (sign) {
		add(*slot, bytes);
	} else if (__sync_fetch_and_add(slot, -bytes) < bytes) {
		mark_region(volume, region);
		add(*slot, bytes);
	}
}

static long account_region(u32 i, void *ctx)
{
	struct extent *e = ctx;
	u64 end = e->from + e->sectors;
	u64 region = (e->from >> REGION_SECTOR_SHIFT) + i;
	u64 from = max64(e->from, region << REGION_SECTOR_SHIFT);
	u64 to = min64(end, (region + 1) << REGION_SECTOR_SHIFT);
	if (from >= to)
		return 1;
	account_slot(e->volume, region, (to - from) << SECTOR_SHIFT, e->sign);
	return 0;
}

subprogram int account_large(u32 volume, u64 from, u64 sectors, u32 sign)
{
	struct extent e = { .volume = volume, .from = from, .sectors = sectors, .sign = sign };
	u64 first = from >> REGION_SECTOR_SHIFT;
	u64 last = (from + sectors - 1) >> REGION_SECTOR_SHIFT;
	bpf_loop(last - first + 1, account_region, &e, 0);
	return 0;
}

/* Adds the extent's bytes to the slots of its regions, or takes them away. */
always void account(struct extent *e, u32 sign)
{
	u64 region = e->from >> REGION_SECTOR_SHIFT;
	if (region == (e->from + e->sectors - 1) >> REGION_SECTOR_SHIFT) {
		account_slot(e->volume, region, e->sectors << SECTOR_SHIFT, sign);
		return;
	}
	account_large(e->volume, e->from, e->sectors, sign);
}

#endif
