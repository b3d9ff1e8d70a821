//! Ring records out of any bytes: what decodes lies within the input, follows on without a hole, keeps every limit,
//! and comes out the same when it is written again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use varve_common::record::{
    BOOKMARK_BYTES_MAX, PAYLOAD_BYTES_MAX, RECORD_BYTES_MAX, RecordKind, Records, append_record,
};
use varve_receiver::group::stream::{check_content, check_record};
use zerocopy::IntoBytes;

const VOLUMES: [u64; 3] = [1 << 20, 1 << 40, 512];

fuzz_target!(|data: &[u8]| {
    let Some((position, bytes)) = data.split_first_chunk::<8>() else { return };
    let position = u64::from_le_bytes(*position);
    let (mut end, mut good, mut newest) = (position, true, None);
    for record in Records::new(position, bytes) {
        assert!(good, "nothing follows an error");
        let Ok(record) = record else {
            good = false;
            continue;
        };
        assert!(position.is_multiple_of(8) && record.position.is_multiple_of(8) && record.end.is_multiple_of(8));
        assert!(record.position >= end && record.end > record.position, "in order, given-up ones passed over");
        assert!(record.end - record.position <= RECORD_BYTES_MAX);
        assert!(record.end - position <= bytes.len() as u64, "within the input");
        let (payload, length) = (record.payload.len(), record.header.length.get());
        match record.kind {
            RecordKind::Write => {
                assert!(payload as u64 == length && (1..=PAYLOAD_BYTES_MAX as usize).contains(&payload))
            }
            RecordKind::Bookmark => assert!((1..=BOOKMARK_BYTES_MAX).contains(&payload)),
            _ => assert_eq!(payload, 0),
        }
        assert!(record.header.offset.get().checked_add(length).is_some());
        if check_record(&record, &VOLUMES).is_ok() && record.kind.changes_data() {
            assert!(record.header.offset.get() + length <= VOLUMES[usize::from(record.header.volume.get())]);
        }
        let mut again = Vec::new();
        append_record(&mut again, record.header, record.payload);
        let second = Records::new(record.position, &again).next().expect("one record").expect("a good one");
        assert_eq!((second.kind, second.payload), (record.kind, record.payload));
        assert_eq!(second.header.as_bytes(), record.header.as_bytes());
        end = record.end;
        newest = Some(record.header.time_ns.get());
    }
    if let Ok(time) = check_content(position, bytes, &VOLUMES) {
        assert!(good, "what is not records is not content");
        assert_eq!(time, newest);
    }
});
