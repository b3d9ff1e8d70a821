/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What we know of the kernel, and no more: each struct lists only the members that are read. The loader relocates
 * every access to where the running kernel keeps the member (CO-RE), so one object runs on every kernel from 5.19.
 * A full vmlinux.h would be 3 MB of somebody's kernel and would hide which members we depend on.
 */
#ifndef VARVE_KERNEL_H
#define VARVE_KERNEL_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u64 __be64;
typedef __u32 __wsum;
typedef __u16 __sum16;
typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s32 s32;
typedef __s64 s64;
typedef _Bool bool;

#define NULL ((void *)0)

/* The user ABI of bpf(2): these numbers are frozen. */
enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_ARRAY_OF_MAPS = 12,
	BPF_MAP_TYPE_RINGBUF = 27,
};
enum {
	BPF_ANY = 0,
	BPF_F_MMAPABLE = 1 << 10,
	BPF_F_INNER_MAP = 1 << 12,
};
enum {
	BPF_RB_NO_WAKEUP = 1,
	BPF_RB_PROD_POS = 3,
};

struct bpf_dynptr {
	__u64 opaque[2];
} __attribute__((aligned(8)));

/* Request operations: stable since 4.10 for the ones that we name; zone operations were renumbered, so they are only
 * known as "some other write". Every operation that sends data to the device is odd. */
enum {
	OP_READ = 0,
	OP_WRITE = 1,
	OP_DISCARD = 3,
	OP_SECURE_ERASE = 5,
	OP_WRITE_ZEROES = 9,
	OP_DRV_OUT = 35,
	OP_MASK = 0xff,
};

#define relocated __attribute__((preserve_access_index))

/* Only the names matter: the bit numbers are asked of the running kernel. */
enum req_flag_bits {
	__REQ_FUA = 17,
	__REQ_PREFLUSH = 18,
	__REQ_NOWAIT = 21,
};

struct page {
	unsigned long flags;
} relocated;

struct bio_vec {
	struct page *bv_page;
	unsigned int bv_len;
	unsigned int bv_offset;
} relocated;

struct bvec_iter {
	u64 bi_sector;
	unsigned int bi_size;
	unsigned int bi_idx;
	unsigned int bi_bvec_done;
} relocated;

struct request_queue;

struct gendisk {
	int major;
	int first_minor;
} relocated;

struct block_device {
	u64 bd_start_sect;
	u64 bd_nr_sectors;
	struct gendisk *bd_disk;
} relocated;

struct bio {
	struct bio *bi_next;
	struct block_device *bi_bdev;
	unsigned int bi_opf;
	u8 bi_status;
	struct bvec_iter bi_iter;
	void *bi_private;
	struct bio_vec *bi_io_vec;
} relocated;

/* A kernel with inline encryption has one more member: its presence is asked at load time. */
struct bio___crypt {
	void *bi_crypt_context;
} relocated;

struct request_queue {
	struct gendisk *disk;
} relocated;

struct request {
	struct request_queue *q;
	unsigned int cmd_flags;
	u64 __sector;
	struct bio *bio;
} relocated;

#endif
