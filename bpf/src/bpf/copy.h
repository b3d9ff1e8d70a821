/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* From a bio's pages into records of a group's ring. */
#ifndef VARVE_COPY_H
#define VARVE_COPY_H

#define PAGE_BYTES 4096u
#define SLICE_BYTES 65536u
/* Steps of one record: every step but a segment switch copies at least a byte, and no real bio comes near this. */
#define STEPS_MAX (1u << 17)

/* What becomes of a bio in one volume. A second one is on the stack while its pages are walked through, seven calls deep, where
 * all stacks together have 512 bytes, and on older kernels each counts in steps of 32: so no more than is needed there. */
struct walk {
	struct extent extent;
	u64 time_ns;
	u64 segment; /* address of the current bio_vec */
	u32 skip;    /* bytes of it that are done */
	u32 flags;   /* FLAG_* */
	u32 group;
	u32 number;
};

/* What lands on the disk is not what is in the pages. */
#define ODD_OPAQUE 1u
/* It could not be remembered, so its completion will not be recognised. */
#define ODD_FORGOTTEN 2u

/* A bio being captured. Lives on the stack of the capture program. */
struct job {
	u64 sector; /* on the disk */
	u64 sectors;
	u64 bio; /* address */
	u32 disk; /* index */
	u32 op;
	u32 hits;  /* volume slots that it touches */
	u32 adds;  /* of those: whose bytes in flight it counts for */
	u32 marks; /* of those: to remember in `bios` */
	u32 odd; /* ODD_* */

	/* the device that it was sent to: a partition, or the disk itself */
	u64 device_start;
	u64 device_sectors;

	struct walk walk; /* for the current volume */
};

/* Where the copying of one record stands. */
struct copy {
	u64 segment; /* address of the next bio_vec */
	u64 from;    /* address of the next byte */
	u32 left_in_segment;
	u32 skip;
	u32 left; /* in the record */
	u32 at;   /* in the record */
	u32 failed;
	u32 busy; /* a program of this CPU is at it */
};

/*
 * The state of the copy loop, and a page for bytes that do not fill a page of the record: a slice of a record has a
 * constant length. Only capture programs use it. None interrupts itself on a CPU, but one may interrupt another: where a driver
 * submits from an interrupt. The second one says that it cannot read the pages.
 *
 * The state is not on the stack for a reason: before 6.7 the verifier looks at the body of a bpf_loop once only, takes
 * what it finds on the stack then for the truth about every turn, and cuts out what is for later turns. What a map
 * holds is unknown to it.
 */
struct scratch {
	struct copy copy;
	u8 page[PAGE_BYTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

struct record {
	struct bpf_dynptr to;
	struct scratch *scratch;
};

always u64 data_address(u64 page)
{
	return config.data_base + (page - config.page_base) * config.ratio;
}

always bool next_segment(struct copy *c)
{
	struct {
		u64 page;
		u32 length;
		u32 offset;
	} s;
	/* The layout of bio_vec is read as a whole: three members of one natural layout since 2.5. */
	if (bpf_probe_read_kernel(&s, sizeof(s), (void *)c->segment))
		return 0;
	c->segment += sizeof(s);
	if (c->skip >= s.length) {
		c->skip -= s.length;
		c->left_in_segment = 0;
		return 1;
	}
	c->from = data_address(s.page) + s.offset + c->skip;
	c->left_in_segment = s.length - c->skip;
	c->skip = 0;
	return 1;
}

static long copy_step(u32 i, void *ctx)
{
	struct record *r = ctx;
	struct scratch *s = r->scratch;
	struct copy *c = &s->copy;
	if (!c->left)
		return 1;
	if (!c->left_in_segment) {
		if (!next_segment(c))
			goto failed;
		return 0;
	}
	u32 n = c->left_in_segment < c->left ? c->left_in_segment : c->left;
	if (n >= SLICE_BYTES) {
		n = SLICE_BYTES;
		void *to = bpf_dynptr_data(&r->to, c->at, SLICE_BYTES);
		if (!to || bpf_probe_read_kernel(to, SLICE_BYTES, (void *)c->from))
			goto failed;
	} else if (n >= PAGE_BYTES) {
		n = PAGE_BYTES;
		void *to = bpf_dynptr_data(&r->to, c->at, PAGE_BYTES);
		if (!to || bpf_probe_read_kernel(to, PAGE_BYTES, (void *)c->from))
			goto failed;
	} else {
		/* The compiler knows that n < 4096 and drops a plain mask; the verifier does not. */
		u64 part = n;
		asm volatile("%0 &= 4095" : "+r"(part));
		if (bpf_probe_read_kernel(s->page, part, (void *)c->from) ||
		    bpf_dynptr_write(&r->to, c->at, s->page, part, 0))
			goto failed;
	}
	c->from += n;
	c->left_in_segment -= n;
	c->left -= n;
	c->at += n;
	return 0;
failed:
	c->failed = 1;
	return 1;
}

always void fill_header(struct record_header *h, struct walk *w, u32 kind, u32 flags, u64 offset, u64 length, u32 payload)
{
	h->kind = kind;
	h->flags = flags;
	h->volume = w->number;
	h->payload = payload;
	h->time_ns = w->time_ns;
	h->offset = offset;
	h->length = length;
}

/* The dirty bits of what did not get into the ring, and the position before it. */
subprogram int give_up(u32 group, u32 volume, u64 from, u64 sectors, u32 unreadable)
{
	mark_dirty(volume, from, sectors);
	u32 key = volume;
	struct volume *v = bpf_map_lookup_elem(&volumes, &key);
	if (v && unreadable) {
		add(v->unreadable, 1);
	} else if (v) {
		add(v->dropped_records, 1);
		add(v->dropped_bytes, sectors << SECTOR_SHIFT);
	}
	key = group;
	struct group *g = bpf_map_lookup_elem(&groups, &key);
	if (g && !g->first_drop) {
		/* Records that others append meanwhile are concurrent with this write, so a position after them is
		 * still one without it. */
		void *ring = bpf_map_lookup_elem(&rings, &key);
		u64 position = ring ? bpf_ringbuf_query(ring, BPF_RB_PROD_POS) : 0;
		__sync_val_compare_and_swap(&g->first_drop, 0, position + 1);
	}
	return 0;
}

always int give_up_extent(struct walk *w, struct extent *e, u32 unreadable)
{
	return give_up(w->group, e->volume, e->from, e->sectors, unreadable);
}

/* A record without payload for the whole extent. */
subprogram int put_plain(struct walk *w, u32 kind)
{
	if (!w)
		return 0;
	u32 key = w->group;
	void *ring = bpf_map_lookup_elem(&rings, &key);
	struct record_header *h = ring ? bpf_ringbuf_reserve(ring, sizeof(*h), 0) : NULL;
	if (!h)
		return give_up_extent(w, &w->extent, 0);
	fill_header(h, w, kind, w->flags, w->extent.from << SECTOR_SHIFT, w->extent.sectors << SECTOR_SHIFT, 0);
	bpf_ringbuf_submit(h, BPF_RB_NO_WAKEUP);
	return 0;
}

struct page_record {
	struct record_header header;
	u8 data[PAGE_BYTES];
};

/* The commonest write of all: one page, no dynptr and no loop. */
subprogram int put_page(struct walk *w, u64 from)
{
	if (!w)
		return 0;
	u32 key = w->group;
	void *ring = bpf_map_lookup_elem(&rings, &key);
	struct page_record *r = ring ? bpf_ringbuf_reserve(ring, sizeof(*r), 0) : NULL;
	if (!r)
		return give_up_extent(w, &w->extent, 0);
	fill_header(&r->header, w, RECORD_WRITE, w->flags, w->extent.from << SECTOR_SHIFT, PAGE_BYTES, PAGE_BYTES);
	if (bpf_probe_read_kernel(r->data, PAGE_BYTES, (void *)from)) {
		bpf_ringbuf_discard(r, BPF_RB_NO_WAKEUP);
		return give_up_extent(w, &w->extent, 1);
	}
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	return 0;
}

/* Record number i of a bio. */
static long put_chunk(u32 i, void *ctx)
{
	struct walk *w = ctx;
	u64 total = w->extent.sectors << SECTOR_SHIFT;
	u64 done = (u64)i * PAYLOAD_BYTES_MAX;
	if (done >= total)
		return 1;
	u32 n = min64(total - done, PAYLOAD_BYTES_MAX);
	struct extent part = {
		.from = w->extent.from + (done >> SECTOR_SHIFT),
		.sectors = n >> SECTOR_SHIFT,
		.volume = w->extent.volume,
	};
	u32 key = 0;
	struct record r;
	r.scratch = bpf_map_lookup_elem(&scratch, &key);
	if (!r.scratch)
		return 1;
	struct copy *c = &r.scratch->copy;
	volatile u32 *busy = &c->busy;
	if (*busy) {
		give_up_extent(w, &part, 1);
		w->skip += n;
		return 0;
	}
	*busy = 1;
	c->segment = w->segment;
	c->skip = w->skip;
	c->left_in_segment = 0;
	c->left = n;
	c->at = sizeof(struct record_header);
	c->failed = 0;

	key = w->group;
	void *ring = bpf_map_lookup_elem(&rings, &key);
	if (!ring) {
		*busy = 0;
		give_up_extent(w, &part, 0);
		return 0;
	}
	bool reserved = !bpf_ringbuf_reserve_dynptr(ring, n + sizeof(struct record_header), 0, &r.to);
	if (!reserved) {
		bpf_ringbuf_discard_dynptr(&r.to, BPF_RB_NO_WAKEUP);
		*busy = 0;
		give_up_extent(w, &part, 0);
		/* Where the next record's data begins is not known without walking; skip it by bytes. */
		w->skip += n;
		return 0;
	}
	bpf_loop(STEPS_MAX, copy_step, &r, 0);
	struct record_header *h = bpf_dynptr_data(&r.to, 0, sizeof(*h));
	if (!h || c->failed || c->left) {
		bpf_ringbuf_discard_dynptr(&r.to, BPF_RB_NO_WAKEUP);
		*busy = 0;
		give_up_extent(w, &part, 1);
		w->skip += n;
		return 0;
	}
	u32 more = done + n < total ? FLAG_MORE : 0;
	fill_header(h, w, RECORD_WRITE, w->flags | more, part.from << SECTOR_SHIFT, n, n);
	bpf_ringbuf_submit_dynptr(&r.to, BPF_RB_NO_WAKEUP);
	/* The next record goes on inside the same segment, or at the start of the following one. */
	if (c->left_in_segment) {
		u32 length = 0;
		bpf_probe_read_kernel(&length, sizeof(length), (void *)(c->segment - 8));
		w->segment = c->segment - 16;
		w->skip = length - c->left_in_segment;
	} else {
		w->segment = c->segment;
		w->skip = 0;
	}
	*busy = 0;
	return 0;
}

subprogram int put_write(struct walk *w)
{
	if (!w)
		return 0;
	u64 bytes = w->extent.sectors << SECTOR_SHIFT;
	if (bytes == PAGE_BYTES) {
		struct copy c = { .segment = w->segment, .skip = w->skip };
		if (next_segment(&c) && c.left_in_segment >= PAGE_BYTES)
			return put_page(w, c.from);
	}
	/* A copy: the way through the segments is walked again if another volume captures the same bio. */
	struct walk walk = *w;
	bpf_loop((bytes + PAYLOAD_BYTES_MAX - 1) / PAYLOAD_BYTES_MAX, put_chunk, &walk, 0);
	return 0;
}

#endif
