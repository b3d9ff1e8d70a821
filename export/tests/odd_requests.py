"""Odd requests against a model: unaligned, empty, beyond the end, huge, with flags that do not belong.

odd_requests.py URI SEED ROUNDS MODEL: the disk begins as zeroes; what it must hold at the end is written to MODEL.
"""
import errno
import random
import sys

import nbd

uri, seed, rounds, model_path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
rng = random.Random(seed)
MAX = 32 << 20


def connect():
    h = nbd.NBD()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.set_strict_mode(0)
    h.connect_uri(uri)
    return h


handles = [connect() for _ in range(3)]
size = handles[0].get_size()
model = bytearray(size)
assert handles[0].can_meta_context(nbd.CONTEXT_BASE_ALLOCATION) and handles[0].can_multi_conn()


def expect(wanted, call):
    """The call fails with that errno, or must succeed (None)."""
    try:
        result = call()
    except nbd.Error as e:
        assert wanted is not None and e.errnum == wanted, (seed, wanted, e.errno, str(e))
        return None
    assert wanted is None, (seed, "should have failed with", errno.errorcode[wanted])
    return result


def some_range():
    kind = rng.randrange(12)
    if kind == 0:
        return rng.randrange(size + 1), 0
    if kind == 1:
        return size - min(size, rng.randrange(5000)), rng.randrange(10000)
    if kind == 2:
        return rng.choice([size, size + 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]), rng.choice([0, 1, 512, 4096])
    if kind == 3:
        return 0, rng.choice([MAX, MAX + 1, MAX + 4096])
    if kind == 4:
        return rng.randrange(size // 4096) * 4096, rng.randrange(1, 64) * 4096
    return rng.randrange(size), rng.choice([1, 2, 511, 512, 513, 4095, 4097, 65536, rng.randrange(1, 1 << 20)])


def some_flags(wanted):
    return rng.choice([0, 0, wanted, rng.choice([nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_DF, nbd.CMD_FLAG_REQ_ONE])])


def allowed(flags, *good):
    for flag in good:
        flags &= ~flag
    return flags == 0


def read(h, offset, length):
    flags = some_flags(nbd.CMD_FLAG_DF)
    wanted = None
    if not allowed(flags, nbd.CMD_FLAG_DF) or length > MAX or offset + length > size:
        wanted = errno.EINVAL
    if rng.random() < 0.5:
        got = expect(wanted, lambda: h.pread(length, offset, flags))
        assert wanted or bytes(got) == model[offset:offset + length], (seed, "read", offset, length)
        return
    chunks = []
    expect(wanted, lambda: h.pread_structured(
        length, offset, lambda buf, at, kind, err: chunks.append((at, bytes(buf), kind)), flags))
    if wanted:
        return
    chunks.sort()
    at = offset
    for begin, data, kind in chunks:
        assert begin == at and data == model[begin:begin + len(data)], (seed, "chunk", begin, at)
        assert kind == nbd.READ_DATA or not any(data), (seed, "a hole that is none", begin)
        at += len(data)
    assert at == offset + length, (seed, at, offset, length)
    if flags & nbd.CMD_FLAG_DF:
        assert len(chunks) <= 1


def write(h, offset, length):
    flags = some_flags(nbd.CMD_FLAG_FUA)
    wanted = None
    if not allowed(flags, nbd.CMD_FLAG_FUA) or length > MAX:
        wanted = errno.EINVAL
    elif offset + length > size:
        wanted = errno.ENOSPC
    data = rng.randbytes(length)
    expect(wanted, lambda: h.pwrite(data, offset, flags))
    if not wanted:
        model[offset:offset + length] = data


def zero(h, offset, length):
    if rng.random() < 0.2:
        length = rng.choice([0, 1 << 31, (1 << 32) - 1, max(0, size - offset)])
    flags = rng.choice([0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_DF])
    wanted = None
    if flags == nbd.CMD_FLAG_DF:
        wanted = errno.EINVAL
    elif offset + length > size:
        wanted = errno.ENOSPC
    expect(wanted, lambda: h.zero(length, offset, flags))
    if not wanted:
        model[offset:offset + length] = bytes(length)


def trim(h, offset, length):
    flags = some_flags(nbd.CMD_FLAG_FUA)
    good = allowed(flags, nbd.CMD_FLAG_FUA) and offset + length <= size
    expect(None if good else errno.EINVAL, lambda: h.trim(length, offset, flags))
    if good:
        # This server's trim gives zeroes.
        model[offset:offset + length] = bytes(length)


def status(h, offset, length):
    if rng.random() < 0.3:
        offset, length = 0, min(size, (1 << 32) - 1)
    flags = some_flags(nbd.CMD_FLAG_REQ_ONE)
    good = allowed(flags, nbd.CMD_FLAG_REQ_ONE) and length > 0 and offset + length <= size
    found = []

    def extent(context, at, entries, err):
        assert context == nbd.CONTEXT_BASE_ALLOCATION and at == offset
        found.extend(zip(entries[::2], entries[1::2]))

    expect(None if good else errno.EINVAL, lambda: h.block_status(length, offset, extent, flags))
    if not good:
        return
    assert found and (len(found) == 1 or not flags & nbd.CMD_FLAG_REQ_ONE)
    at = offset
    for entry, state in found:
        assert entry > 0 and state in (0, nbd.STATE_HOLE | nbd.STATE_ZERO)
        assert state == 0 or not any(model[at:at + entry]), (seed, "a hole that is none", at, entry)
        at += entry
    assert at <= offset + length
    if not flags & nbd.CMD_FLAG_REQ_ONE:
        assert at == offset + length, (seed, "status", at, offset, length)


def cache(h, offset, length):
    expect(None if offset + length <= size else errno.EINVAL, lambda: h.cache(length, offset, 0))


def many_at_once():
    """More commands than the server has places, on all connections, over ranges that do not meet."""
    piece = size // 96
    cookies = []
    for number in range(96):
        h, at = handles[number % len(handles)], number * piece
        length = rng.randrange(1, piece)
        if number % 3 == 0:
            buf = nbd.Buffer(length)
            cookies.append((h, h.aio_pread(buf, at), buf, at, length))
        else:
            data = rng.randbytes(length)
            cookies.append((h, h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), at), None, at, length))
            model[at:at + length] = data
    rng.shuffle(cookies)
    for h, cookie, buf, at, length in cookies:
        while not h.aio_command_completed(cookie):
            h.poll(-1)
        if buf is not None:
            assert bytes(buf.to_bytearray()) == model[at:at + length], (seed, "at once", at, length)


for round_number in range(rounds):
    h = rng.choice(handles)
    offset, length = some_range()
    # libnbd cannot express more.
    offset = min(offset, (1 << 63) - 1)
    rng.choice([read, read, write, write, zero, trim, status, cache])(h, offset, length)
    if round_number % 50 == 25:
        many_at_once()
    if round_number % 40 == 0:
        h.flush()

for h in handles:
    h.shutdown()
with open(model_path, "wb") as out:
    out.write(model)
print(f"{rounds} rounds, seed {seed}: the disk is as the model")
