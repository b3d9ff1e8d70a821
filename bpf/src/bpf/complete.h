/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Completions: bytes leave the flight, failures and strangers leave a dirty bit first. */
#ifndef VARVE_COMPLETE_H
#define VARVE_COMPLETE_H

/* Bios of one request that are walked at most; a request never holds nearly as many. */
#define WALK_MAX (1u << 16)

/* A completed stretch of a disk. */
struct done {
	u32 disk; /* index */
	u32 flags; /* of the disk */
	u64 sector;
	u64 sectors;
	u64 bio;  /* walk: the next bio */
	u64 left; /* walk: bytes */
	u32 error;
	u32 mask;  /* of the bio, if it is in `bios` */
	u32 special; /* a volume is settling or draining */
	u32 volumes; /* slots of the disk */
};

static long count_unknown(u32 i, void *ctx)
{
	struct done *c = ctx;
	u32 index;
	struct volume *v = volume_at(c->disk, i, &index);
	if (v && v->flags & VOLUME_ACTIVE)
		add(v->passthrough, 1);
	return 0;
}

/* A write that we do not understand (passthrough, zone operations): the disk holds what the stream does not. */
subprogram int unknown_write(u32 disk)
{
	struct done c = { .disk = disk };
	struct disk *d = disk_at(disk);
	/* Slots behind the last one name volume 0, whosever that is. */
	if (d)
		bpf_loop(d->n, count_unknown, &c, 0);
	return 0;
}

static long any_special(u32 i, void *ctx)
{
	struct done *c = ctx;
	u32 index;
	struct volume *v = volume_at(c->disk, i, &index);
	if (v)
		c->special |= v->flags & (VOLUME_SETTLING | VOLUME_DRAINING);
	return 0;
}

/* [sector, sector + sectors) completed: what does it mean to volume i of the disk? */
static long complete_volume(u32 i, void *ctx)
{
	struct done *c = ctx;
	struct extent e;
	u32 index;
	struct volume *v = volume_at(c->disk, i, &index);
	if (!v)
		return 0;
	u32 flags = *(volatile u32 *)&v->flags;
	if (!flags || !overlap(v, index, c->sector, c->sectors, &e))
		return 0;
	u32 known = c->mask & 1u << (i & 31);
	bool counted = 1;
	if (!(c->flags & DISK_REQUEST_BASED) || flags & VOLUME_SETTLING)
		counted = known;
	else if (flags & VOLUME_DRAINING)
		counted = !known;
	if (flags & VOLUME_ACTIVE) {
		if (c->error) {
			mark_dirty(e.volume, e.from, e.sectors);
			add(v->failed_writes, 1); /* after the bit: who sees the count finds the bit */
		}
		if (!counted) {
			mark_dirty(e.volume, e.from, e.sectors);
			add(v->late, 1);
		}
	}
	if (counted)
		account(&e, 0);
	return 0;
}

subprogram int complete_extent(struct done *c)
{
	if (!c)
		return 0;
	if (c->volumes == 1)
		return complete_volume(0, c);
	struct done each = *c;
	bpf_loop(c->volumes, complete_volume, &each, 0);
	return 0;
}

/* Looks a bio or, for the front part of a split one, its parent up; takes away what completed. */
always u32 take_tracked(u64 bio, u64 parent, u32 bytes)
{
	u64 key = bio;
	struct tracked *t = bpf_map_lookup_elem(&bios, &key);
	if (!t) {
		key = parent;
		t = bpf_map_lookup_elem(&bios, &key);
	}
	if (!t)
		return 0;
	u32 mask = t->mask;
	/* Parts complete on several CPUs: whoever takes the last byte deletes. */
	if (__sync_fetch_and_sub(&t->bytes, bytes) == bytes)
		bpf_map_delete_elem(&bios, &key);
	return mask;
}

static long walk_step(u32 i, void *ctx)
{
	struct done *c = ctx;
	struct bio *bio = (void *)c->bio;
	if (!bio || !c->left)
		return 1;
	u32 n = min64(BPF_CORE_READ(bio, bi_iter.bi_size), c->left);
	c->sector = BPF_CORE_READ(bio, bi_iter.bi_sector);
	c->sectors = n >> SECTOR_SHIFT;
	c->mask = 0;
	if (c->special)
		c->mask = take_tracked(c->bio, (u64)BPF_CORE_READ(bio, bi_private), n);
	complete_extent(c);
	c->left -= n;
	c->bio = (u64)BPF_CORE_READ(bio, bi_next);
	return 0;
}

/* A function of its own, so that the verifier knows nothing of the values that the walk changes (see copy.h). */
subprogram int walk_request(struct done *c)
{
	if (!c)
		return 0;
	struct done walk = *c;
	bpf_loop(WALK_MAX, walk_step, &walk, 0);
	return 0;
}

always void complete_request(struct done *c, u32 op)
{
	if (c->volumes == 1)
		any_special(0, c);
	else
		bpf_loop(c->volumes, any_special, c, 0);
	/* A discard request may hold bios that are not neighbours (virtio, NVMe), so it is walked always. */
	if (c->special || op == OP_DISCARD)
		walk_request(c);
	else
		complete_extent(c);
}

/*
 * The kernel skips a program that interrupts itself on its CPU, and completions do come in interrupts. So there are two
 * of each: the first says on its CPU that it is running, and the second, which follows it at the same tracepoint, does
 * the work only if it finds that the first *is* running, that is, was interrupted and so skipped for this event.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, u32);
	__type(value, u64);
} running SEC(".maps");

enum {
	RUNNING_REQUEST,
	RUNNING_BIO,
};

always volatile u64 *running_flag(u32 which)
{
	return bpf_map_lookup_elem(&running, &which);
}

always int request_completed(struct request *rq, int error, unsigned int bytes)
{
	u32 op = rq->cmd_flags & OP_MASK;
	if (!(op & 1))
		return 0;
	struct gendisk *disk = rq->q->disk;
	u32 at;
	struct disk *d = find_disk(disk_number(disk->major, disk->first_minor), &at);
	if (!d)
		return 0;
	if (op != OP_WRITE && op != OP_DISCARD && op != OP_SECURE_ERASE && op != OP_WRITE_ZEROES) {
		if (op == OP_DRV_OUT)
			unknown_write(at);
		return 0;
	}
	if (!bytes) /* the second completion of a write with a flush around it */
		return 0;
	struct done c = {};
	c.disk = at;
	c.flags = d->flags;
	c.volumes = d->n;
	c.sector = rq->__sector;
	c.sectors = bytes >> SECTOR_SHIFT;
	c.left = bytes;
	c.bio = (u64)BPF_CORE_READ(rq, bio);
	c.error = error & 0xff;
	complete_request(&c, op);
	return 0;
}

SEC("tp_btf/block_rq_complete")
int BPF_PROG(request_done, struct request *rq, int error, unsigned int bytes)
{
	volatile u64 *flag = running_flag(RUNNING_REQUEST);
	if (!flag)
		return 0;
	*flag = 1;
	request_completed(rq, error, bytes);
	*flag = 0;
	return 0;
}

SEC("tp_btf/block_rq_complete")
int BPF_PROG(request_again, struct request *rq, int error, unsigned int bytes)
{
	volatile u64 *flag = running_flag(RUNNING_REQUEST);
	if (!flag || !*flag)
		return 0;
	add(config.rescued, 1);
	return request_completed(rq, error, bytes);
}

static long count_late_unknown(u32 i, void *ctx)
{
	struct done *c = ctx;
	u32 index;
	struct volume *v = volume_at(c->disk, i, &index);
	if (v && v->flags & VOLUME_SETTLING && v->flags & VOLUME_ACTIVE)
		add(v->late_unknown, 1);
	return 0;
}

always int bio_completed(struct bio *bio)
{
	u32 opf = bio->bi_opf;
	u32 op = opf & OP_MASK;
	if (!(op & 1))
		return 0;
	struct done c = {};
	u32 at;
	u64 key = (u64)bio;
	c.error = bio->bi_status;
	if (config.bio_based) {
		struct tracked *t = bpf_map_lookup_elem(&bios, &key);
		struct disk *of = t ? find_disk(t->dev, &at) : NULL;
		if (of && !(of->flags & DISK_REQUEST_BASED)) {
			c.disk = at;
			c.volumes = of->n;
			c.sector = t->sector;
			c.sectors = t->bytes >> SECTOR_SHIFT;
			c.mask = t->mask;
			bpf_map_delete_elem(&bios, &key);
			complete_extent(&c);
			return 0;
		}
	}
	struct gendisk *disk = bio->bi_bdev->bd_disk;
	struct disk *d = find_disk(disk_number(disk->major, disk->first_minor), &at);
	if (!d || (op != OP_WRITE && op != OP_DISCARD && op != OP_SECURE_ERASE && op != OP_WRITE_ZEROES))
		return 0;
	c.disk = at;
	c.flags = d->flags;
	c.volumes = d->n;
	u64 parent = (u64)bio->bi_private;
	u32 bytes = bio->bi_iter.bi_size;
	if (d->flags & DISK_REQUEST_BASED) {
		/* Requests take the trace flag off their bios: this one was refused before it became one. */
		if (!bytes || is_deferred(opf, d->flags))
			return 0;
		c.sector = bio->bi_iter.bi_sector;
		c.sectors = bytes >> SECTOR_SHIFT;
		c.mask = take_tracked(key, parent, bytes);
		complete_extent(&c);
		return 0;
	}
	/* A part that the driver split off a bio that we know, or a bio from before the activation. */
	if (!bpf_map_lookup_elem(&bios, &parent))
		bpf_loop(c.volumes, count_late_unknown, &c, 0);
	return 0;
}

SEC("tp_btf/block_bio_complete")
int BPF_PROG(bio_done, struct request_queue *q, struct bio *bio)
{
	volatile u64 *flag = running_flag(RUNNING_BIO);
	if (!flag)
		return 0;
	*flag = 1;
	bio_completed(bio);
	*flag = 0;
	return 0;
}

SEC("tp_btf/block_bio_complete")
int BPF_PROG(bio_again, struct request_queue *q, struct bio *bio)
{
	volatile u64 *flag = running_flag(RUNNING_BIO);
	if (!flag || !*flag)
		return 0;
	add(config.rescued, 1);
	return bio_completed(bio);
}

#endif
