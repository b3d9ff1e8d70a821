//! Named points, in the order of their heights.

use std::collections::BTreeMap;
use varve_common::point::Consistency;

/// A named point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bookmark {
    /// The point.
    pub height: u64,
    /// Its time at the source.
    pub time_ns: u64,
    /// Its name; a newer one may have the same.
    pub name: String,
    /// What it promises.
    pub consistency: Consistency,
    /// It may not expire.
    pub kept: bool,
}

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub(super) struct Bookmarks {
    /// By height; names at one height differ.
    all: BTreeMap<(u64, String), Bookmark>,
    /// Heights of each name, from old to new.
    names: BTreeMap<String, Vec<u64>>,
    kept: usize,
}

impl Bookmarks {
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn kept(&self) -> usize {
        self.kept
    }

    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = &Bookmark> {
        self.all.values()
    }

    pub(super) fn has(&self, height: u64, name: &str) -> bool {
        self.all.contains_key(&(height, name.to_owned()))
    }

    pub(super) fn add(&mut self, bookmark: Bookmark) {
        let heights = self.names.entry(bookmark.name.clone()).or_default();
        if let Err(at) = heights.binary_search(&bookmark.height) {
            heights.insert(at, bookmark.height);
        }
        self.kept += usize::from(bookmark.kept);
        let key = (bookmark.height, bookmark.name.clone());
        if let Some(old) = self.all.insert(key, bookmark) {
            self.kept -= usize::from(old.kept);
        }
    }

    /// The newest of this name.
    pub(super) fn newest(&self, name: &str) -> Option<&Bookmark> {
        let height = *self.names.get(name)?.last()?;
        self.all.get(&(height, name.to_owned()))
    }

    /// Those at `height`.
    pub(super) fn at(&self, height: u64) -> impl Iterator<Item = &Bookmark> {
        self.all.range((height, String::new())..).map(|(_, bookmark)| bookmark).take_while(move |b| b.height == height)
    }

    /// Pins the newest of this name; false if there is none or it is pinned.
    pub(super) fn keep(&mut self, name: &str) -> bool {
        let Some(height) = self.names.get(name).and_then(|heights| heights.last().copied()) else { return false };
        match self.all.get_mut(&(height, name.to_owned())) {
            Some(bookmark) if !bookmark.kept => {
                bookmark.kept = true;
                self.kept += 1;
                true
            }
            _ => false,
        }
    }

    /// Lets all of this name go; false if none was pinned.
    pub(super) fn release(&mut self, name: &str) -> bool {
        let before = self.kept;
        for height in self.names.get(name).into_iter().flatten() {
            if let Some(bookmark) = self.all.get_mut(&(*height, name.to_owned())).filter(|bookmark| bookmark.kept) {
                bookmark.kept = false;
                self.kept -= 1;
            }
        }
        self.kept < before
    }

    fn remove(&mut self, key: &(u64, String)) {
        let Some(bookmark) = self.all.remove(key) else { return };
        self.kept -= usize::from(bookmark.kept);
        if let Some(heights) = self.names.get_mut(&key.1) {
            heights.retain(|height| *height != key.0);
            if heights.is_empty() {
                self.names.remove(&key.1);
            }
        }
    }

    fn remove_all(&mut self, keys: Vec<(u64, String)>) {
        keys.iter().for_each(|key| self.remove(key));
    }

    /// The oldest that is not pinned goes.
    pub(super) fn drop_oldest(&mut self) {
        let oldest = self.all.values().find(|bookmark| !bookmark.kept);
        if let Some(key) = oldest.map(|bookmark| (bookmark.height, bookmark.name.clone())) {
            self.remove(&key);
        }
    }

    /// Those below go.
    pub(super) fn cut_below(&mut self, height: u64) {
        let keys = self.all.range(..(height, String::new())).map(|(key, _)| key.clone()).collect();
        self.remove_all(keys);
    }

    /// Those above go.
    pub(super) fn cut_above(&mut self, height: u64) {
        let keys = self.all.range((height.saturating_add(1), String::new())..).map(|(key, _)| key.clone()).collect();
        self.remove_all(keys);
    }

    /// Names that `name` may have been meant to be, the likeliest first.
    pub(super) fn close_names(&self, name: &str, most: usize) -> Vec<String> {
        let wanted = name.to_ascii_lowercase();
        let mut close: Vec<(usize, &String)> = self
            .names
            .keys()
            .filter_map(|have| {
                let lower = have.to_ascii_lowercase();
                let inside = wanted.len() >= 3 && (lower.contains(&wanted) || wanted.contains(&lower));
                let distance = distance(&lower, &wanted);
                (inside || distance <= 1 + wanted.len() / 4).then_some((distance, have))
            })
            .collect();
        close.sort();
        close.into_iter().take(most).map(|(_, name)| name.clone()).collect()
    }
}

/// Letters to insert, remove or replace.
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_between_words() {
        for (a, b, expected) in
            [("", "", 0), ("a", "", 1), ("abc", "abd", 1), ("abc", "bc", 1), ("kitten", "sitting", 3)]
        {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }

    #[test]
    fn names_that_were_meant() {
        let mut bookmarks = Bookmarks::default();
        for (height, name) in [(8, "before-upgrade"), (16, "Nightly"), (24, "after-upgrade"), (32, "x")] {
            let consistency = Consistency::Crash;
            bookmarks.add(Bookmark { height, time_ns: 0, name: name.into(), consistency, kept: false });
        }
        assert_eq!(bookmarks.close_names("nightly", 5), ["Nightly"]);
        assert_eq!(bookmarks.close_names("before-upgrad", 5), ["before-upgrade"]);
        assert_eq!(bookmarks.close_names("upgrade", 5), ["after-upgrade", "before-upgrade"]);
        assert!(bookmarks.close_names("zzzzz", 5).is_empty());
    }
}
