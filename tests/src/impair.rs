//! A bad line between the two sides: a forwarder of UDP datagrams that loses, delays, repeats and reorders them, has a
//! bandwidth and a bounded queue, goes dark one way or both, and changes under which address one side sees the other.
//!
//! What happens to a datagram is decided by [`Lane`], which is pure: the same seed gives the n-th datagram of a direction the
//! same dice, whatever the clock says. One thread does the rest.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::Seed;

/// The thread looks at least so often whether it is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const DATAGRAM_BYTES_MAX: usize = 65536;
/// Bytes under way in one direction; more are lost.
const UNDER_WAY_BYTES_MAX: usize = 64 << 20;
/// Addresses of the agent's side that are remembered.
const PEERS_MAX: usize = 256;
/// Datagrams taken from a socket before others get their turn.
const BURST: usize = 64;

/// What a line is like. The default is a perfect one.
#[derive(Debug, Clone, Copy, Default)]
pub struct Conditions {
    /// Part that is lost, 0 to 1.
    pub loss: f64,
    /// Part that comes twice.
    pub duplicate: f64,
    /// Part that is held back for [`Conditions::held`], so that others pass it.
    pub reorder: f64,
    /// How long these are held back.
    pub held: Duration,
    /// One way.
    pub latency: Duration,
    /// Added to it at random, at most; order is kept.
    pub jitter: Duration,
    /// Bytes a second; `None`: without limit.
    pub bytes_per_s: Option<u64>,
    /// What may wait for the bandwidth; more is lost.
    pub queue_bytes: u64,
}

impl Conditions {
    /// A line of so many bits a second with a queue of 64 KiB.
    pub fn bandwidth(bits_per_s: u64) -> Self {
        Conditions { bytes_per_s: Some(bits_per_s / 8), queue_bytes: 64 << 10, ..Self::default() }
    }
}

/// A direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the agent to the receiver.
    Up,
    /// From the receiver to the agent.
    Down,
}

/// What went through in one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Datagrams that came.
    pub datagrams: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Lost by chance or in the dark.
    pub lost: u64,
    /// Lost because the queue was full.
    pub overflowed: u64,
    /// Sent twice.
    pub duplicated: u64,
    /// Held back.
    pub reordered: u64,
}

/// One direction: decides. Time is an argument, counted from any moment.
#[derive(Debug)]
pub struct Lane {
    dice: StdRng,
    conditions: Conditions,
    dark: bool,
    /// When the bandwidth is free again.
    free_at: Duration,
    /// When the last one that was not held back arrives.
    last_due: Duration,
    tally: Tally,
}

impl Lane {
    /// A perfect one.
    pub fn new(seed: u64) -> Self {
        Lane {
            dice: StdRng::seed_from_u64(seed),
            conditions: Conditions::default(),
            dark: false,
            free_at: Duration::ZERO,
            last_due: Duration::ZERO,
            tally: Tally::default(),
        }
    }

    /// When a datagram that comes `now` arrives: never, once or twice.
    pub fn decide(&mut self, now: Duration, bytes: usize) -> [Option<Duration>; 2] {
        // Thrown for each datagram, needed or not: so the n-th one meets the same dice under all conditions.
        let [loss, duplicate, reorder, jitter]: [f64; 4] = std::array::from_fn(|_| self.dice.random());
        let at = self.conditions;
        self.tally.datagrams += 1;
        self.tally.bytes += bytes as u64;
        if self.dark || loss < at.loss {
            self.tally.lost += 1;
            return [None; 2];
        }
        let mut leaves = now;
        if let Some(rate) = at.bytes_per_s {
            let waits = self.free_at.saturating_sub(now);
            if waits.as_secs_f64() * rate as f64 + bytes as f64 > at.queue_bytes as f64 {
                self.tally.overflowed += 1;
                return [None; 2];
            }
            leaves = now + waits + Duration::from_secs_f64(bytes as f64 / rate as f64);
            self.free_at = leaves;
        }
        let mut due = (leaves + at.latency + at.jitter.mul_f64(jitter)).max(self.last_due);
        if reorder < at.reorder {
            self.tally.reordered += 1;
            due += at.held;
        } else {
            self.last_due = due;
        }
        let again = duplicate < at.duplicate;
        self.tally.duplicated += u64::from(again);
        [Some(due), again.then_some(due + at.held)]
    }
}

/// What the thread and the test share.
#[derive(Debug)]
struct Shared {
    lanes: [Lane; 2],
    to: SocketAddr,
    stop: bool,
    /// Rises when the receiver shall see the agent under a new address.
    agents_address: u64,
    /// Answers come from another address than the one that was asked.
    answers_from_elsewhere: bool,
}

/// Forwards until it is dropped.
#[derive(Debug)]
pub struct Impair {
    address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Impair {
    /// A perfect line to the receiver at `to`.
    #[track_caller]
    pub fn new(to: &str, seed: &Seed) -> Self {
        let near = socket();
        let address = near.local_addr().unwrap();
        let lanes = [Lane::new(seed.number()), Lane::new(!seed.number())];
        let to = to.parse().unwrap();
        let shared = Shared { lanes, to, stop: false, agents_address: 0, answers_from_elsewhere: false };
        let shared = Arc::new(Mutex::new(shared));
        let theirs = shared.clone();
        let thread = std::thread::spawn(move || Forwarder::new(near, theirs).run());
        Impair { address, shared, thread: Some(thread) }
    }

    /// Where the agent sends to.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// From now on the line is like this, both ways. What is under way arrives as it would have.
    pub fn set(&self, conditions: Conditions) {
        lock(&self.shared).lanes.iter_mut().for_each(|lane| lane.conditions = conditions);
    }

    /// Nothing passes any more, both ways; `false`: it does again.
    pub fn cut(&self, cut: bool) {
        lock(&self.shared).lanes.iter_mut().for_each(|lane| lane.dark = cut);
    }

    /// The same in one direction: a half-open line.
    pub fn cut_way(&self, way: Way, cut: bool) {
        lock(&self.shared).lanes[way as usize].dark = cut;
    }

    /// The receiver sees the agent under a new address: what a NAT does that has forgotten it. Answers to the old one go nowhere.
    pub fn move_agent(&self) {
        lock(&self.shared).agents_address += 1;
    }

    /// The receiver is somewhere else now.
    #[track_caller]
    pub fn move_receiver(&self, to: &str) {
        lock(&self.shared).to = to.parse().unwrap();
    }

    /// The agent sees the receiver's answers come from an address that it never asked (and that nobody should believe).
    pub fn answer_from_elsewhere(&self, elsewhere: bool) {
        lock(&self.shared).answers_from_elsewhere = elsewhere;
    }

    /// What went through so far.
    pub fn tally(&self, way: Way) -> Tally {
        lock(&self.shared).lanes[way as usize].tally
    }
}

impl Drop for Impair {
    fn drop(&mut self) {
        lock(&self.shared).stop = true;
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if ended.is_err() {
                crate::complain("the thread of the line panicked");
            }
        }
    }
}

fn socket() -> UdpSocket {
    use nix::sys::socket::{setsockopt, sockopt};
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    // As much as the machine allows.
    let _ = setsockopt(&socket, sockopt::RcvBuf, &(4 << 20));
    let _ = setsockopt(&socket, sockopt::SndBuf, &(4 << 20));
    socket.set_nonblocking(true).unwrap();
    socket
}

/// A datagram under way; ordered by when it arrives, then by when it came.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct UnderWay {
    due: Duration,
    number: u64,
    way: bool,
    agent: SocketAddr,
    bytes: Vec<u8>,
}

/// The thread.
struct Forwarder {
    /// What the agent sends to, and what answers come from when they come from elsewhere.
    near: [UdpSocket; 2],
    far: HashMap<SocketAddr, UdpSocket>,
    agents_address: u64,
    shared: Arc<Mutex<Shared>>,
    heap: BinaryHeap<Reverse<UnderWay>>,
    heap_bytes: [usize; 2],
    number: u64,
    begun: Instant,
    buffer: Vec<u8>,
}

impl Forwarder {
    fn new(near: UdpSocket, shared: Arc<Mutex<Shared>>) -> Self {
        Forwarder {
            near: [near, socket()],
            far: HashMap::new(),
            agents_address: 0,
            shared,
            heap: BinaryHeap::new(),
            heap_bytes: [0; 2],
            number: 0,
            begun: Instant::now(),
            buffer: vec![0; DATAGRAM_BYTES_MAX],
        }
    }

    fn run(&mut self) {
        loop {
            let agents_address = {
                let shared = lock(&self.shared);
                if shared.stop {
                    return;
                }
                shared.agents_address
            };
            if agents_address != self.agents_address {
                self.agents_address = agents_address;
                self.far.clear();
            }
            self.wait();
            self.take();
            self.deliver();
        }
    }

    fn wait(&self) {
        let due = self.heap.peek().map_or(Duration::MAX, |Reverse(next)| next.due);
        let left = due.saturating_sub(self.begun.elapsed()).min(LOOK_EVERY);
        // Rounded up: a millisecond late is jitter, early would be a busy loop.
        let millis = u16::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        let sockets = self.far.values().chain([&self.near[0]]);
        let mut polled: Vec<PollFd> = sockets.map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        // A signal or a socket's error: looked at again at once.
        let _ = poll(&mut polled, PollTimeout::from(millis));
    }

    fn take(&mut self) {
        for _ in 0..BURST {
            let Ok((length, agent)) = self.near[0].recv_from(&mut self.buffer) else { break };
            self.came(Way::Up, agent, length);
        }
        let agents: Vec<SocketAddr> = self.far.keys().copied().collect();
        for agent in agents {
            for _ in 0..BURST {
                let Ok(length) = self.far[&agent].recv(&mut self.buffer) else { break };
                self.came(Way::Down, agent, length);
            }
        }
    }

    fn came(&mut self, way: Way, agent: SocketAddr, length: usize) {
        let now = self.begun.elapsed();
        let arrivals = lock(&self.shared).lanes[way as usize].decide(now, length);
        for due in arrivals.into_iter().flatten() {
            if self.heap_bytes[way as usize] + length > UNDER_WAY_BYTES_MAX {
                lock(&self.shared).lanes[way as usize].tally.overflowed += 1;
                continue;
            }
            self.heap_bytes[way as usize] += length;
            self.number += 1;
            let (number, bytes) = (self.number, self.buffer[..length].to_vec());
            self.heap.push(Reverse(UnderWay { due, number, way: way == Way::Up, agent, bytes }));
        }
    }

    fn deliver(&mut self) {
        let now = self.begun.elapsed();
        while self.heap.peek().is_some_and(|Reverse(next)| next.due <= now) {
            let Some(Reverse(next)) = self.heap.pop() else { break };
            let (to, elsewhere) = {
                let shared = lock(&self.shared);
                (shared.to, shared.answers_from_elsewhere)
            };
            // A datagram that nobody takes is lost, as on any line.
            if next.way {
                self.heap_bytes[Way::Up as usize] -= next.bytes.len();
                assert!(self.far.len() < PEERS_MAX, "too many addresses of one agent");
                let far = self.far.entry(next.agent).or_insert_with(socket);
                let _ = far.send_to(&next.bytes, to);
            } else {
                self.heap_bytes[Way::Down as usize] -= next.bytes.len();
                let _ = self.near[usize::from(elsewhere)].send_to(&next.bytes, next.agent);
            }
        }
    }
}

#[cfg(test)]
#[path = "impair_tests.rs"]
mod tests;
