use super::*;
use proptest::prelude::*;

fn entry(address: u64, height: u64) -> RunEntry {
    RunEntry {
        address,
        height,
        layer: 9,
        offset: 0x0102_0304,
        crc: 0x0506_0708,
        stored_bytes: 4096,
        sectors: 8,
        skip: 0,
        record_sectors: 8,
        stored: 1,
    }
}

fn footer() -> RunFooter {
    RunFooter {
        magic: RUN_MAGIC,
        version: FORMAT_VERSION.into(),
        level: 1,
        reserved: [0; 5],
        group: [3; 16],
        first_layer: 8.into(),
        layers: 8.into(),
        first_height: 100.into(),
        last_height: 200.into(),
        first_time_ns: 5.into(),
        last_time_ns: 6.into(),
        layer_bytes: 7.into(),
        entries: 300.into(),
        fences_offset: 0.into(),
        tail_offset: 0.into(),
        file_bytes: 0.into(),
        blocks: 2.into(),
        tail_bytes: 5.into(),
        fences_crc: 0x11.into(),
        tail_crc: 0x12.into(),
        filter_bytes: 32.into(),
        filter_crc: 0x13.into(),
        reserved_2: 0.into(),
        crc: 0.into(),
    }
}

fn decoded(block: &[u8], index: u32) -> Result<Vec<RunEntry>, FormatError> {
    let mut entries = Vec::new();
    decode_block(block, index, |entry| entries.push(entry))?;
    Ok(entries)
}

/// Files written by this version must be readable by every later one: these bytes are frozen.
#[test]
fn golden_bytes() {
    let mut builder = BlockBuilder::new(8, 8, 100);
    let part = RunEntry { sectors: 3, skip: 2, stored: 2, stored_bytes: 300, height: 121, ..entry(0x1238, 0) };
    let zero = RunEntry { crc: 0, stored: 0, stored_bytes: 0, ..entry(0x1300, 0x1_0000_0060) };
    let entries = [entry(0x1000, 104), part, zero];
    assert!(entries.iter().all(|entry| builder.push(entry)));
    let mut block = Vec::new();
    builder.finish(&mut block);
    let mut golden = vec![0, 0, 0, 0, 3, 0, 1, 0, 8, 0, 0, 0, 96, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0];
    golden.extend([1, 0, 1, 0, 0, 1, 4, 3, 2, 1, 8, 7, 6, 5]);
    golden.extend([0x1E, 0xB8, 4, 25, 0, 0, 1, 4, 3, 2, 1, 8, 7, 6, 5, 2, 2, 7, 0xAC, 2]);
    golden.extend([0x24, 0xC8, 1, 0, 0, 0, 0x20, 1, 4, 3, 2, 1, 7]);
    golden.resize(RUN_BLOCK_BYTES - 4, 0);
    assert_eq!(block[4..], golden);
    assert_eq!(block[..4], crc32fast::hash(&golden).to_le_bytes());
    assert_eq!(decoded(&block, 0), Ok(entries.to_vec()));

    let mut footer = footer();
    let block = footer.encode();
    let mut golden = b"VARVERUN\x01\0\x01\0\0\0\0\0".to_vec();
    golden.extend([3; 16]);
    golden.extend([8, 0, 0, 0, 8, 0, 0, 0]);
    for number in [100u64, 200, 5, 6, 7, 300, 8192, 8240, 16384] {
        golden.extend(number.to_le_bytes());
    }
    golden.extend([2, 0, 0, 0, 5, 0, 0, 0, 0x11, 0, 0, 0, 0x12, 0, 0, 0, 32, 0, 0, 0, 0x13, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(block[..140], golden);
    assert_eq!(RunFooter::decode(&block, 16384), Ok(footer));
}

#[test]
fn a_footer_says_its_version_and_fits_its_file() {
    let block = footer().encode();
    assert_eq!(RunFooter::decode(&block, 16384 + 4096), Err(FormatError::Damaged("run")), "something was appended");
    let mut newer = block;
    newer[8] = 2;
    assert!(matches!(RunFooter::decode(&newer, 16384), Err(FormatError::Version { found: 2, .. })));
    let changes: [fn(&mut RunFooter); 7] = [
        |footer| footer.filter_bytes = 31.into(),
        |footer| footer.first_layer = 9.into(),
        |footer| footer.level = 2,
        |footer| footer.level = 200,
        |footer| footer.last_height = 99.into(),
        |footer| footer.entries = 1.into(),
        |footer| footer.entries = u64::MAX.into(),
    ];
    for change in changes {
        let mut footer = footer();
        change(&mut footer);
        assert!(RunFooter::decode(&footer.encode(), 16384).is_err(), "{footer:?}");
    }
}

#[test]
fn fences_have_one_checksum() {
    let mut footer = footer();
    let bytes = encode_fences(&[5, 9]);
    footer.fences_crc = crc32fast::hash(&bytes).into();
    footer.encode();
    assert_eq!(decode_fences(&bytes, &footer), Ok(vec![5, 9]));
    for at in 0..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[at] ^= 4;
        assert!(decode_fences(&bytes, &footer).is_err());
    }
    assert!(decode_fences(&bytes[..8], &footer).is_err());
}

prop_compose! {
    fn any_entry()(
        step in prop_oneof![0u64..200, 0u64..1 << 40],
        height in prop_oneof![0u64..1 << 20, Just(1 << 33), 0u64..1 << 60],
        aligned in any::<bool>(),
        layer in 0u32..600,
        numbers in any::<[u32; 2]>(),
        (skip, sectors, more) in (0u16..60, 1u16..60, 0u16..8),
        stored in 0u8..3,
        lz4_bytes in 1u32..60000,
    ) -> RunEntry {
        let record_sectors = skip + sectors + more;
        let whole = more == 7;
        RunEntry {
            address: step,
            height: if aligned { height & !7 } else { height },
            layer,
            offset: numbers[0],
            crc: if stored == 0 { 0 } else { numbers[1] },
            stored_bytes: match stored { 0 => 0, 1 => 512 * u32::from(if whole { sectors } else { record_sectors }), _ => lz4_bytes },
            sectors,
            skip: if whole || record_sectors == sectors { 0 } else { skip },
            record_sectors: if whole { sectors } else { record_sectors },
            stored,
        }
    }
}

proptest! {
    #[test]
    fn entries_come_back(mut entries in prop::collection::vec(any_entry(), 1..600), base in 0u64..1 << 40, first in 0u32..1000) {
        let mut address = 0;
        for entry in &mut entries {
            address += entry.address;
            entry.address = address;
            entry.height += base;
            entry.layer += first;
        }
        let mut builder = BlockBuilder::new(first, 4096, base);
        let mut blocks = Vec::new();
        for entry in &entries {
            if !builder.push(entry) {
                builder.finish(&mut blocks);
                prop_assert!(builder.push(entry));
            }
        }
        builder.finish(&mut blocks);
        let mut read = Vec::new();
        for (index, block) in blocks.chunks(RUN_BLOCK_BYTES).enumerate() {
            let part = decoded(block, index as u32).expect("our own block");
            prop_assert!(decoded(block, index as u32 + 1).is_err(), "a block in another's place");
            read.extend(part);
        }
        prop_assert_eq!(read, entries);
    }

    #[test]
    fn never_panics(mut block in prop::collection::vec(any::<u8>(), RUN_BLOCK_BYTES), bit in 0usize..RUN_BLOCK_BYTES * 8, layers in 0u8..2) {
        let _ = decoded(&block, 0);
        let _ = RunFooter::decode(&block, 8192);
        // Past the checksum: the entries themselves are anything.
        block[4..8].fill(0);
        block[8] %= 200;
        block[9..16].fill(0);
        block[10] = layers;
        let crc = crc32fast::hash(&block[4..]).to_le_bytes();
        block[..4].copy_from_slice(&crc);
        let _ = decoded(&block, 0);

        let mut builder = BlockBuilder::new(8, 8, 100);
        prop_assert!(builder.push(&entry(1, 104)));
        let mut block = Vec::new();
        builder.finish(&mut block);
        block[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(decoded(&block, 0).is_err(), "any flipped bit is seen");
        let mut block = footer().encode();
        block[bit % (144 * 8) / 8] ^= 1 << (bit % 8);
        prop_assert!(RunFooter::decode(&block, 16384).is_err());
    }
}
