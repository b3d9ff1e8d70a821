//! Addresses, as the neighbours see them: the other end of the link is a host of its own.
#![allow(clippy::unwrap_used, reason = "a test's broken assumption is a panic with a line number")]

mod support;

use std::io::{Read, Write};
use std::time::Duration;
use support::{Host, on_a_host_of_its_own, outcomes, quiet};
use varve_takeover::{Mode, Outcome};
use varve_tests::{run_ok, wait_until};

/// Puts `v1` into another network namespace that is held by a process; gives its id.
struct Neighbour(std::process::Child);

impl Neighbour {
    fn new() -> Self {
        let child = std::process::Command::new("unshare").args(["-n", "sleep", "1020"]).spawn().unwrap();
        let neighbour = Self(child);
        let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        wait_until(Duration::from_secs(5), "the neighbour's network", || {
            std::fs::read_link(format!("/proc/{}/ns/net", neighbour.0.id())).is_ok_and(|its| its != own)
        });
        run_ok("ip", &["link", "set", "v1", "netns", &neighbour.0.id().to_string()]);
        neighbour.run(&["ip", "link", "set", "v1", "up"]);
        neighbour.run(&["ip", "address", "add", "192.0.2.1/24", "dev", "v1"]);
        neighbour.run(&["ip", "address", "add", "2001:db8::1/64", "dev", "v1", "nodad"]);
        neighbour
    }

    fn run(&self, words: &[&str]) -> String {
        let target = self.0.id().to_string();
        run_ok("nsenter", &[&["-t", &target, "-n"], words].concat())
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn plan(address: &str, more: &str) -> String {
    format!(
        "version = 1\n[[step]]\nname = \"ip\"\nkind = \"address\"\ninterface = \"v0\"\naddress = \"{address}\"\n{more}"
    )
}

#[test]
fn the_neighbours_are_told_and_an_address_in_use_is_not_taken() {
    on_a_host_of_its_own(|| {
        let host = Host::new("arp");
        let neighbour = Neighbour::new();
        run_ok("ip", &["address", "add", "192.0.2.2/24", "dev", "v0"]);
        let before = host.seen();
        let mac = run_ok("ip", &["-brief", "link", "show", "v0"]).split_whitespace().nth(2).unwrap().to_owned();
        for (address, entry) in [("192.0.2.10", "192.0.2.10/24"), ("2001:db8::10", "2001:db8::10/64")] {
            // Somebody else had it: the neighbour remembers his hardware address.
            neighbour.run(&[
                "ip",
                "neigh",
                "replace",
                address,
                "lladdr",
                "02:00:00:00:00:99",
                "dev",
                "v1",
                "nud",
                "reachable",
            ]);
            let report = host.runner(&plan(entry, ""), Mode::Live).run(&mut quiet).unwrap();
            assert_eq!(report.outcome, Outcome::Done, "{report}");
            assert!(report.steps[0].detail.contains(&format!("announced on v0 as {mac}")), "{report}");
            let entry = neighbour.run(&["ip", "neigh", "show", address]);
            assert!(entry.contains(&mac), "{entry}");
            host.undo(Mode::Live);
            host.assert_as(&before);
        }

        // The neighbour has it: it is not taken, and nothing is left.
        for (address, entry) in [("192.0.2.1", "192.0.2.1/24"), ("2001:db8::1", "2001:db8::1/64")] {
            let report = host.runner(&plan(entry, ""), Mode::Live).run(&mut quiet).unwrap();
            assert_eq!(outcomes(&report), ["ip failed"], "{report}");
            let why = &report.steps[0].detail;
            assert!(why.contains(&format!("answers for {address} on v0: the old owner still runs")), "{why}");
            assert!(report.problem.as_ref().unwrap().next.contains("if_taken"), "{report}");
            host.undo(Mode::Live);
            host.assert_as(&before);
        }

        // Unless the plan says so.
        let report = host.runner(&plan("192.0.2.1/24", "if_taken = \"take\""), Mode::Live).run(&mut quiet).unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
        host.undo(Mode::Live);

        // In a test nobody is asked and nobody is told.
        neighbour.run(&["ip", "neigh", "replace", "192.0.2.10", "lladdr", "02:00:00:00:00:99", "dev", "v1"]);
        let report = host.runner(&plan("192.0.2.10/24", ""), Mode::Test).run(&mut quiet).unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
        assert!(neighbour.run(&["ip", "neigh", "show", "192.0.2.10"]).contains("02:00:00:00:00:99"));
        host.undo(Mode::Test);
        host.assert_as(&before);

        let report = host.runner(&plan("192.0.2.9/24", "").replace("v0", "none"), Mode::Live).run(&mut quiet).unwrap();
        assert_eq!(outcomes(&report), ["ip failed"]);
        assert!(report.steps[0].output.as_ref().unwrap().contains("none"), "{report}");
        host.undo(Mode::Live);
        host.assert_as(&before);
    });
}

/// Nothing that ends by its time limit takes as long, on a busy machine either.
const LONG: f64 = 30.0;

#[test]
fn checks_wait_and_say_what_was_wrong() {
    on_a_host_of_its_own(|| {
        let host = Host::new("check");
        let before = host.seen();
        let check = |how: &str| {
            format!(
                "version = 1\n[[step]]\nname = \"c\"\nkind = \"check\"\ntimeout = \"600ms\"\nevery = \"50ms\"\n{how}"
            )
        };
        let try_it = |how: &str| {
            let report = host.runner(&check(how), Mode::Live).run(&mut quiet).unwrap();
            host.undo(Mode::Live);
            let step = report.steps[0].clone();
            (report.outcome == Outcome::Done, step.detail, step.output.unwrap_or_default(), report.seconds)
        };
        let (good, why, ..) = try_it("tcp = \"127.0.0.1:81\"");
        assert!(!good && why.contains("connection refused") && why.contains("times"), "{why}");
        let (good, why, ..) = try_it("tcp = \"no.such.host.invalid:81\"");
        assert!(!good && why.contains("no.such.host.invalid"), "{why}");
        let (good, why, output, _) = try_it("run = \"echo out; exit 7\"");
        assert!(!good && why.contains("exit code 7") && output == "out", "{why} {output}");
        assert!(try_it("run = \"[ -e @DIR@/bin ]\"").0);
        let (good, why, _, seconds) = try_it("run = [\"/bin/sleep\", \"1030\"]");
        assert!(!good && why.contains("took longer") && seconds < LONG, "{why}");

        // Servers that are no good: one says nothing, one is no web server, one has a fault, one never ends.
        let served = |answer: &'static [u8], stay: bool| {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let port = listener.local_addr().unwrap().port();
            listener.set_nonblocking(true).unwrap();
            let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
            let stopped = stop.clone();
            let server = std::thread::spawn(move || {
                let mut open = Vec::new();
                while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                    if let Ok((mut stream, _)) = listener.accept() {
                        stream.set_nonblocking(false).unwrap();
                        let _ = stream.read(&mut [0; 1024]);
                        let _ = stream.write_all(answer);
                        if stay {
                            open.push(stream);
                        }
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
            (port, move || {
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
                server.join().unwrap();
            })
        };
        let cases: [(&'static [u8], bool, &str, bool, &str); 8] = [
            (b"", true, "", false, "did not answer"),
            (b"SSH-2.0-x\r\n", false, "", false, "not with HTTP"),
            (b"HTTP/1.1 503 No\r\n\r\nmaintenance", false, "", false, "status 503 and not 200"),
            (b"HTTP/1.1 503 No\r\n\r\nmaintenance", false, "status = 503\ntext = \"maint\"", true, ""),
            (b"HTTP/1.1 200 OK\r\n\r\nhello", false, "text = \"hello\"", true, ""),
            (b"HTTP/1.1 200 OK\r\n\r\nhello", false, "text = \"world\"", false, "did not contain 'world'"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", true, "text = \"hello\"", true, ""),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", true, "", false, "did not answer"),
        ];
        for (answer, stay, more, wanted, words) in cases {
            let (port, stop) = served(answer, stay);
            let (good, why, _, seconds) = try_it(&format!("http = \"http://127.0.0.1:{port}/x\"\n{more}"));
            stop();
            assert_eq!(good, wanted, "{}: {why}", String::from_utf8_lossy(answer));
            assert!(why.contains(words), "{}: {why}", String::from_utf8_lossy(answer));
            assert!(seconds < LONG, "{seconds}");
        }
        host.assert_as(&before);
    });
}
