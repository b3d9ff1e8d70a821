/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Programs that user space calls, and the one that watches its calibration reads. */
#ifndef VARVE_CALLS_H
#define VARVE_CALLS_H

#define ENOSPC 28
#define EINVAL 22

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct mark);
} mark_arguments SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct probe);
} probe SEC(".maps");

/* The arguments come through a map and not through the context: a helper cannot read the context on 5.19. */
SEC("syscall")
int mark(void *ctx)
{
	u32 zero = 0;
	struct mark *m = bpf_map_lookup_elem(&mark_arguments, &zero);
	if (!m)
		return EINVAL;
	u32 key = m->group;
	struct group *g = bpf_map_lookup_elem(&groups, &key);
	void *ring = bpf_map_lookup_elem(&rings, &key);
	if (!g || !ring)
		return EINVAL;
	u64 payload = m->payload;
	if (payload > BOOKMARK_BYTES_MAX)
		return EINVAL;
	struct bpf_dynptr to;
	int result = ENOSPC;
	if (bpf_ringbuf_reserve_dynptr(ring, sizeof(struct record_header) + payload, 0, &to))
		goto discard;
	struct record_header *h = bpf_dynptr_data(&to, 0, sizeof(*h));
	if (!h)
		goto discard;
	h->kind = m->kind;
	h->flags = 0;
	h->volume = m->volume;
	h->payload = payload;
	h->time_ns = bpf_ktime_get_boot_ns() + g->time_offset;
	h->offset = 0;
	h->length = m->length;
	if (payload) {
		asm volatile("%0 &= 255" : "+r"(payload));
		result = EINVAL;
		if (bpf_dynptr_write(&to, sizeof(*h), m->data, payload, 0))
			goto discard;
	}
	bpf_ringbuf_submit_dynptr(&to, BPF_RB_NO_WAKEUP);
	return 0;
discard:
	bpf_ringbuf_discard_dynptr(&to, BPF_RB_NO_WAKEUP);
	return result;
}

/* Reads a page at an address that may be anything. */
SEC("syscall")
int peek(void *ctx)
{
	u32 zero = 0;
	struct probe *p = bpf_map_lookup_elem(&probe, &zero);
	if (!p)
		return EINVAL;
	p->slab = bpf_get_current_task();
	p->page_size = bpf_core_type_size(struct page);
	p->error = bpf_probe_read_kernel(p->bytes, sizeof(p->bytes), (void *)p->address);
	return 0;
}

/* The first read of the calibrating process: its page, and what the found constants make of it. */
SEC("tp_btf/block_bio_queue")
int BPF_PROG(calibrate, struct bio *bio)
{
	if ((bio->bi_opf & OP_MASK) != OP_READ)
		return 0;
	u32 zero = 0;
	struct probe *p = bpf_map_lookup_elem(&probe, &zero);
	if (!p || p->seen || p->tgid != bpf_get_current_pid_tgid() >> 32)
		return 0;
	struct copy c = {
		.segment = (u64)bio->bi_io_vec + (u64)bio->bi_iter.bi_idx * 16,
		.skip = bio->bi_iter.bi_bvec_done,
	};
	struct {
		u64 page;
		u32 length;
		u32 offset;
	} s;
	if (bpf_probe_read_kernel(&s, sizeof(s), (void *)c.segment))
		return 0;
	p->page = s.page;
	p->offset = s.offset;
	p->length = s.length;
	p->error = -1;
	if (config.ratio && next_segment(&c))
		p->error = bpf_probe_read_kernel(p->bytes, sizeof(p->bytes), (void *)c.from);
	p->seen = 1;
	return 0;
}

#endif
