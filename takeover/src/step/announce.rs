//! Telling the neighbours: ARP for IPv4, neighbour advertisements for IPv6. Sent here, because no program for both is
//! installed everywhere.

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ARP_FRAME_BYTES: usize = 42;
const REQUEST: u8 = 1;
const REPLY: u8 = 2;
/// ARPHRD_ETHER: on other links nobody asks for hardware addresses.
const ETHERNET: u16 = 1;
/// A switch may lose one.
const ROUNDS: u32 = 3;
const ROUND_PAUSE: Duration = Duration::from_millis(100);
/// RFC 5227 waits longer; this is time in which the business is down.
const PROBE_WAIT: Duration = Duration::from_millis(250);

/// A hardware address.
pub(super) type Mac = [u8; 6];

fn link(interface: &str) -> io::Result<Option<(LinkAddr, Mac)>> {
    let mut found = getifaddrs()?.filter(|entry| entry.interface_name == interface);
    let address = found.find_map(|entry| entry.address?.as_link_addr().copied());
    let address = address.ok_or_else(|| io::Error::other(format!("there is no interface {interface}")))?;
    Ok(address.addr().filter(|_| address.hatype() == ETHERNET).map(|mac| (address, mac)))
}

fn packets(address: &LinkAddr) -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
    bind(fd.as_raw_fd(), address)?;
    Ok(fd)
}

/// An Ethernet frame with an ARP packet.
fn arp(operation: u8, to: Mac, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> [u8; ARP_FRAME_BYTES] {
    let mut frame = [0; ARP_FRAME_BYTES];
    let parts: [&[u8]; 9] = [
        &to,
        &sender.0,
        &ETHERTYPE_ARP,
        // Ethernet, IPv4, lengths of both.
        &[0, 1, 8, 0, 6, 4, 0, operation],
        &sender.0,
        &sender.1.octets(),
        &target.0,
        &target.1.octets(),
        &[],
    ];
    let mut at = 0;
    for part in parts {
        frame[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    frame
}

/// The sender of an ARP packet, if that is one.
fn sender(frame: &[u8]) -> Option<(Mac, Ipv4Addr)> {
    if frame.len() < ARP_FRAME_BYTES || frame[12..14] != ETHERTYPE_ARP || frame[14..20] != [0, 1, 8, 0, 6, 4] {
        return None;
    }
    let ip: [u8; 4] = frame[28..32].try_into().ok()?;
    Some((frame[22..28].try_into().ok()?, ip.into()))
}

/// Whether somebody else on the link answers for an address: asked three times. `go_on` ends it early.
pub(super) fn who_has(
    interface: &str,
    address: Ipv4Addr,
    go_on: &mut dyn FnMut() -> bool,
) -> io::Result<Option<String>> {
    let Some((link, mac)) = link(interface)? else { return Ok(None) };
    let fd = packets(&link)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(0, 20_000))?;
    // Asked without a sender's address: nobody's cache may change by asking.
    let question = arp(REQUEST, BROADCAST, (mac, Ipv4Addr::UNSPECIFIED), ([0; 6], address));
    for _ in 0..ROUNDS {
        send(fd.as_raw_fd(), &question, MsgFlags::empty())?;
        let until = Instant::now() + PROBE_WAIT;
        while Instant::now() < until && go_on() {
            let mut frame = [0; 256];
            match recv(fd.as_raw_fd(), &mut frame, MsgFlags::empty()) {
                Ok(bytes) => match sender(&frame[..bytes.min(frame.len())]) {
                    Some((other, ip)) if ip == address && other != mac => return Ok(Some(show(other))),
                    _ => {}
                },
                Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(None)
}

fn show(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Tells everybody on the link that this interface has the address.
pub(super) fn announce(interface: &str, address: IpAddr) -> io::Result<String> {
    let Some((link, mac)) = link(interface)? else {
        return Ok(format!("{interface} is no Ethernet: nobody there has to be told"));
    };
    match address {
        IpAddr::V4(v4) => {
            let fd = packets(&link)?;
            // Some listen to questions only, some to answers only.
            let frames =
                [arp(REQUEST, BROADCAST, (mac, v4), ([0; 6], v4)), arp(REPLY, BROADCAST, (mac, v4), (BROADCAST, v4))];
            rounds(|| frames.iter().try_for_each(|frame| send(fd.as_raw_fd(), frame, MsgFlags::empty()).map(drop)))?;
        }
        IpAddr::V6(v6) => {
            let index = u32::try_from(link.ifindex()).map_err(io::Error::other)?;
            let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
            socket.set_multicast_if_v6(index)?;
            // What came over a router is not believed.
            socket.set_multicast_hops_v6(255)?;
            let scope = if v6.is_unicast_link_local() { index } else { 0 };
            socket.bind(&SocketAddrV6::new(v6, 0, 0, scope).into())?;
            let everybody = SocketAddrV6::new(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), 0, 0, index).into();
            let advertisement = advertisement(v6, mac);
            rounds(|| socket.send_to(&advertisement, &everybody).map(drop))?;
        }
    }
    Ok(format!("announced on {interface} as {}", show(mac)))
}

fn rounds<E: Into<io::Error>>(mut send: impl FnMut() -> Result<(), E>) -> io::Result<()> {
    for round in 0..ROUNDS {
        if round > 0 {
            std::thread::sleep(ROUND_PAUSE);
        }
        send().map_err(Into::into)?;
    }
    Ok(())
}

/// An unsolicited neighbour advertisement (RFC 4861) that overrides. The kernel puts in the checksum.
fn advertisement(address: Ipv6Addr, mac: Mac) -> [u8; 32] {
    let mut packet = [0; 32];
    packet[0] = 136;
    packet[4] = 0x20;
    packet[8..24].copy_from_slice(&address.octets());
    // Option: target link-layer address, one unit of eight bytes.
    packet[24..26].copy_from_slice(&[2, 1]);
    packet[26..32].copy_from_slice(&mac);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_they_are_made() {
        let (mac, ip) = ([2, 0, 0, 0, 0, 9], Ipv4Addr::new(192, 0, 2, 7));
        let frame = arp(REPLY, BROADCAST, (mac, ip), (BROADCAST, ip));
        assert_eq!(sender(&frame), Some((mac, ip)));
        assert_eq!(&frame[12..22], &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
        assert_eq!(sender(&frame[..41]), None);
        let mut other = frame;
        other[13] = 0;
        assert_eq!(sender(&other), None);
        assert_eq!(show(mac), "02:00:00:00:00:09");
    }
}
