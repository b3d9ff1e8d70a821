//! What the campaign is made of: a load whose every sector can be traced to the write that made it, a database whose
//! acknowledged commits are known outside of it, jobs of fio that it judges itself, and a watch on what `varve status` claims.
//!
//! None of it shares code with the product: the model is a list of writes, and the judge reads devices.

mod checked;
mod commits;
mod load;
mod model;
mod watcher;

pub use checked::{Checked, Checking};
pub use commits::Commits;
pub use load::{Load, LoadVolume};
pub use model::{Deed, Image, Op, SECTOR, locate};
pub use watcher::{Client, Seen, Watcher};
