use proptest::prelude::*;

use super::*;

const ALL: Allowed = Allowed { size: 100_000, read_only: false, allocation: true, structured: true };
const HUGE: Allowed = Allowed { size: 1 << 40, ..ALL };

fn request(command: u16, flags: u16, offset: u64, len: u32) -> Request {
    Request { flags, command, cookie: 9, offset, len }
}

fn errno(request: Request, allowed: &Allowed) -> i32 {
    request.check(allowed).map_or_else(|refused| refused.errno as i32, |_| 0)
}

#[test]
fn frozen_bytes() {
    let bytes = *b"\x25\x60\x95\x13\x00\x01\x00\x06\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\x10\0\0\0\x02\0";
    let decoded = Request::decode(&bytes).unwrap();
    assert_eq!(decoded, request(CMD_WRITE_ZEROES, CMD_FLAG_FUA, 4096, 512));
    assert_eq!((decoded.payload_bytes(), decoded.is_fua()), (0, true));
    assert_eq!(request(CMD_WRITE, 0, 0, 7).payload_bytes(), 7);
    assert!(matches!(Request::decode(&[0; 28]), Err(WireError::Magic(0))));
    assert_eq!(&simple_reply(5, 9), b"\x67\x44\x66\x98\0\0\0\x05\0\0\0\0\0\0\0\x09");
    let refused = Refused { errno: 22, text: "no".to_owned() };
    assert_eq!(error_reply(false, 9, &refused), b"\x67\x44\x66\x98\0\0\0\x16\0\0\0\0\0\0\0\x09");
    let chunk = b"\x66\x8e\x33\xef\0\x01\x80\x01\0\0\0\0\0\0\0\x09\0\0\0\x08\0\0\0\x16\0\x02no";
    assert_eq!(error_reply(true, 9, &refused), chunk);
    let chunk =
        b"\x66\x8e\x33\xef\0\x01\0\x05\0\0\0\0\0\0\0\x09\0\0\0\x14\0\0\0\x01\0\0\x02\0\0\0\0\0\0\0\0\x07\0\0\0\x03";
    assert_eq!(status_reply(9, &[(512, false), (7, true)]), chunk);
}

#[test]
fn a_long_text_is_cut_between_characters() {
    let refused = Refused { errno: 5, text: "é".repeat(1000) + "x" };
    assert_eq!(error_reply(true, 1, &refused).len(), CHUNK_HEADER_BYTES + 6 + 1024);
    let refused = Refused { errno: 5, text: "x".to_owned() + &"é".repeat(1000) };
    assert_eq!(error_reply(true, 1, &refused).len(), CHUNK_HEADER_BYTES + 6 + 1023);
}

#[test]
fn the_end_of_the_disk() {
    let max = NBD_REQUEST_BYTES_MAX;
    for (command, beyond) in [
        (CMD_READ, libc::EINVAL),
        (CMD_WRITE, libc::ENOSPC),
        (CMD_TRIM, libc::EINVAL),
        (CMD_CACHE, libc::EINVAL),
        (CMD_WRITE_ZEROES, libc::ENOSPC),
        (CMD_BLOCK_STATUS, libc::EINVAL),
    ] {
        assert_eq!(errno(request(command, 0, 99_999, 1), &ALL), 0);
        for (offset, len) in [(99_999, 2), (100_000, 1), (u64::MAX, 1), (u64::MAX, u32::MAX), (100_001, 0)] {
            let found = errno(request(command, 0, offset, len), &ALL);
            let sized = matches!(command, CMD_READ | CMD_WRITE) && len > max;
            assert_eq!(found, if sized { libc::EINVAL } else { beyond }, "{command} {offset} {len}");
        }
    }
    for command in [CMD_READ, CMD_WRITE] {
        assert_eq!(errno(request(command, 0, 0, max), &HUGE), 0);
        assert_eq!(errno(request(command, 0, 0, max + 1), &HUGE), libc::EINVAL);
    }
    assert_eq!(errno(request(CMD_TRIM, 0, 0, u32::MAX), &HUGE), 0);
    assert_eq!(errno(request(CMD_FLUSH, 0, u64::MAX, u32::MAX), &ALL), 0, "a flush has no range");
}

#[test]
fn nothing_is_asked_of_a_disk_for_no_bytes() {
    for command in [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE] {
        assert_eq!(request(command, 0, 100_000, 0).check(&ALL), Ok(Action::Nothing));
    }
    assert_eq!(errno(request(CMD_BLOCK_STATUS, 0, 0, 0), &ALL), libc::EINVAL);
}

#[test]
fn read_only_and_what_was_agreed() {
    let read_only = Allowed { read_only: true, ..ALL };
    for command in 0..=8 {
        let writes = matches!(command, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
        let unknown = matches!(command, CMD_DISC | 8);
        let expected = if unknown {
            libc::EINVAL
        } else if writes {
            libc::EPERM
        } else {
            0
        };
        assert_eq!(errno(request(command, 0, 0, 512), &read_only), expected, "{command}");
    }
    let plain = Allowed { structured: false, allocation: false, ..ALL };
    assert_eq!(errno(request(CMD_READ, CMD_FLAG_DF, 0, 1), &plain), libc::EINVAL);
    assert_eq!(errno(request(CMD_BLOCK_STATUS, 0, 0, 1), &plain), libc::EINVAL);
    assert_eq!(errno(request(CMD_BLOCK_STATUS, 0, 0, 1), &Allowed { structured: true, ..plain }), libc::EINVAL);
}

#[test]
fn each_command_has_its_flags() {
    let good = [
        (CMD_READ, CMD_FLAG_DF),
        (CMD_WRITE, 0),
        (CMD_FLUSH, 0),
        (CMD_TRIM, 0),
        (CMD_CACHE, 0),
        (CMD_WRITE_ZEROES, CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO),
        (CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE),
    ];
    for (command, own) in good {
        for flag in (0..16).map(|bit| 1u16 << bit) {
            let expected = if flag == CMD_FLAG_FUA || flag & own != 0 { 0 } else { libc::EINVAL };
            assert_eq!(errno(request(command, flag, 0, 512), &ALL), expected, "{command} {flag:#x}");
        }
    }
    let zero = |flags| request(CMD_WRITE_ZEROES, flags, 0, 1).check(&ALL);
    assert_eq!(zero(0), Ok(Action::Zero { may_unmap: true }));
    assert_eq!(zero(CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO), Ok(Action::Zero { may_unmap: false }));
}

proptest! {
    #[test]
    fn what_is_allowed_is_on_the_disk(bytes: [u8; REQUEST_BYTES], size: u64, small: bool, read_only: bool) {
        let mut bytes = bytes;
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        if small {
            bytes[4..6].fill(0);
            let command = u16::from(bytes[7] % 9);
            bytes[6..8].copy_from_slice(&command.to_be_bytes());
            bytes[16..22].fill(0);
        }
        let request = Request::decode(&bytes).unwrap();
        let allowed = Allowed { size, read_only, allocation: true, structured: true };
        match request.check(&allowed) {
            Ok(Action::Flush) => {}
            Ok(action) => {
                prop_assert!(request.offset + u64::from(request.len) <= size);
                let writes = matches!(action, Action::Write | Action::Zero { .. });
                prop_assert!(!(writes && read_only));
                let buffered = matches!(action, Action::Read { .. } | Action::Write);
                prop_assert!(request.len <= NBD_REQUEST_BYTES_MAX || !buffered);
            }
            Err(refused) => prop_assert!([1, 22, 28].contains(&refused.errno)),
        }
    }
}
