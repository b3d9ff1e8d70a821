//! Why history cannot be written or read.

use std::path::PathBuf;
use varve_common::format::FormatError;
use varve_io::IoError;

/// See the module's text. Each says which file; a damaged one never passes for whole.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// The disk refused.
    #[error("{}", .0.chain())]
    Io(#[from] IoError),
    /// A file is not what it should be.
    #[error("{}: {source}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: FormatError,
    },
    /// Bytes in a file that was whole once.
    #[error("{}: damaged at byte {offset}: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What was found.
        what: String,
    },
    /// A file that history needs is not there.
    #[error("{} is missing", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The point is older than everything that is kept.
    #[error("history begins at height {begin}")]
    Expired {
        /// The oldest height that can be read.
        begin: u64,
    },
    /// A limit of [`crate::limits`].
    #[error("{what} would exceed its limit of {limit}")]
    Limit {
        /// What.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The group was forgotten.
    #[error("the group was forgotten meanwhile")]
    Retired,
    /// A range that was asked for.
    #[error("{bytes} bytes at byte {start} are not whole sectors of a volume")]
    Range {
        /// First byte.
        start: u64,
        /// Length.
        bytes: u64,
    },
    /// A height that does not follow what is there already.
    #[error("{what}, {found}, does not follow {after}")]
    Order {
        /// What of.
        what: &'static str,
        /// The height.
        found: u64,
        /// What it has to follow.
        after: u64,
    },
}
