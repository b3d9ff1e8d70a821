//! What the tests of the program share: an installation in a temporary directory, daemons that say what a test wants,
//! and the program itself.
#![allow(dead_code, reason = "each test file uses its part")]

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use varve_common::control::PointReply;
use varve_common::paths::Paths;
use varve_takeover::{Commands, Context, Device, Mode, Outcome, Plan, Runner, Tools};

/// What a fake daemon does with one request.
pub enum Step {
    /// One line of the answer.
    Line(Value),
    /// Bytes that are no line.
    Raw(&'static [u8]),
    /// Nothing for a while.
    Wait(Duration),
}

pub fn done(answer: Value) -> Vec<Step> {
    vec![Step::Line(json!({ "done": answer }))]
}

pub fn problem(kind: &str, what: &str, why: &str, next: &str) -> Vec<Step> {
    vec![Step::Line(json!({ "problem": { "kind": kind, "what": what, "why": why, "next": next } }))]
}

pub fn progress(done_bytes: u64, total_bytes: u64) -> Step {
    let rate = 104_857_600.0;
    let left = (total_bytes - done_bytes) as f64 / rate;
    Step::Line(json!({ "progress": { "done_bytes": done_bytes, "total_bytes": total_bytes,
        "bytes_per_second": rate, "seconds_left": left } }))
}

/// A root with whatever a test puts there.
pub struct Root {
    dir: tempfile::TempDir,
}

/// What the program said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Said {
    /// The last line of standard output as JSON: the answer.
    #[track_caller]
    pub fn json(&self) -> Value {
        let line = self.out.lines().last().unwrap_or_else(|| panic!("no output: {self:?}"));
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Exactly three lines on standard error, this exit code, nothing of Rust in it.
    #[track_caller]
    pub fn problem(&self, code: i32, what: &str, why: &str, next: &str) {
        assert_eq!(self.code, code, "{self:?}");
        let lines: Vec<&str> = self.err.lines().collect();
        assert_eq!(lines.len(), 3, "{self:#?}");
        for (line, start, words) in [(0, "varve: ", what), (1, "  why:  ", why), (2, "  next: ", next)] {
            assert!(lines[line].starts_with(start) && lines[line].contains(words), "'{words}' in {:?}", lines[line]);
        }
        for rust in ["Err(", "Some(", "Os {", "os error", "panicked", "Problem {"] {
            assert!(!self.err.contains(rust), "{rust} in {self:?}");
        }
    }
}

impl Root {
    /// An empty one.
    pub fn new() -> Self {
        Root { dir: tempfile::tempdir().expect("a directory") }
    }

    /// One with an agent that has joined.
    pub fn production() -> Self {
        let root = Self::new();
        root.write("etc/varve/agent.toml", "receiver = \"127.0.0.1:7443\"\nname = \"db1\"\n");
        root
    }

    /// One with a receiver.
    pub fn recovery() -> Self {
        let root = Self::new();
        root.write("etc/varve/receiver.toml", "listen = \"127.0.0.1:0\"\n");
        root
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn paths(&self) -> Paths {
        Paths::new(self.path())
    }

    pub fn at(&self, relative: &str) -> PathBuf {
        self.path().join(relative)
    }

    pub fn write(&self, relative: &str, text: &str) {
        let path = self.at(relative);
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("made");
        std::fs::write(path, text).expect("written");
    }

    pub fn read(&self, relative: &str) -> String {
        std::fs::read_to_string(self.at(relative)).expect("read")
    }

    /// Answers every call at `name`'s socket; gives the requests.
    pub fn daemon(
        &self,
        name: &str,
        answer: impl Fn(&Value) -> Vec<Step> + Send + Sync + 'static,
    ) -> Arc<Mutex<Vec<Value>>> {
        let socket = self.at(&format!("run/varve/{name}.sock"));
        std::fs::create_dir_all(socket.parent().expect("a directory")).expect("made");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let asked: Arc<Mutex<Vec<Value>>> = Arc::default();
        let (record, answer) = (asked.clone(), Arc::new(answer));
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (record, answer) = (record.clone(), answer.clone());
                std::thread::spawn(move || serve(stream, &record, &*answer));
            }
        });
        asked
    }

    /// A socket that nobody serves any more, as a killed daemon leaves it.
    pub fn dead_socket(&self, name: &str) {
        let socket = self.at(&format!("run/varve/{name}.sock"));
        std::fs::create_dir_all(socket.parent().expect("a directory")).expect("made");
        drop(UnixListener::bind(&socket).expect("a socket"));
    }

    /// A daemon that takes calls and says nothing: stopped by a signal, or hanging.
    pub fn hanging(&self, name: &str) -> UnixListener {
        let socket = self.at(&format!("run/varve/{name}.sock"));
        std::fs::create_dir_all(socket.parent().expect("a directory")).expect("made");
        UnixListener::bind(&socket).expect("a socket")
    }

    /// Runs `varve` here, without a terminal.
    pub fn varve(&self, args: &[&str]) -> Said {
        self.varve_with(args, |command| {
            command.env("VARVE_ROOT", self.path());
        })
    }

    pub fn varve_with(&self, args: &[&str], prepare: impl FnOnce(&mut Command)) -> Said {
        let mut command = Command::new(env!("CARGO_BIN_EXE_varve"));
        command.args(args).env_remove("VARVE_ROOT").stdin(Stdio::null());
        prepare(&mut command);
        let output = command.output().expect("varve runs");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
        Said { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }
}

/// The group's plan is run for real.
pub fn run_plan_of(root: &Root, group: &str) {
    let context = Context {
        group: group.to_owned(),
        point: PointReply::default(),
        devices: vec![Device { volume: "/dev/vdb".into(), device: PathBuf::from("/dev/null"), bytes: 1 << 30 }],
        mode: Mode::Live,
        paths: root.paths(),
        began: SystemTime::now(),
        tools: Tools::default(),
        commands: Commands { resume: "resume".into(), undo: "undo".into(), undo_plan: "undo plan".into() },
    };
    let plan = Plan::load(root.paths().takeover_plan(group)).expect("a plan");
    let report = Runner::new(plan, context).expect("it fits").run(&mut |_| {}).expect("begun");
    assert_eq!(report.outcome, Outcome::Done, "{report}");
}

fn serve(stream: UnixStream, record: &Mutex<Vec<Value>>, answer: &dyn Fn(&Value) -> Vec<Step>) {
    let mut line = String::new();
    let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
    reader.read_line(&mut line).expect("a request");
    let Ok(request) = serde_json::from_str::<Value>(&line) else { return };
    record.lock().expect("not poisoned").push(request.clone());
    let mut stream = stream;
    for step in answer(&request) {
        let sent = match step {
            Step::Line(value) => stream.write_all(format!("{value}\n").as_bytes()),
            Step::Raw(bytes) => stream.write_all(bytes),
            Step::Wait(time) => {
                std::thread::sleep(time);
                Ok(())
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

/// A status of one daemon with the groups given.
pub fn status(daemon: &str, groups: Vec<Value>) -> Value {
    json!({ "groups": groups, "daemons": [{ "daemon": daemon, "version": env!("CARGO_PKG_VERSION"),
        "address": "127.0.0.1:7443", "name": "db1", "rss_bytes": 1048576, "hosts_connected": null }] })
}

/// A protected group.
pub fn group(name: &str, role: &str) -> Value {
    json!({ "name": name, "role": role, "link": "streaming", "data": "protected", "reason": null,
        "gap_reason": null, "epoch": 1, "rpo_seconds": 0.5, "lag_bytes": 4096, "captured": "abababab:4096",
        "durable": "abababab:0", "applied": "abababab:0",
        "window": { "from": null, "to": "2026-11-20T14:03:22.512345Z" }, "gaps": [],
        "volumes": [{ "path": "/dev/vdb", "bytes": 1073741824, "replica": "/srv/db-0.img" }],
        "resync": null, "verify": null, "ring": null, "journal": null, "history": null, "alerts": [], "watch": null,
        "counters": { "frames_sent": 7 } })
}

/// A daemon that knows the groups given and nothing else.
pub fn knows(daemon: &'static str, groups: Vec<Value>) -> impl Fn(&Value) -> Vec<Step> {
    move |request| {
        let wanted = &request["group"];
        let known = groups.iter().any(|group| group["name"] == *wanted);
        if !wanted.is_null() && !known {
            return problem("not-found", &format!("there is no group {wanted}"), "it is not here", "varve status");
        }
        if request["command"] == "status" {
            let found = groups.iter().filter(|group| wanted.is_null() || group["name"] == *wanted);
            return done(status(daemon, found.cloned().collect()));
        }
        done(Value::Null)
    }
}
