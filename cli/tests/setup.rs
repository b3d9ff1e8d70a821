//! `receiver init`, `join` (against a real receiver's endpoint) and `doctor`: what they make, and what they refuse.

mod fake;

use fake::{Root, Said, done, group, knows, problem};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use varve_net::endpoint::{Server, serve_join};
use varve_net::hosts::Hosts;
use varve_net::identity::{Authority, HostIdentity};
use varve_net::token::JoinToken;

#[test]
fn receiver_init_makes_a_receiver_once() {
    let root = Root::new();
    let said = root.varve(&["receiver", "init", "--listen", "127.0.0.1:17443", "--name", "backup"]);
    assert_eq!((said.code, said.err.as_str()), (0, ""));
    assert!(said.out.starts_with("receiver 'backup' is set up\n  listens on     UDP 127.0.0.1:17443\n"), "{said:?}");
    let dir = root.path().display();
    assert!(
        said.out.ends_with(&format!("next:\n  VARVE_ROOT={dir} varve-receiver\n  varve host invite NAME\n")),
        "{said:?}"
    );
    let config = root.read("etc/varve/receiver.toml");
    let config = varve_common::config::ReceiverConfig::parse("receiver.toml", &config).expect("the daemon reads it");
    assert_eq!((config.name.as_str(), config.listen.to_string().as_str()), ("backup", "127.0.0.1:17443"));
    let before = Authority::open(&root.at("etc/varve/receiver")).expect("an authority").fingerprint();
    assert!(root.at("var/lib/varve/receiver").is_dir());
    for (path, mode) in [("etc/varve", 0o700), ("etc/varve/receiver", 0o700), ("etc/varve/receiver/ca.key", 0o600)] {
        let found = std::fs::metadata(root.at(path)).expect(path).permissions().mode() & 0o777;
        assert_eq!(found, mode, "{path} is {found:o}");
    }

    let said = root.varve(&["receiver", "init", "--listen", "127.0.0.1:9"]);
    said.problem(3, "is set up as a receiver already", "would lock out every host", "move it and");
    let after = Authority::open(&root.at("etc/varve/receiver")).expect("an authority").fingerprint();
    assert_eq!(before, after);
}

/// Cut off between identity and configuration: the next init goes on, with the same identity.
#[test]
fn receiver_init_that_was_cut_off() {
    let root = Root::new();
    let authority = Authority::create(&root.at("etc/varve/receiver"), "backup").expect("made");
    let said = root.varve(&["receiver", "init", "--name", "backup", "--json"]);
    assert_eq!(said.code, 0, "{said:?}");
    let answer = said.json();
    let hex: String = authority.fingerprint().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(answer["ca_fingerprint"], hex);
    assert_eq!(answer["name"], "backup");
    assert!(answer["listen"].as_str().is_some_and(|listen| listen.ends_with(":7443")), "{answer}");
    for path in ["config", "identity", "state"] {
        assert!(std::path::Path::new(answer[path].as_str().expect("a path")).exists(), "{path}");
    }
}

#[test]
fn receiver_init_where_nothing_can_be_written() {
    let root = Root::new();
    root.write("etc", "a file is in the way");
    root.varve(&["receiver", "init"]).problem(1, "etc", "not a directory", "check the path");
}

/// A real receiver: its authority, registry and endpoint, serving joins only.
struct Receiver {
    root: Root,
    hosts: Arc<Hosts>,
    authority: Arc<Authority>,
    address: String,
    _runtime: tokio::runtime::Runtime,
}

impl Receiver {
    fn start() -> Self {
        let root = Root::new();
        let authority = Arc::new(Authority::create(&root.at("ca"), "backup").expect("made"));
        let hosts = Arc::new(Hosts::open(root.at("hosts.json")).expect("a registry"));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runs");
        let server = {
            let _inside = runtime.enter();
            Server::bind("127.0.0.1:0".parse().expect("an address"), &authority, hosts.clone()).expect("bound")
        };
        let address = server.local_addr().expect("bound").to_string();
        let (ca, registry) = (authority.clone(), hosts.clone());
        runtime.spawn(async move {
            while let Some(accepted) = server.accept().await {
                // What it says of a refused one is for the receiver's log.
                let _ = serve_join(&accepted, &ca, &registry).await;
            }
        });
        Receiver { root, hosts, authority, address, _runtime: runtime }
    }

    fn token(&self, name: &str, ttl: Duration, now: SystemTime) -> String {
        let secret = self.hosts.invite(name, ttl, now).expect("invited");
        JoinToken { ca_fingerprint: self.authority.fingerprint(), secret, name: name.to_owned() }.encode()
    }

    fn fresh_token(&self, name: &str) -> String {
        self.token(name, Duration::from_secs(60), SystemTime::now())
    }
}

fn join(root: &Root, address: &str, token: &str, more: &[&str]) -> Said {
    root.varve(&[&["join", address, token], more].concat())
}

#[test]
fn join_enrols_this_host() {
    let receiver = Receiver::start();
    let root = Root::new();
    root.write("etc/varve/agent.toml", "# ours\nring_mib = 128\n");
    let said = join(&root, &receiver.address, &receiver.fresh_token("db1"), &[]);
    assert_eq!((said.code, said.err.as_str()), (0, ""), "{said:?}");
    assert!(said.out.starts_with(&format!("joined {} as 'db1'\n", receiver.address)), "{said:?}");
    let dir = root.path().display();
    assert!(
        said.out.ends_with(&format!("next:\n  VARVE_ROOT={dir} varve-agent\n  varve protect GROUP VOLUME...\n")),
        "{said:?}"
    );
    let identity = HostIdentity::load(&root.at("etc/varve/agent")).expect("an identity");
    assert_eq!(identity.name(), "db1");
    assert_eq!(receiver.hosts.list()[0].fingerprint, identity.fingerprint());
    let expected = format!("# ours\nring_mib = 128\nreceiver = \"{}\"\nname = \"db1\"\n", receiver.address);
    assert_eq!(root.read("etc/varve/agent.toml"), expected);
    assert!(receiver.root.at("ca/ca.pem").exists());

    // A second time: refused, unless that is meant; and then a token is needed that was not used.
    let other = receiver.fresh_token("db2");
    let said = join(&root, &receiver.address, &other, &[]);
    said.problem(3, "has joined already", &format!("at {} as 'db1'", receiver.address), "--force");
    let asked = root.daemon("agent", |_| done(Value::Null));
    let answer = join(&root, &receiver.address, &other, &["--force", "--json"]).json();
    assert_eq!((&answer["name"], &answer["agent"]), (&json!("db2"), &json!("reloaded")));
    assert_eq!(asked.lock().expect("fine")[0], json!({"command": "reload"}));
    assert_eq!(HostIdentity::load(&root.at("etc/varve/agent")).expect("an identity").name(), "db2");
    let said = join(&root, &receiver.address, &other, &["--force"]);
    said.problem(3, "the receiver at", "", "a token works once");
}

#[test]
fn join_with_a_running_agent_that_cannot_reload() {
    let receiver = Receiver::start();
    let root = Root::new();
    root.daemon("agent", |_| problem("failed", "not reloaded", "a reason", "something"));
    let said = join(&root, &receiver.address, &receiver.fresh_token("db1"), &[]);
    assert_eq!(said.code, 0, "it has joined: {said:?}");
    assert!(said.out.contains("could not load it: not reloaded (a reason)\nnext: restart varve-agent\n"), "{said:?}");
}

#[test]
fn join_with_a_token_that_is_not_good() {
    let receiver = Receiver::start();
    let old = receiver.token("db1", Duration::from_secs(1), SystemTime::now() - Duration::from_secs(60));
    let root = Root::new();
    join(&root, &receiver.address, &old, &[]).problem(3, "the receiver at", "", "varve host invite");
    let stranger = JoinToken { ca_fingerprint: receiver.authority.fingerprint(), secret: [7; 32], name: "x".into() };
    join(&root, &receiver.address, &stranger.encode(), &[]).problem(3, "", "", "varve host invite");
    // Another receiver's token, sent here by mistake: its secret never leaves this host.
    let elsewhere = JoinToken { ca_fingerprint: [9; 32], secret: [7; 32], name: "x".into() };
    join(&root, &receiver.address, &elsewhere.encode(), &[]).problem(3, "", "", "check the address");
    assert!(!root.at("etc/varve/agent").exists() && !root.at("etc/varve/agent.toml").exists(), "nothing was written");
    let files = std::fs::read_dir(root.at("etc/varve")).expect("made").count();
    assert_eq!(files, 0, "and nothing was left behind");
}

#[test]
fn join_where_nobody_answers() {
    let free = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
    let address = free.local_addr().expect("bound").to_string();
    drop(free);
    let root = Root::new();
    let token = JoinToken { ca_fingerprint: [9; 32], secret: [7; 32], name: "x".into() }.encode();
    join(&root, &address, &token, &[]).problem(4, &address, "", "varve-receiver runs there");
    join(&root, "no-such-host.invalid", &token, &[]).problem(4, "no-such-host.invalid", "", "DNS");
}

#[test]
fn join_with_a_configuration_that_is_wrong() {
    let root = Root::new();
    root.write("etc/varve/agent.toml", "ring_mb = 64\n");
    let token = JoinToken { ca_fingerprint: [9; 32], secret: [7; 32], name: "x".into() }.encode();
    join(&root, "127.0.0.1", &token, &[]).problem(2, "agent.toml is not understood", "ring_mb", "correct");
    root.write("etc/varve/agent.toml", "receiver = \"other:7443\"\n");
    join(&root, "127.0.0.1", &token, &[]).problem(3, "has joined already", "at other:7443", "--force");
}

fn checks(root: &Root) -> (i32, Vec<Value>) {
    let said = root.varve(&["doctor", "--json"]);
    (said.code, said.json()["checks"].as_array().expect("checks").clone())
}

#[track_caller]
fn found<'a>(checks: &'a [Value], name: &str) -> &'a Value {
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name} in {checks:#?}"))
}

#[test]
fn doctor_of_a_recovery_host() {
    let root = Root::new();
    let port = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
    let listen = port.local_addr().expect("bound").to_string();
    assert_eq!(root.varve(&["receiver", "init", "--listen", &listen]).code, 0);
    let (code, taken) = checks(&root);
    assert_eq!(code, 1);
    assert_eq!(found(&taken, "listen port")["result"], "fail");
    assert_eq!(found(&taken, "varve-receiver")["result"], "fail");
    drop(port);
    root.daemon("receiver", knows("receiver", vec![group("db", "replica")]));
    let (code, running) = checks(&root);
    assert_eq!(code, 0, "{running:#?}");
    assert_eq!(found(&running, "varve-receiver")["result"], "ok");
    for name in ["receiver.toml", "receiver's identity", "receiver's state", "time"] {
        assert_eq!(found(&running, name)["result"], "ok", "{name}");
    }
    let mut sections: Vec<&str> = running.iter().map(|check| check["section"].as_str().expect("text")).collect();
    sections.dedup();
    assert_eq!(sections, ["host", "clock", "network", "daemons", "disk", "configuration"]);
    for check in running.iter().filter(|check| check["result"] != "ok") {
        assert!(check["why"] != "" && check["next"] != "", "{check}");
    }
}

#[test]
fn doctor_finds_what_was_broken() {
    let root = Root::new();
    root.varve(&["receiver", "init", "--listen", "127.0.0.1:0"]).problem(2, "127.0.0.1:0", "port 0", "7443");
    assert_eq!(root.varve(&["receiver", "init", "--listen", "127.0.0.1:1"]).code, 0);
    root.write("etc/varve/receiver.toml", "listne = \"127.0.0.1:1\"\n");
    let key = root.at("etc/varve/receiver/ca.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).expect("changed");
    root.write("etc/varve/agent.toml", "receiver = \"no-such-host.invalid:7443\"\n");
    let (code, checks) = checks(&root);
    assert_eq!(code, 1);
    let config = found(&checks, "receiver.toml");
    assert_eq!(config["result"], "fail");
    assert!(config["found"].as_str().is_some_and(|text| text.contains("listne")), "{config}");
    let identity = found(&checks, "receiver's identity");
    assert_eq!(identity["result"], "fail");
    assert!(identity["next"].as_str().is_some_and(|text| text.contains("chmod 600")), "{identity}");
    assert_eq!(found(&checks, "agent's identity")["result"], "fail");
    assert_eq!(found(&checks, "receiver's address")["result"], "fail");
    let text = root.varve(&["doctor"]);
    assert_eq!(text.code, 1);
    assert!(text.out.contains("  FAIL  receiver's address: no-such-host.invalid:7443 cannot be found"), "{text:?}");
}
