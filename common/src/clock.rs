//! Times of a source's stream, where its clock may be set.

use crate::limits::CLOCK_SETBACK_NS_MIN;

/// Whether the source's clock was wrong and was set right between two times of its stream: within a layer they do not fall.
pub fn is_setback(before_ns: u64, then_ns: u64) -> bool {
    // Half, because what the source sets back at once may have gone on a little before it is seen here.
    then_ns.saturating_add(CLOCK_SETBACK_NS_MIN / 2) < before_ns
}

/// Whether its clock may have been set between two records that follow each other, back or on: canaries come every second. Then
/// they go in two frames, and are applied in two batches, for either is dated as a whole.
pub fn is_step(before_ns: u64, then_ns: u64) -> bool {
    is_setback(before_ns, then_ns) || is_setback(then_ns, before_ns)
}
