/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Varve's capture programs.
 *
 *   block_bio_queue      a bio is submitted: count its bytes in flight, then put it into the ring of its group
 *   block_getrq, block_bio_backmerge, block_bio_frontmerge
 *                        the same for bios that must not wait, which may be refused until here
 *   block_rq_complete    a request completed: its bytes are no longer in flight; did it fail, was it ours?
 *   block_bio_complete   the same for drivers without requests, and for bios that never became a request
 *   mark                 called by the agent: a bookmark, canary or resize in the ring, in order
 *   calibrate, peek      called at start: find and prove how a struct page maps to the address of its data
 *
 * The order "count, then reserve" is a promise to whoever reads an image: after reading the producer's position,
 * a slot that is zero says that every write to its regions with a smaller position has completed.
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>
#include "record.h"
#include "state.h"
#include "copy.h"
#include "complete.h"
#include "calls.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

always bool is_data(u32 op)
{
	return op == OP_WRITE || op == OP_DISCARD || op == OP_SECURE_ERASE || op == OP_WRITE_ZEROES;
}

/*
 * The first write after a volume's device has another size: what a file system does once it knows of its new room must
 * not stand before the gap. The position is taken before the count rises and both before this write's record is
 * reserved, and whoever sees the new size in `device` comes after both: so who sees a record of a write from after the
 * change finds the count, and a position that is not after the record.
 */
subprogram int note_resize(u32 volume, u64 sectors)
{
	u32 key = volume;
	struct volume *v = bpf_map_lookup_elem(&volumes, &key);
	if (!v)
		return 0;
	key = v->group;
	struct group *g = bpf_map_lookup_elem(&groups, &key);
	void *ring = bpf_map_lookup_elem(&rings, &key);
	if (g && ring) {
		u64 position = bpf_ringbuf_query(ring, BPF_RB_PROD_POS);
		__sync_val_compare_and_swap(&g->first_drop, 0, position + 1);
	}
	/* Smaller than what is captured, or so before: what was behind the end may come back as something else, and where that
	 * will be is not known. What is larger than that is compared by whoever follows the growth. */
	if (sectors < v->sectors || v->device < v->sectors)
		add(v->late_unknown, 1);
	add(v->resized, 1);
	__sync_lock_test_and_set(&v->device, sectors ? sectors : 1); /* 0: nobody looks */
	return 0;
}

/* First look at a volume of the disk: is it touched, and is the bio to be counted or remembered? */
static long classify(u32 i, void *ctx)
{
	struct job *j = ctx;
	struct extent e;
	u32 index;
	struct volume *v = volume_at(j->disk, i, &index);
	if (!v)
		return 0;
	u32 flags = *(volatile u32 *)&v->flags;
	if (!flags)
		return 0;
	u64 device = *(volatile u64 *)&v->device;
	if (device && device != j->device_sectors && j->device_start == v->start && flags & VOLUME_ACTIVE)
		note_resize(index, j->device_sectors);
	u32 bit = 1u << (i & 31);
	if (!j->sectors) { /* a flush is for every volume, and is not in flight in any region */
		if (flags & VOLUME_ACTIVE)
			j->hits |= bit;
		if (flags & VOLUME_SETTLING)
			j->marks |= bit;
		return 0;
	}
	if (!overlap(v, index, j->sector, j->sectors, &e))
		return 0;
	if (flags & VOLUME_ACTIVE) {
		j->hits |= bit;
		j->adds |= bit;
		if (flags & VOLUME_SETTLING)
			j->marks |= bit;
	} else if (!(flags & VOLUME_SETTLING)) {
		/* Draining: this one was not counted, so its completion must not be, either. */
		j->marks |= bit;
	}
	return 0;
}

static long capture_volume(u32 i, void *ctx)
{
	struct job *j = ctx;
	u32 index;
	struct volume *v = volume_at(j->disk, i, &index);
	if (!v)
		return 0;
	u32 bit = 1u << (i & 31);
	u32 hit = j->hits & bit;
	u32 counted = j->adds & bit;
	if (!hit && !counted)
		return 0;
	struct walk *w = &j->walk;
	struct extent *e = &w->extent;
	w->group = v->group;
	w->number = v->number;
	if (!j->sectors) {
		e->from = 0;
		e->sectors = 0;
		e->volume = index;
	} else {
		if (!overlap(v, index, j->sector, j->sectors, e))
			return 0;
		if (counted)
			account(e, 1);
		if (!hit)
			return 0;
		if (e->sectors != j->sectors) {
			mark_dirty(e->volume, e->from, e->sectors);
			add(v->straddling, 1); /* after the bit, everywhere: who sees the count finds the bit */
			return 0;
		}
		if (!counted || j->odd & ODD_FORGOTTEN) { /* its completion will look like a stranger's */
			mark_dirty(e->volume, e->from, e->sectors);
			add(v->untracked, 1);
		}
	}
	u32 key = w->group;
	struct group *g = bpf_map_lookup_elem(&groups, &key);
	if (!g)
		return 0;
	w->time_ns = bpf_ktime_get_boot_ns() + g->time_offset;
	add(v->records, 1);
	add(v->bytes, e->sectors << SECTOR_SHIFT);
	if (!j->sectors)
		put_plain(w, RECORD_FLUSH);
	else if (j->op != OP_WRITE)
		put_plain(w, j->op == OP_WRITE_ZEROES ? RECORD_WRITE_ZEROES : RECORD_DISCARD);
	else if (j->odd & ODD_OPAQUE)
		give_up_extent(w, e, 1);
	else
		put_write(w);
	return 0;
}

/*
 * Remembers the bio. If that fails, nothing may be counted whose completion could not be told from a stranger's. But where there
 * are no requests a stranger's completion is not counted, so there it stays in flight until the disk is idle (see `tend`): a
 * region that is read before the write is on the disk would be taken for what the volume holds.
 */
always void remember(struct job *j, struct disk *d)
{
	struct tracked t = {
		.sector = j->sector,
		.bytes = j->sectors << SECTOR_SHIFT,
		.dev = d->dev,
		.mask = j->marks,
	};
	u64 key = j->bio;
	if (!bpf_map_update_elem(&bios, &key, &t, BPF_ANY))
		return;
	if (!(d->flags & DISK_REQUEST_BASED)) {
		j->odd |= ODD_FORGOTTEN;
		return;
	}
	/* What was to be counted and recognised is not counted; what was to be skipped has to be counted. */
	j->adds ^= j->marks;
}

always void capture_bio(struct job *j, struct disk *d)
{
	u32 n = d->n;
	if (n == 1)
		classify(0, j);
	else
		bpf_loop(n, classify, j, 0);
	/* A flush does not count, but when it completes it must not look like a write from before the activation: that
	 * could be anywhere, and would make all of the volume dirty. Requests say what they are. */
	if (!(d->flags & DISK_REQUEST_BASED))
		j->marks = j->sectors ? j->adds : j->marks;
	else if (!j->sectors)
		j->marks = 0;
	if (j->marks)
		remember(j, d);
	if (!(j->hits | j->adds))
		return;
	if (n == 1)
		capture_volume(0, j);
	else
		bpf_loop(n, capture_volume, j, 0);
}

always int accepted(struct bio *bio, bool deferred)
{
	u32 opf = bio->bi_opf;
	u32 op = opf & OP_MASK;
	if (!(op & 1) || (deferred && !(opf & req_flag(__REQ_NOWAIT))))
		return 0;
	struct block_device *device = bio->bi_bdev;
	struct gendisk *disk = device->bd_disk;
	u32 at;
	struct disk *d = find_disk(disk_number(disk->major, disk->first_minor), &at);
	if (!d || deferred != is_deferred(opf, d->flags))
		return 0;
	if (!is_data(op)) {
		unknown_write(at);
		return 0;
	}

	struct job j = {};
	j.sector = bio->bi_iter.bi_sector;
	j.sectors = bio->bi_iter.bi_size >> SECTOR_SHIFT;
	j.bio = (u64)bio;
	j.disk = at;
	j.op = op;
	j.device_start = device->bd_start_sect;
	j.device_sectors = device->bd_nr_sectors;
	if (opf & req_flag(__REQ_FUA))
		j.walk.flags |= FLAG_FUA;
	if (opf & req_flag(__REQ_PREFLUSH))
		j.walk.flags |= FLAG_PREFLUSH;
	if (!j.sectors && !(j.walk.flags & FLAG_PREFLUSH))
		return 0;
	struct bio___crypt *crypt = (void *)bio;
	if (bpf_core_field_exists(crypt->bi_crypt_context))
		j.odd = BPF_CORE_READ(crypt, bi_crypt_context) ? ODD_OPAQUE : 0;
	j.walk.segment = (u64)bio->bi_io_vec + (u64)bio->bi_iter.bi_idx * 16;
	j.walk.skip = bio->bi_iter.bi_bvec_done;
	capture_bio(&j, d);
	return 0;
}

SEC("tp_btf/block_bio_queue")
int BPF_PROG(capture, struct bio *bio)
{
	return accepted(bio, 0);
}

SEC("tp_btf/block_getrq")
int BPF_PROG(capture_getrq, struct bio *bio)
{
	return accepted(bio, 1);
}

SEC("tp_btf/block_bio_backmerge")
int BPF_PROG(capture_back, struct bio *bio)
{
	return accepted(bio, 1);
}

SEC("tp_btf/block_bio_frontmerge")
int BPF_PROG(capture_front, struct bio *bio)
{
	return accepted(bio, 1);
}
