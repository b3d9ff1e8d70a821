//! From TOML to a plan. Every value is checked here, so that what runs later meets no surprise.

use super::fields::{At, Fields, Finding, Findings};
use super::{InTest, Kind, Plan, Probe, STEPS_MAX, Step, TIMEOUT_MAX, TIMEOUT_MIN, VERSION};
use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;
use toml::de::{DeTable, DeValue};
use varve_common::problem::check_name;

const STEP_NAME_BYTES_MAX: usize = 64;
/// The kernel's IFNAMSIZ without its final zero.
const INTERFACE_BYTES_MAX: usize = 15;
const EVERY_DEFAULT: Duration = Duration::from_millis(500);
const EVERY_MIN: Duration = Duration::from_millis(50);
/// Nothing is mounted over these: this host would stop working.
const NEVER_COVERED: [&str; 16] = [
    "/", "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/root", "/run", "/sbin", "/sys", "/tmp", "/usr",
    "/var", "/var/lib",
];
const IN_TEST: [(&str, InTest); 2] = [("run", InTest::Run), ("skip", InTest::Skip)];
const SUFFIXES: [&str; 10] =
    [".service", ".socket", ".target", ".mount", ".automount", ".timer", ".path", ".slice", ".swap", ".device"];

/// Reads a plan, or says everything that is wrong with it.
pub(super) fn plan(file: &Path, text: &str) -> Result<Plan, Vec<Finding>> {
    let findings = Findings::new(text);
    let table = match DeTable::parse(text) {
        Ok(table) => table.into_inner(),
        Err(error) => {
            let line = findings.line(error.span().map_or(0, |span| span.start));
            return Err(vec![Finding { line, what: error.message().to_owned() }]);
        }
    };
    let plan = document(file, table, &findings);
    let findings = findings.into_sorted();
    if findings.is_empty() { Ok(plan) } else { Err(findings) }
}

fn document(file: &Path, table: DeTable<'_>, findings: &Findings<'_>) -> Plan {
    let mut fields = Fields::new(findings, "", 1, table);
    match fields.number("version") {
        Some((VERSION, _)) => {}
        Some((other, line)) => {
            fields.wrong(line, format_args!("version is {other}; this program reads version {VERSION}"));
        }
        None => fields.wrong(1, format_args!("the key 'version' is missing; write version = {VERSION}")),
    }
    let private = match fields.raw("bubble") {
        None => Vec::new(),
        Some((DeValue::Table(table), line)) => bubble(Fields::new(findings, "bubble", line, table)),
        Some((_, line)) => {
            fields.wrong(line, "bubble is a table: [bubble]");
            Vec::new()
        }
    };
    let mut steps = Vec::new();
    match fields.raw("step") {
        Some((DeValue::Array(array), line)) => {
            if array.len() > STEPS_MAX {
                fields.wrong(line, format_args!("there are more than {STEPS_MAX} steps"));
            }
            for (place, item) in array.into_iter().take(STEPS_MAX).enumerate() {
                let line = findings.line(item.span().start);
                match item.into_inner() {
                    DeValue::Table(table) => {
                        steps.extend(step(Fields::new(findings, &format!("step {}", place + 1), line, table)));
                    }
                    _ => fields.wrong(line, "a step is a table: [[step]]"),
                }
            }
        }
        Some((_, line)) => fields.wrong(line, "step is an array of tables: [[step]]"),
        None => fields.wrong(1, "there is no [[step]]"),
    }
    fields.finish();
    same_names(&steps, findings);
    Plan { file: file.to_owned(), private, steps }
}

fn same_names(steps: &[Step], findings: &Findings<'_>) {
    for (place, step) in steps.iter().enumerate() {
        if let Some(first) = steps[..place].iter().find(|first| first.name == step.name) {
            findings
                .add(step.line, format!("the name '{}' was given to the step of line {} too", step.name, first.line));
        }
    }
}

fn bubble(mut fields: Fields<'_, '_>) -> Vec<PathBuf> {
    let mut private = Vec::new();
    if let Some((paths, line)) = fields.texts("private") {
        for path in paths {
            match absolute(&path) {
                Some(path) if path != Path::new("/") => private.push(path),
                _ => fields.wrong(line, format_args!("private: '{path}' is no absolute path of a directory below /")),
            }
        }
    }
    fields.finish();
    private
}

fn step(mut fields: Fields<'_, '_>) -> Option<Step> {
    let name = fields.required_text("name").map(|(name, line)| {
        if name.len() > STEP_NAME_BYTES_MAX {
            fields.wrong(line, format_args!("name has more than {STEP_NAME_BYTES_MAX} bytes"));
        }
        name
    });
    if let Some(name) = &name {
        fields.of = format!("{} '{name}'", fields.of);
    }
    let line = fields.line;
    let kinds: [(&str, Reader); 7] = [
        ("attach", attach),
        ("lvm", lvm),
        ("mount", mount),
        ("address", address),
        ("unit", unit),
        ("command", command),
        ("check", check),
    ];
    let timeout = fields.duration("timeout", TIMEOUT_MIN, TIMEOUT_MAX);
    let in_test = fields.one_of("in_test", &IN_TEST);
    let Some((read, _)) = fields.one_of("kind", &kinds) else {
        if !fields.was_there("kind") {
            fields.wrong(line, "the key 'kind' is missing");
        }
        // Which keys are known depends on the kind.
        return None;
    };
    let kind = read(&mut fields);
    let in_test = kind.as_ref().and_then(|kind| test_of(&fields, kind, in_test));
    fields.finish();
    let kind = kind?;
    let timeout = timeout.unwrap_or_else(|| default_timeout(&kind));
    Some(Step { name: name?, line, timeout, in_test: in_test?, kind })
}

type Reader = fn(&mut Fields<'_, '_>) -> Option<Kind>;

fn default_timeout(kind: &Kind) -> Duration {
    Duration::from_secs(match kind {
        Kind::Attach { .. } => 10,
        Kind::Address { .. } => 15,
        Kind::Unit { .. } => 90,
        Kind::Lvm { .. } | Kind::Mount { .. } | Kind::Command { .. } | Kind::Check { .. } => 60,
    })
}

/// What a test does with the step: what the plan says, where that is possible.
fn test_of(fields: &Fields<'_, '_>, kind: &Kind, said: Option<At<InTest>>) -> Option<InTest> {
    match (kind, said) {
        (Kind::Unit { test_run: None, .. }, Some((InTest::Run, line))) => {
            let why = "systemd is not inside a bubble: give the program that stands for the unit with test_run";
            fields.wrong(line, why);
            None
        }
        (Kind::Unit { test_run: None, .. }, _) => Some(InTest::Skip),
        (Kind::Mount { fstype, .. }, None) if fstype == "btrfs" => {
            let why = "the kernel tells btrfs filesystems apart by their id alone, and the original may be on this \
                       host: say in_test = \"skip\", or \"run\" if it never is";
            fields.wrong(fields.line, why);
            None
        }
        (_, said) => Some(said.map_or(InTest::Run, |(said, _)| said)),
    }
}

fn attach(fields: &mut Fields<'_, '_>) -> Option<Kind> {
    let Some((value, line)) = fields.raw("volumes") else { return Some(Kind::Attach { volumes: Vec::new() }) };
    let DeValue::Table(table) = value else {
        fields.wrong(line, "volumes is a table of names and paths at the source: { data = \"/dev/vdb\" }");
        return None;
    };
    let mut volumes: Vec<(String, String)> = Vec::new();
    for (name, path) in table {
        let name = name.into_inner().into_owned();
        if check_name("volume", &name).is_err() {
            fields.wrong(line, format_args!("volumes: '{}' cannot name a volume", name.escape_debug()));
        }
        match path.get_ref().as_str() {
            Some(path) if !path.is_empty() => volumes.push((name, path.to_owned())),
            _ => fields.wrong(line, format_args!("volumes: '{name}' is the path of a volume at the source")),
        }
    }
    if volumes.is_empty() {
        fields.wrong(line, "volumes names none; leave the key away for all");
    }
    Some(Kind::Attach { volumes })
}

fn lvm(fields: &mut Fields<'_, '_>) -> Option<Kind> {
    let devices = fields.texts("devices").map(|(devices, _)| devices).unwrap_or_default();
    let (vg, line) = fields.required_text("vg")?;
    let good = |c: char| c.is_ascii_alphanumeric() || "+_.-".contains(c);
    if !vg.chars().all(good) || vg.starts_with('-') || vg == "." || vg == ".." {
        fields.wrong(line, format_args!("vg: '{vg}' cannot name a volume group"));
    }
    Some(Kind::Lvm { vg, devices })
}

fn mount(fields: &mut Fields<'_, '_>) -> Option<Kind> {
    let device = fields.required_text("device");
    let fstype = fields.required_text("fstype");
    if let Some((fstype, line)) = &fstype
        && !fstype.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    {
        fields.wrong(*line, format_args!("fstype: '{fstype}' cannot name a filesystem"));
    }
    let options = fields.text("options").map(|(options, line)| options_of(fields, &options, line)).unwrap_or_default();
    let at = fields.required_text("where").and_then(|(at, line)| match absolute(&at) {
        Some(at) if NEVER_COVERED.iter().all(|system| at != Path::new(system)) => Some(at),
        Some(_) => {
            fields.wrong(line, format_args!("where: '{at}' belongs to this host's own system"));
            None
        }
        None => {
            fields.wrong(line, format_args!("where: '{at}' is not an absolute path without '.' and '..'"));
            None
        }
    });
    let (device, line) = device?;
    if !device.starts_with('/') && !device.starts_with('{') {
        fields.wrong(line, format_args!("device: '{device}' is neither a path nor a {{name}} of an earlier step"));
    }
    Some(Kind::Mount { device, at: at?, fstype: fstype?.0, options })
}

fn options_of(fields: &Fields<'_, '_>, options: &str, line: usize) -> Vec<String> {
    let options: Vec<String> = options.split(',').map(|option| option.trim().to_owned()).collect();
    for option in &options {
        // These make mount(8) do something else than mount this device here.
        if ["bind", "rbind", "move", "remount", "loop"].contains(&option.as_str()) || option.starts_with("loop=") {
            fields.wrong(line, format_args!("options: '{option}' does not fit a step that mounts a device"));
        }
        if option.is_empty() || option.contains(char::is_whitespace) {
            fields.wrong(line, "options: separate them by single commas, as in fstab");
        }
    }
    options
}

fn address(fields: &mut Fields<'_, '_>) -> Option<Kind> {
    let announce = fields.flag("announce").is_none_or(|(announce, _)| announce);
    let taken = fields.one_of("if_taken", &[("refuse", false), ("take", true)]).is_some_and(|(take, _)| take);
    let interface = fields.required_text("interface").and_then(|(interface, line)| {
        let good = interface.len() <= INTERFACE_BYTES_MAX
            && !interface.starts_with('-')
            && interface.chars().all(|c| !c.is_whitespace() && c != '/' && c.is_ascii_graphic());
        if !good {
            fields.wrong(line, format_args!("interface: '{interface}' cannot name a network interface"));
        }
        good.then_some(interface)
    });
    let (text, line) = fields.required_text("address")?;
    let Some((address, prefix)) = network(&text) else {
        let example = "192.0.2.10/24 or 2001:db8::10/64";
        fields.wrong(line, format_args!("address: '{text}' is no address with its network's bits, such as {example}"));
        return None;
    };
    if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
        fields.wrong(line, format_args!("address: {address} cannot be taken over"));
        return None;
    }
    Some(Kind::Address { address, prefix, interface: interface?, announce, take_from_others: taken })
}

fn network(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let digits = !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_digit());
    let prefix: u8 = prefix.parse().ok().filter(|_| digits)?;
    (1..=most).contains(&prefix).then_some((address, prefix))
}

fn unit(fields: &mut Fields<'_, '_>) -> Option<Kind> {
    let test_run = fields.some_words("test_run").map(|(words, _)| words);
    let (unit, line) = fields.required_text("unit")?;
    let unit = if SUFFIXES.iter().any(|suffix| unit.ends_with(suffix)) { unit } else { format!("{unit}.service") };
    let good = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    if unit.starts_with('-') || unit.starts_with('.') || unit.len() > 255 || !unit.chars().all(good) {
        fields.wrong(line, format_args!("unit: '{unit}' cannot name a systemd unit"));
    }
    Some(Kind::Unit { unit, test_run })
}

fn command(fields: &mut Fields<'_, '_>) -> Option<Kind> {
    let run = fields.required_words("run");
    let done_if = fields.some_words("done_if").map(|(words, _)| words);
    let test_run = fields.some_words("test_run").map(|(words, _)| words);
    let test_undo = fields.words("test_undo").map(|(words, _)| words);
    let undo = fields.words("undo").map(|(words, _)| words);
    if undo.is_none() && !fields.was_there("undo") {
        let why = "the key 'undo' is missing: the command that takes it back, or undo = [] if there is nothing to";
        fields.wrong(fields.line, why);
    }
    Some(Kind::Command { run: run?.0, undo: undo?, done_if, test_run, test_undo })
}

fn check(fields: &mut Fields<'_, '_>) -> Option<Kind> {
    let every = fields.duration("every", EVERY_MIN, TIMEOUT_MAX).unwrap_or(EVERY_DEFAULT);
    let tcp = fields.text("tcp");
    let http = fields.text("http");
    let run = fields.some_words("run").map(|(words, _)| words);
    let status = fields.number("status");
    let text = fields.text("text");
    let kinds = usize::from(tcp.is_some()) + usize::from(http.is_some()) + usize::from(run.is_some());
    if kinds != 1 && !["tcp", "http", "run"].iter().any(|key| fields.was_there(key) && kinds == 0) {
        fields.wrong(fields.line, "a check has exactly one of tcp, http and run");
        return None;
    }
    if http.is_none()
        && let Some(line) = status.map(|(_, line)| line).or(text.as_ref().map(|(_, line)| *line))
    {
        fields.wrong(line, "status and text belong to http");
    }
    let status = match status {
        None => 200,
        Some((status @ 100..=599, _)) => status as u16,
        Some((status, line)) => {
            fields.wrong(line, format_args!("status: {status} is no status of HTTP"));
            return None;
        }
    };
    let probe = if let Some((tcp, line)) = tcp {
        let Some((host, port)) = host_port(&tcp, None) else {
            fields.wrong(line, format_args!("tcp: '{tcp}' is not HOST:PORT"));
            return None;
        };
        Probe::Tcp { host, port }
    } else if let Some((url, line)) = http {
        if url.starts_with("https:") {
            fields.wrong(line, "http: for https use run with a program, such as [\"/usr/bin/curl\", \"-fsS\", URL]");
            return None;
        }
        let Some((host, port, path)) = url_of(&url) else {
            fields.wrong(line, format_args!("http: '{url}' is not http://HOST[:PORT]/PATH"));
            return None;
        };
        Probe::Http { host, port, path, status, text: text.map(|(text, _)| text) }
    } else {
        Probe::Command { run: run? }
    };
    Some(Kind::Check { probe, every })
}

fn url_of(url: &str) -> Option<(String, u16, String)> {
    let rest = url.strip_prefix("http://")?;
    let (authority, path) = match rest.find(['/', '?']) {
        Some(place) if rest[place..].starts_with('/') => (&rest[..place], rest[place..].to_owned()),
        Some(place) => (&rest[..place], format!("/{}", &rest[place..])),
        None => (rest, "/".to_owned()),
    };
    // Not sent to the server, and a request line ends at a space.
    if path.contains([' ', '#']) || authority.contains('@') {
        return None;
    }
    let (host, port) = host_port(authority, Some(80))?;
    Some((host, port, path))
}

/// `host:port`, `[v6]:port`; without a port where there is a usual one.
fn host_port(text: &str, usual: Option<u16>) -> Option<(String, u16)> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        host.parse::<std::net::Ipv6Addr>().ok()?;
        (host, rest.strip_prefix(':').or(rest.is_empty().then_some(""))?)
    } else {
        text.split_once(':').unwrap_or((text, ""))
    };
    let port = match (port, usual) {
        ("", Some(usual)) if !text.ends_with(':') => usual,
        _ => port.parse().ok().filter(|port| *port != 0 && !text.contains('+'))?,
    };
    let good = |c: char| c.is_ascii_alphanumeric() || ".-_:".contains(c);
    (!host.is_empty() && host.len() <= 253 && host.chars().all(good)).then(|| (host.to_owned(), port))
}

/// An absolute path that says where it is.
fn absolute(text: &str) -> Option<PathBuf> {
    let path = Path::new(text);
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    // `components` drops "." and doubled slashes by itself.
    (path.is_absolute() && plain && !text.split('/').any(|part| part == ".")).then(|| path.components().collect())
}
