//! Lines of the local sockets, both directions: what is understood comes out the same when it is written and read again,
//! and fits one line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde::{Serialize, de::DeserializeOwned};
use std::fmt::Debug;
use varve_common::control::{
    AgentRequest, BookmarkReply, HostsReply, InviteReply, ProtectReply, ReceiverRequest, Reply, StatusReply,
    VerifyReply,
};

fn round_trip<T: Serialize + DeserializeOwned + PartialEq + Debug>(line: &[u8]) {
    let Ok(value) = serde_json::from_slice::<T>(line) else { return };
    let again = serde_json::to_vec(&value).expect("plain data");
    assert!(!again.contains(&b'\n'), "one line");
    assert_eq!(serde_json::from_slice::<T>(&again).expect("our own words"), value);
}

fuzz_target!(|data: &[u8]| {
    round_trip::<AgentRequest>(data);
    round_trip::<ReceiverRequest>(data);
    round_trip::<Reply<StatusReply>>(data);
    round_trip::<Reply<ProtectReply>>(data);
    round_trip::<Reply<BookmarkReply>>(data);
    round_trip::<Reply<VerifyReply>>(data);
    round_trip::<Reply<InviteReply>>(data);
    round_trip::<Reply<HostsReply>>(data);
    round_trip::<Reply<()>>(data);
});
