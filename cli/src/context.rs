//! The installation that is meant, and how to print.

use crate::words;
use serde::Serialize;
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::Path;
use varve_common::paths::Paths;
use varve_common::problem::{Problem, ProblemKind};

/// The exit code of a command that printed its answer, or what the operator has to be told.
pub(crate) type Outcome = Result<u8, Problem>;

/// Exit code: done.
pub(crate) const DONE: u8 = 0;
/// Exit code: failed.
pub(crate) const FAILED: u8 = 1;

/// `sun_path` with its final zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What every command is given.
pub(crate) struct Context {
    /// Where everything of the installation is.
    pub(crate) paths: Paths,
    /// Print JSON.
    pub(crate) json: bool,
    /// `--root` has to be repeated in the commands that are suggested.
    root_as_option: bool,
}

impl Context {
    /// Checks the root as given.
    pub(crate) fn new(root: &Path, json: bool) -> Result<Self, Problem> {
        let absolute = std::path::absolute(root).map_err(|error| {
            Problem::usage(
                format!("'{}' cannot be a root", root.display()),
                words::sentence(&error),
                "give a directory with --root or VARVE_ROOT, or neither for this machine's own installation",
            )
        })?;
        let paths = Paths::new(&absolute);
        let socket = paths.receiver_socket();
        if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(Problem::usage(
                format!("the root '{}' is too long", root.display()),
                format!("{} has more than {SOCKET_PATH_BYTES_MAX} bytes, the limit for a socket", socket.display()),
                "use a shorter directory",
            ));
        }
        if absolute.exists() && !absolute.is_dir() {
            return Err(Problem::usage(
                format!("the root '{}' is not a directory", root.display()),
                "--root or VARVE_ROOT names something else",
                "give the directory that holds the installation",
            ));
        }
        let root_as_option = !paths.is_system() && std::env::var_os("VARVE_ROOT").is_none_or(|env| env != root);
        Ok(Self { paths, json, root_as_option })
    }

    /// For every command that does not create the installation: the root must be there.
    pub(crate) fn need_root(&self) -> Result<(), Problem> {
        if self.paths.root().is_dir() {
            return Ok(());
        }
        Err(Problem::not_found(
            format!("there is no directory {}", self.paths.root().display()),
            "--root or VARVE_ROOT names it as the place of an installation",
            "correct the path; 'varve receiver init' and 'varve join' make an installation",
        ))
    }

    /// A command to suggest, for this installation.
    pub(crate) fn suggest(&self, words: &str) -> String {
        if self.root_as_option {
            format!("varve --root {} {words}", self.paths.root().display())
        } else {
            format!("varve {words}")
        }
    }

    /// How a daemon of this installation is started.
    pub(crate) fn suggest_start(&self, program: &str) -> String {
        if self.paths.is_system() {
            format!("systemctl enable --now {program}")
        } else {
            format!("VARVE_ROOT={} {program}", self.paths.root().display())
        }
    }

    /// Prints the answer: as JSON on one line with `--json`, else what `text` makes of it.
    pub(crate) fn answer<T: Serialize>(&self, answer: &T, text: impl FnOnce(&T) -> String) {
        if self.json {
            print_json(answer);
        } else {
            print(&words::visible(&text(answer)));
        }
    }
}

/// Whether there is something. What only root may look at counts: "not set up" would be wrong, "run it as root" follows.
pub(crate) fn is_there(path: &Path) -> bool {
    path.try_exists().unwrap_or_else(|error| error.kind() == ErrorKind::PermissionDenied)
}

/// Whether a person sees standard output.
pub(crate) fn on_terminal() -> bool {
    std::io::stdout().is_terminal()
}

fn write(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())
}

/// Writes the answer to standard output. An output that cannot be written ends the program as failed: an answer that
/// nobody got is not "done". A reader that went away (`varve status | head -1`) wanted no more of it: nothing is said, and
/// the exit code is the command's. Gives whether there may still be a reader.
pub(crate) fn print(text: &str) -> bool {
    match write(text) {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::BrokenPipe => false,
        Err(error) => {
            // Nothing is left to tell if this fails as well.
            let _ = writeln!(std::io::stderr(), "varve: the answer cannot be printed: {}", words::sentence(&error));
            std::process::exit(i32::from(FAILED));
        }
    }
}

/// One JSON object on one line, as [`print`].
pub(crate) fn print_json<T: Serialize>(value: &T) -> bool {
    print(&json_line(value))
}

/// Writes what is told while work goes on. That nobody can read it must not end the work half way: a takeover of which
/// half is done serves nobody. What cannot be written is told of when the answer cannot be either.
pub(crate) fn print_meanwhile(text: &str) {
    let _ = write(text);
}

/// One JSON object on one line, as [`print_meanwhile`].
pub(crate) fn print_json_meanwhile<T: Serialize>(value: &T) {
    print_meanwhile(&json_line(value));
}

fn json_line<T: Serialize>(value: &T) -> String {
    match serde_json::to_string(value) {
        Ok(text) => format!("{text}\n"),
        // Only maps with keys that are no strings cannot be written, and there are none.
        Err(error) => format!("{{\"problem\":{{\"kind\":\"failed\",\"what\":\"{error}\"}}}}\n"),
    }
}

/// For people, beside the answer: standard error.
pub(crate) fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{}", words::visible(text));
}

/// What a script gets in place of the answer.
#[derive(Serialize)]
struct Told<'a> {
    problem: &'a Problem,
}

/// Tells the operator, and with `--json` the script; gives the exit code. The operator first: a script's output that cannot be
/// written (a full disk) must hide neither the problem nor its code.
pub(crate) fn report(problem: &Problem, json: bool) -> u8 {
    explain(problem);
    if json {
        print_json_meanwhile(&Told { problem });
    }
    problem.kind.exit_code()
}

/// The three lines: what happened, why, what to do next.
pub(crate) fn explain(problem: &Problem) {
    // What a daemon says may have lines of its own, and numbers for programmers.
    let line = |text: &str| without_numbers(&text.split_whitespace().collect::<Vec<_>>().join(" "));
    note(&format!("varve: {}\n  why:  {}\n  next: {}", line(&problem.what), line(&problem.why), line(&problem.next)));
}

/// A file step that failed, in plain words.
pub(crate) fn file_problem(error: &varve_io::IoError) -> Problem {
    let next = match error.kind() {
        ErrorKind::PermissionDenied => "run it as root",
        _ if error.is_no_space() => "free some space and try again",
        _ if error.is_read_only() => "make the file system writable, or use another root",
        _ => "check the path and try again",
    };
    Problem::failed(error.to_string(), words::sentence(error.source_io()), next)
}

/// An error of the network or of an identity, in plain words.
pub(crate) fn net_problem(error: &varve_net::Error) -> Problem {
    use varve_net::ErrorKind as Net;
    let kind = match error.kind() {
        Net::Unreachable | Net::Resolve | Net::Timeout | Net::Busy | Net::Closed => ProblemKind::Unreachable,
        Net::MalformedToken | Net::BadName => ProblemKind::Usage,
        Net::WrongCa | Net::UnknownToken | Net::UsedToken | Net::ExpiredToken => ProblemKind::Refused,
        Net::Revoked | Net::UnknownHost | Net::AlreadyRunning => ProblemKind::Refused,
        Net::NoSuchHost => ProblemKind::NotFound,
        _ => ProblemKind::Failed,
    };
    let (context, why) = (error.context().to_owned(), plain_chain(error));
    // An error without a cause says what and why in one sentence ("…: …"): take it apart, not twice.
    let (what, why) = match (why.is_empty(), context.split_once(": ")) {
        (false, _) => (context, why),
        (true, Some((what, why))) => (what.to_owned(), why.to_owned()),
        (true, None) => (context, plain_reason(error.kind()).to_owned()),
    };
    Problem::new(kind, what, why, error.hint())
}

/// The causes without numbers for programmers, and without a step that only names what the context names already.
fn plain_chain(error: &varve_net::Error) -> String {
    let why: Vec<String> = error.why().split(": ").map(without_numbers).collect();
    let named = |step: &String| error.context().split(' ').any(|word| word.starts_with('/') && step.ends_with(word));
    let known = why.len() > 1 && why.first().is_some_and(named);
    why[usize::from(known)..].join(": ")
}

/// `file not found (os error 2)` without the number.
fn without_numbers(text: &str) -> String {
    let mut parts = text.split(" (os error ");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    parts.for_each(|part| plain.push_str(part.split_once(')').map_or("", |(_, rest)| rest)));
    plain
}

fn plain_reason(kind: varve_net::ErrorKind) -> &'static str {
    use varve_net::ErrorKind as Net;
    match kind {
        Net::Unreachable => "nothing answers there",
        Net::Resolve => "the name has no address",
        Net::Timeout => "it took too long",
        Net::WrongCa => "its certificate is not signed by the authority that the token names",
        Net::UnknownToken | Net::UsedToken | Net::ExpiredToken => {
            "a token works once, at the receiver that made it, until it expires"
        }
        Net::Revoked => "the recovery host revoked it",
        Net::UnknownHost => "the recovery host does not know this host's certificate",
        Net::WrongProtocol | Net::Protocol => "the two sides do not understand each other",
        Net::Busy => "it has as many connections as it takes",
        _ => "see what to do next",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggestions_name_the_installation() {
        let other = Context { paths: Paths::new("/r"), json: false, root_as_option: true };
        assert_eq!(other.suggest("status"), "varve --root /r status");
        assert_eq!(other.suggest_start("varve-agent"), "VARVE_ROOT=/r varve-agent");
        let system = Context { paths: Paths::new("/"), json: false, root_as_option: false };
        assert_eq!(system.suggest("status"), "varve status");
        assert_eq!(system.suggest_start("varve-agent"), "systemctl enable --now varve-agent");
    }

    #[test]
    fn numbers_of_errors_are_for_programmers() {
        assert_eq!(without_numbers("a (os error 2): b (os error 13); c"), "a: b; c");
        assert_eq!(without_numbers("plain (text)"), "plain (text)");
    }

    #[test]
    fn a_network_error_is_told_once() {
        let problem = net_problem(&varve_net::token::JoinToken::decode("x").expect_err("no token"));
        assert_eq!(problem.kind, ProblemKind::Usage);
        assert_eq!(problem.what, "this is not a join token");
        assert_eq!(problem.why, "it does not start with 'varve1.'");
        let problem = net_problem(&varve_net::identity::HostIdentity::load(Path::new("/no")).expect_err("not there"));
        assert_eq!(problem.what, "/no/host.pem cannot be used");
        assert_eq!(problem.why, "No such file or directory");
    }
}
