//! IP addresses: asked for, put on an interface, announced to the neighbours.

use super::announce;
use super::{Found, StepError, Work};
use crate::process;
use serde::Deserialize;
use std::net::IpAddr;
use std::time::Duration;

/// In a bubble there is no other interface; programs inside reach the address all the same.
const INSIDE: &str = "lo";
const TENTATIVE_PAUSE: Duration = Duration::from_millis(50);

#[derive(Deserialize)]
struct Interface {
    #[serde(default)]
    addr_info: Vec<Address>,
}

#[derive(Deserialize)]
struct Address {
    #[serde(default)]
    local: String,
    #[serde(default)]
    prefixlen: u8,
    #[serde(default)]
    tentative: bool,
    #[serde(default)]
    dadfailed: bool,
}

/// Where the address goes.
pub(super) fn place<'a>(work: &Work<'_>, interface: &'a str) -> &'a str {
    if work.test { INSIDE } else { interface }
}

/// Whether this host has the interface.
pub(crate) fn is_there(interface: &str) -> bool {
    nix::net::if_::if_nametoindex(interface).is_ok()
}

fn bits(work: &Work<'_>, address: IpAddr, prefix: u8) -> u8 {
    match (work.test, address) {
        (false, _) => prefix,
        (true, IpAddr::V4(_)) => 32,
        (true, IpAddr::V6(_)) => 128,
    }
}

fn listed(work: &Work<'_>, interface: &str) -> Result<Vec<Address>, StepError> {
    let text = process::tool(work, &["ip", "-json", "address", "show", "dev", interface])?;
    let interfaces: Vec<Interface> = serde_json::from_str(&text)
        .map_err(|error| StepError::new(format!("the answer of ip is not understood: {error}")))?;
    Ok(interfaces.into_iter().flat_map(|interface| interface.addr_info).collect())
}

fn find(work: &Work<'_>, address: IpAddr, prefix: u8, interface: &str) -> Result<Option<Address>, StepError> {
    let prefix = bits(work, address, prefix);
    let is_it = |there: &Address| there.prefixlen == prefix && there.local.parse() == Ok(address);
    Ok(listed(work, interface)?.into_iter().find(is_it))
}

pub(super) fn probe(work: &Work<'_>, address: IpAddr, prefix: u8, interface: &str) -> Result<Found, StepError> {
    let good = find(work, address, prefix, interface)?.is_some_and(|there| !there.dadfailed);
    Ok(if good { Found::Yes } else { Found::No })
}

pub(super) fn apply(
    work: &Work<'_>,
    address: IpAddr,
    prefix: u8,
    interface: &str,
    announce: bool,
    take_from_others: bool,
) -> Result<String, StepError> {
    let place = place(work, interface);
    let with_bits = format!("{address}/{}", bits(work, address, prefix));
    let ask_others = !work.test && !take_from_others;
    if ask_others && let IpAddr::V4(v4) = address {
        let taken = announce::who_has(interface, v4, &mut || !work.is_cancelled() && !work.time_left().is_zero());
        if let Some(mac) = taken.map_err(|error| StepError::new(format!("asking for {address}: {error}")))? {
            return Err(taken_by_others(address, interface, &format!("the host with the MAC address {mac}")));
        }
    }
    let mut words = vec!["ip", "address", "add", &with_bits, "dev", place];
    if !ask_others && address.is_ipv6() {
        words.push("nodad");
    }
    process::tool(work, &words)?;
    // IPv6 asks by itself, for a second or so; until then the address cannot be used.
    while let Some(there) = find(work, address, prefix, place)? {
        if there.dadfailed {
            let _ = process::tool(work, &["ip", "address", "delete", &with_bits, "dev", place]);
            return Err(taken_by_others(address, interface, "another host"));
        }
        if !there.tentative {
            break;
        }
        if !work.pause(TENTATIVE_PAUSE) {
            return Err(StepError::new(format!("{address} is still being asked for on {interface}"))
                .with_next(format!("is {interface} connected? ip link show dev {interface}")));
        }
    }
    if work.test || !announce {
        return Ok(String::new());
    }
    announce::announce(interface, address)
        .map_err(|error| StepError::new(format!("{address} is there, but could not be announced: {error}")))
}

fn taken_by_others(address: IpAddr, interface: &str, who: &str) -> StepError {
    StepError::new(format!("{who} answers for {address} on {interface}: the old owner still runs"))
        .with_next("stop it or take its address away; if_taken = \"take\" in the plan takes the address all the same")
}

pub(super) fn undo(work: &Work<'_>, address: IpAddr, prefix: u8, interface: &str) -> Result<String, StepError> {
    let place = place(work, interface);
    if !is_there(place) {
        return Ok(format!("{interface} is gone"));
    }
    if find(work, address, prefix, place)?.is_none() {
        return Ok(String::new());
    }
    let with_bits = format!("{address}/{}", bits(work, address, prefix));
    process::tool(work, &["ip", "address", "delete", &with_bits, "dev", place]).map(|_| String::new())
}
