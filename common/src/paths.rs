//! Where everything lives below a root. `/` in production; any directory with `--root` or `VARVE_ROOT`, so that several
//! installations can live on one machine.

use std::path::{Path, PathBuf};

/// The root and every path below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    root: PathBuf,
}

impl Paths {
    /// Paths below `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The root itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether this is the machine's own installation.
    pub fn is_system(&self) -> bool {
        self.root == Path::new("/")
    }

    /// Configuration files and identities: `etc/varve`.
    pub fn config_dir(&self) -> PathBuf {
        self.root.join("etc/varve")
    }

    /// `etc/varve/agent.toml`.
    pub fn agent_config(&self) -> PathBuf {
        self.config_dir().join("agent.toml")
    }

    /// Key, certificate and CA of this host as a source.
    pub fn agent_identity(&self) -> PathBuf {
        self.config_dir().join("agent")
    }

    /// `etc/varve/receiver.toml`.
    pub fn receiver_config(&self) -> PathBuf {
        self.config_dir().join("receiver.toml")
    }

    /// CA, server key and host registry of this host as a receiver.
    pub fn receiver_identity(&self) -> PathBuf {
        self.config_dir().join("receiver")
    }

    /// What the agent must remember: `var/lib/varve/agent`.
    pub fn agent_state(&self) -> PathBuf {
        self.root.join("var/lib/varve/agent")
    }

    /// The groups' journals, one directory each.
    pub fn agent_journals(&self) -> PathBuf {
        self.agent_state().join("journal")
    }

    /// Landing logs, marks, replicas: `var/lib/varve/receiver`.
    pub fn receiver_state(&self) -> PathBuf {
        self.root.join("var/lib/varve/receiver")
    }

    /// One group's directory at the receiver.
    pub fn receiver_group(&self, group: &str) -> PathBuf {
        self.receiver_state().join("groups").join(group)
    }

    /// Sockets: `run/varve`.
    pub fn run_dir(&self) -> PathBuf {
        self.root.join("run/varve")
    }

    /// The directory of the agent's pins in a bpf file system: `sys/fs/bpf/varve`. Below another root than `/` the agent
    /// mounts one on `sys/fs/bpf`.
    pub fn bpffs(&self) -> PathBuf {
        self.root.join("sys/fs/bpf/varve")
    }

    /// The agent's socket.
    pub fn agent_socket(&self) -> PathBuf {
        self.run_dir().join("agent.sock")
    }

    /// The receiver's socket.
    pub fn receiver_socket(&self) -> PathBuf {
        self.run_dir().join("receiver.sock")
    }

    /// The takeover plan of a group: `etc/varve/takeover/GROUP.toml`.
    pub fn takeover_plan(&self, group: &str) -> PathBuf {
        self.config_dir().join("takeover").join(format!("{group}.toml"))
    }

    /// What takeovers and tests of a group have done: `var/lib/varve/takeover/GROUP`.
    pub fn takeover_state(&self, group: &str) -> PathBuf {
        self.root.join("var/lib/varve/takeover").join(group)
    }

    /// Where a test's namespaces of a group are held: `run/varve/takeover/GROUP`.
    pub fn takeover_bubble(&self, group: &str) -> PathBuf {
        self.run_dir().join("takeover").join(group)
    }

    /// Links to the devices of a promoted group: `dev/varve/GROUP`.
    pub fn takeover_links(&self, group: &str) -> PathBuf {
        self.root.join("dev/varve").join(group)
    }
}
