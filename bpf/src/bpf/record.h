/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Layouts that two sides share. The record is the format of `varve_common::record`; the control structures are those
 * of `bpf/src/layout.rs`. Both sides assert every size, so a change of one alone does not build.
 */
#ifndef VARVE_RECORD_H
#define VARVE_RECORD_H

enum record_kind {
	RECORD_WRITE = 1,
	RECORD_WRITE_ZEROES = 2,
	RECORD_DISCARD = 3,
	RECORD_FLUSH = 4,
	RECORD_BOOKMARK = 5,
	RECORD_CANARY = 6,
	RECORD_RESIZE = 7,
};

enum {
	FLAG_FUA = 1,
	FLAG_PREFLUSH = 2,
	FLAG_MORE = 4,
};

#define PAYLOAD_BYTES_MAX (1u << 20)
#define BOOKMARK_BYTES_MAX 255

struct record_header {
	u8 kind;
	u8 flags;
	u16 volume;
	u32 payload;
	u64 time_ns;
	u64 offset;
	u64 length;
};
_Static_assert(sizeof(struct record_header) == 32, "record header is 32 bytes");
_Static_assert(__builtin_offsetof(struct record_header, volume) == 2, "volume");
_Static_assert(__builtin_offsetof(struct record_header, payload) == 4, "payload");
_Static_assert(__builtin_offsetof(struct record_header, time_ns) == 8, "time");
_Static_assert(__builtin_offsetof(struct record_header, offset) == 16, "offset");
_Static_assert(__builtin_offsetof(struct record_header, length) == 24, "length");

#define SECTOR_SHIFT 9
#define REGION_SHIFT 20
#define REGION_SECTOR_SHIFT (REGION_SHIFT - SECTOR_SHIFT)
#define GROUPS_MAX 64
#define VOLUMES_MAX 1024
#define INFLIGHT_SLOTS 65536
#define BIOS_MAX 65536

/* The table of watched disks: open addressing, a line of cache an entry. `dev` is written once and stays; an entry
 * without volumes is a tombstone. */
#define DISKS_MAX 4096
#define DISK_PROBES 8
#define DISK_VOLUMES 24
#define DISK_VOLUME_NONE 0xffff

enum {
	DISK_REQUEST_BASED = 1,
};

struct disk {
	u32 dev; /* major << 20 | minor of the whole disk */
	u32 flags;
	u32 n; /* slots in use, holes included */
	u32 unused;
	u16 volume[DISK_VOLUMES]; /* index into `volumes`, or DISK_VOLUME_NONE */
};
_Static_assert(sizeof(struct disk) == 64, "disk is a line of cache");
_Static_assert(__builtin_offsetof(struct disk, volume) == 16, "volumes of a disk");

enum {
	VOLUME_ACTIVE = 1,   /* capture */
	VOLUME_SETTLING = 2, /* writes from before the activation may still be in flight */
	VOLUME_DRAINING = 4, /* given up: only wait for what is in flight */
};

struct volume {
	/* line 0: read by every write, written by user space only (`device` also when a device's size changed) */
	u32 flags;
	u32 group;
	u32 number; /* in its group */
	u32 unused0;
	u64 start; /* sectors */
	u64 sectors;
	u64 identity; /* user space: which disk the number named when the volume was added */
	u64 device; /* sectors that the block device which begins at `start` had when last looked at, 0 = nobody looks */
	u64 unused1[2];
	/* lines 1 and 2: counters */
	u64 records;
	u64 bytes;
	u64 dropped_records;
	u64 dropped_bytes;
	u64 unreadable;
	u64 failed_writes;
	u64 straddling;
	u64 late;
	u64 late_unknown;
	u64 passthrough;
	u64 untracked;
	u64 late_unknown_seen; /* user space: how much of late_unknown has made the volume dirty */
	u64 resized; /* times that a write came to a device whose size had changed */
	u64 unused2[3];
};
_Static_assert(sizeof(struct volume) == 192, "volume is three lines of cache");
_Static_assert(__builtin_offsetof(struct volume, start) == 16, "start");
_Static_assert(__builtin_offsetof(struct volume, records) == 64, "counters start a line");
_Static_assert(__builtin_offsetof(struct volume, device) == 40, "device");
_Static_assert(__builtin_offsetof(struct volume, untracked) == 144, "counters");
_Static_assert(__builtin_offsetof(struct volume, resized) == 160, "last counter");

struct group {
	u64 time_offset; /* wall clock minus boot clock, wrapping */
	u64 first_drop;  /* position + 1 of the producer when the first write was dropped, 0 = none */
	u64 unused[6];
};
_Static_assert(__builtin_offsetof(struct group, first_drop) == 8, "first drop");
_Static_assert(sizeof(struct group) == 64, "group is a line of cache");

/* What calibration found out, and whether anybody needs the bio completions. */
struct config {
	u64 page_base; /* address of the (virtual) struct page of frame 0 */
	u64 data_base; /* address of frame 0 in the direct map */
	u64 ratio;     /* 4096 / sizeof(struct page); 0 = not calibrated */
	u32 bio_based; /* number of watched bio-based volumes */
	u32 unused;
	u64 rescued; /* completions that the second program saw because the first was interrupted */
};
_Static_assert(sizeof(struct config) == 40, "config");

/* A write that must be recognised at its completion. */
struct tracked {
	u64 sector;
	u32 bytes; /* of the whole bio; request-based: of what has not completed */
	u32 dev;
	u32 mask; /* the disk's volume slots that this bio counts for */
	u32 unused;
};
_Static_assert(sizeof(struct tracked) == 24, "tracked");

/* Arguments of the `mark` program. */
struct mark {
	u32 group;
	u32 kind;
	u32 volume;
	u32 payload;
	u64 length;
	u8 data[256];
};
_Static_assert(sizeof(struct mark) == 280, "mark");

/* Dialogue of the calibration programs. */
struct probe {
	u64 page;    /* found: struct page of the first segment */
	u64 slab;    /* found: an address in the direct map */
	u64 address; /* `peek`: what to read */
	u32 tgid;    /* whose read to watch */
	u32 seen;
	u32 offset; /* found: of the data from the page */
	u32 length;
	s32 error; /* of the read into `bytes` */
	u32 page_size; /* sizeof(struct page) */
	u8 bytes[4096];
};
_Static_assert(sizeof(struct probe) == 48 + 4096, "probe");

#endif
