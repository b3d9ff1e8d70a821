//! What one agent leaves for the next about a group, in memory that outlives it.
//!
//! An agent may be killed between any two of its stores, and nothing else can happen: stores that were made are there.
//! So every change ends with one store that makes it count (the state, or which of the two notes holds).

use std::sync::atomic::{AtomicU64, Ordering};

use crate::layout::{LEDGER_BUILDING, LEDGER_KEPT, LedgerEntry, NAME_BYTES, NOTE_WORDS};

/// The agent's note about a group: words of its own choosing.
pub type Note = [u64; NOTE_WORDS];

fn words_of(name: &str) -> [u64; NAME_BYTES / 8] {
    let mut bytes = [0; NAME_BYTES];
    let length = name.len().min(NAME_BYTES);
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    let (words, _) = bytes.as_chunks::<8>();
    std::array::from_fn(|i| u64::from_le_bytes(words[i]))
}

impl LedgerEntry {
    pub(crate) fn begin(&self, name: &str, incarnation: [u8; 16], volumes: u32) {
        self.state.store(LEDGER_BUILDING, Ordering::Release);
        for (word, value) in self.name.iter().zip(words_of(name)) {
            word.store(value, Ordering::Relaxed);
        }
        let number = u128::from_le_bytes(incarnation);
        for (word, value) in self.incarnation.iter().zip([number as u64, (number >> 64) as u64]) {
            word.store(value, Ordering::Relaxed);
        }
        self.current.store(0, Ordering::Relaxed);
        self.volumes.store(volumes, Ordering::Release);
    }

    pub(crate) fn is_named(&self, name: &str) -> bool {
        self.name.each_ref().map(|word| word.load(Ordering::Relaxed)) == words_of(name)
    }

    pub(crate) fn name(&self) -> String {
        let words = self.name.each_ref().map(|word| word.load(Ordering::Relaxed).to_le_bytes());
        String::from_utf8_lossy(words.as_flattened()).trim_end_matches('\0').to_owned()
    }

    pub(crate) fn incarnation(&self) -> [u8; 16] {
        let [low, high] = self.incarnation.each_ref().map(|word| u128::from(word.load(Ordering::Relaxed)));
        (low | high << 64).to_le_bytes()
    }

    /// Replaces the note as a whole. From the first one on the next agent can go on with the group.
    pub(crate) fn set_note(&self, note: &Note) {
        let next = 1 - (self.current.load(Ordering::Relaxed) & 1);
        for (word, value) in self.notes[next as usize].iter().zip(note) {
            word.store(*value, Ordering::Relaxed);
        }
        self.current.store(next, Ordering::Release);
        if self.state.load(Ordering::Relaxed) == LEDGER_BUILDING {
            self.state.store(LEDGER_KEPT, Ordering::Release);
        }
    }

    pub(crate) fn note(&self) -> Note {
        let current = self.current.load(Ordering::Acquire) & 1;
        self.notes[current as usize].each_ref().map(|word: &AtomicU64| word.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn a_note_is_replaced_as_a_whole() {
        let zero = || AtomicU64::new(0);
        let entry = LedgerEntry {
            state: AtomicU32::new(0),
            volumes: AtomicU32::new(0),
            name: std::array::from_fn(|_| zero()),
            incarnation: std::array::from_fn(|_| zero()),
            current: zero(),
            notes: std::array::from_fn(|_| std::array::from_fn(|_| zero())),
            unused: std::array::from_fn(|_| zero()),
        };
        let name = "x".repeat(NAME_BYTES);
        entry.begin(&name, *b"0123456789abcdef", 3);
        assert!(entry.is_named(&name) && !entry.is_named("x") && entry.name() == name);
        assert_eq!(entry.incarnation(), *b"0123456789abcdef");
        assert_eq!(entry.state.load(Ordering::Relaxed), LEDGER_BUILDING);
        for number in 1..5 {
            entry.set_note(&[number; NOTE_WORDS]);
            assert_eq!(entry.note(), [number; NOTE_WORDS]);
            // A kill in the middle of the next one leaves this one.
            let other = 1 - entry.current.load(Ordering::Relaxed) as usize;
            entry.notes[other][3].store(99, Ordering::Relaxed);
            assert_eq!(entry.note(), [number; NOTE_WORDS]);
        }
        assert_eq!(entry.state.load(Ordering::Relaxed), LEDGER_KEPT);
    }
}
