//! Configuration files: any text is refused with words or gives numbers within their ranges; a file that is written
//! again means the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::time::Duration;
use varve_common::config::{AgentConfig, AgentFile, ReceiverConfig, ReceiverFile};
use varve_common::limits::{RING_BYTES_MAX, RING_BYTES_MIN};
use varve_common::problem::{Problem, ProblemKind};

fn refused(problem: &Problem) {
    assert_eq!(problem.kind, ProblemKind::Usage);
    assert!(problem.what.starts_with("f.toml") && !problem.why.is_empty() && !problem.next.is_empty());
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match AgentConfig::parse("f.toml", text) {
        Ok(config) => {
            let ring = u64::from(config.ring_bytes);
            assert!(ring.is_power_of_two() && (RING_BYTES_MIN..=RING_BYTES_MAX).contains(&ring));
            assert!((Duration::from_millis(100)..=Duration::from_secs(86_400)).contains(&config.lagging_after));
            let file: AgentFile = toml::from_str(text).expect("it was understood");
            let again = toml::to_string(&file).expect("plain data");
            assert_eq!(AgentConfig::parse("f.toml", &again).expect("our own words"), config);
        }
        Err(problem) => refused(&problem),
    }
    match ReceiverConfig::parse("f.toml", text) {
        Ok(config) => {
            assert!(((8 << 20)..=(1024 << 20)).contains(&config.landing_segment_bytes));
            assert!(config.landing_bytes_max >= 4 * config.landing_segment_bytes);
            let file: ReceiverFile = toml::from_str(text).expect("it was understood");
            let again = toml::to_string(&file).expect("plain data");
            assert_eq!(ReceiverConfig::parse("f.toml", &again).expect("our own words"), config);
        }
        Err(problem) => refused(&problem),
    }
});
