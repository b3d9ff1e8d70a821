//! The NBD server with real clients: qemu-img, nbdinfo, nbdcopy, libnbd for Python. One that is missing fails its test.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::libc;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
};
use rustls::ServerConfig;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::runtime::Runtime;
use varve_export::disks::{FileDisk, MemoryDisk};
use varve_export::nbd::{Clients, Exports, NbdServer};
use varve_export::{Disk, ExportErrorKind, Stretch};

const MIB: usize = 1 << 20;

/// A server with a runtime of its own.
struct Served {
    runtime: Runtime,
    exports: Arc<Exports>,
    server: Option<NbdServer>,
    dir: tempfile::TempDir,
}

impl Served {
    fn unix() -> Self {
        Self::new(|dir, exports| NbdServer::unix(&dir.join("nbd.sock"), exports).unwrap())
    }
    fn new(start: impl FnOnce(&Path, Arc<Exports>) -> NbdServer) -> Self {
        let (runtime, dir, exports) = (Runtime::new().unwrap(), tempfile::tempdir().unwrap(), Exports::new());
        let server = {
            let _inside = runtime.enter();
            start(dir.path(), exports.clone())
        };
        Self { runtime, exports, server: Some(server), dir }
    }
    fn with(self, name: &str, disk: Arc<dyn Disk>) -> Self {
        self.exports.add(name, disk, "a disk of a test").unwrap();
        self
    }
    fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }
    fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket().display())
    }
    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }
    fn stop(mut self) {
        self.runtime.block_on(self.server.take().unwrap().stop());
    }
}

fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new("timeout").args(["60", program]).args(args).output().unwrap();
    assert_ne!(output.status.code(), Some(127), "{program} is missing: scripts/install-deps test");
    output
}

fn good(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {text}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(next).collect()
}

fn sparse_disk() -> Arc<MemoryDisk> {
    let disk = MemoryDisk::new(8 * MIB);
    disk.write_at(&noise(MIB, 1), MIB as u64).unwrap();
    disk.write_at(&noise(4096, 2), 5 << 20).unwrap();
    Arc::new(disk)
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    let served = Served::unix().with("one", sparse_disk()).with("two", Arc::new(MemoryDisk::read_only(noise(4096, 1))));
    assert_eq!(fs::metadata(served.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    let text = good("nbdinfo", &[&served.uri("one")]);
    for line in [
        "newstyle-fixed without TLS",
        "structured packets",
        "export-size: 8388608",
        "description: a disk of a test",
        "base:allocation",
        "is_read_only: false",
        "can_multi_conn: true",
        "can_df: true",
        "can_fua: true",
        "can_trim: true",
        "can_fast_zero: true",
        "is_rotational: false",
        "block_size_minimum: 1",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    let text = good("nbdinfo", &[&served.uri("two")]);
    assert!(text.contains("is_read_only: true") && text.contains("can_trim: false"), "{text}");
    let list = good("nbdinfo", &["--list", &served.uri("")]);
    assert!(list.contains("export=\"one\":") && list.contains("export=\"two\":"), "{list}");
    let map = good("nbdinfo", &["--map", &served.uri("one")]);
    let rows: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().take(3).collect()).collect();
    assert_eq!(
        rows,
        [
            ["0", "1048576", "3"],
            ["1048576", "1048576", "0"],
            ["2097152", "3145728", "3"],
            ["5242880", "4096", "0"],
            ["5246976", "3141632", "3"]
        ]
    );
    assert!(!run("nbdinfo", &[&served.uri("three")]).status.success());
    assert!(!run("nbdinfo", &[&served.uri("")]).status.success(), "two exports have no default");
    served.stop();
}

#[test]
fn qemu_img_and_nbdcopy_agree() {
    let disk = sparse_disk();
    let served = Served::unix().with("one", disk.clone()).with("target", Arc::new(MemoryDisk::new(8 * MIB)));
    let (one, target) = (served.uri("one"), served.uri("target"));
    let (plain, copied, back) = (served.file("plain"), served.file("copied"), served.file("back"));
    fs::write(&plain, disk.snapshot()).unwrap();
    let info = good("qemu-img", &["info", &one]);
    assert!(info.contains("8388608 bytes"), "{info}");
    good("qemu-img", &["compare", "-f", "raw", "-F", "raw", plain.to_str().unwrap(), &one]);
    // To a file, sparse; into an export; between exports by several connections.
    good("qemu-img", &["convert", "-f", "raw", "-O", "raw", &one, copied.to_str().unwrap()]);
    assert!(fs::read(&copied).unwrap() == disk.snapshot());
    good("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", plain.to_str().unwrap(), &target]);
    good("qemu-img", &["compare", "-f", "raw", "-F", "raw", &one, &target]);
    let checked = good("qemu-img", &["map", "--output=json", "-f", "raw", &one]);
    assert!(
        checked.contains("\"start\": 1048576, \"length\": 1048576, \"depth\": 0, \"present\": true, \"zero\": false")
    );
    disk.write_at(&noise(3 * MIB, 9), 100).unwrap();
    good("nbdcopy", &["--connections=4", "--requests=64", &one, &target]);
    good("nbdcopy", &["--flush", "--request-size=1048576", &target, back.to_str().unwrap()]);
    assert!(fs::read(&back).unwrap() == disk.snapshot());
    served.stop();
}

#[test]
fn a_file_through_nbd_keeps_its_holes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    fs::write(&path, noise(MIB, 4)).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(64 << 20).unwrap();
    let served = Served::unix().with("file", Arc::new(FileDisk::open(&path, false).unwrap()));
    let copy = served.file("copy");
    good("nbdcopy", &[&served.uri("file"), copy.to_str().unwrap()]);
    assert!(fs::read(&copy).unwrap() == fs::read(&path).unwrap());
    let allocated = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&copy).unwrap()) * 512;
    assert!(allocated < 4 << 20, "{allocated}");
    served.stop();
}

#[test]
fn odd_requests_are_answered_as_a_model_says() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/odd_requests.py");
    let seed = std::env::var("VARVE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1u64);
    // The largest request fits on the first and not on the others; no size is a multiple of anything.
    for (at, len) in [33 * MIB + 777, 100_001, 8191].into_iter().enumerate() {
        let disk = Arc::new(MemoryDisk::new(len));
        let served = Served::unix().with("odd", disk.clone());
        let (model, seed) = (served.file("model"), (seed + at as u64).to_string());
        // Debian's libnbd is for Debian's Python; another one may be first in PATH.
        let python = "/usr/bin/python3";
        good(python, &[script, &served.uri("odd"), &seed, "400", model.to_str().unwrap()]);
        assert!(disk.snapshot() == fs::read(model).unwrap(), "seed {seed}, {len} bytes");
        served.stop();
    }
}

struct Failing;

impl Disk for Failing {
    fn len(&self) -> u64 {
        1 << 20
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_at(&self, _: &mut [u8], offset: u64) -> io::Result<()> {
        assert!(offset != 4096, "this test wants a panic");
        Err(io::Error::from_raw_os_error(libc::ENODATA))
    }
    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EDQUOT))
    }
    fn zero(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }
    fn flush(&self) -> io::Result<()> {
        Err(io::Error::other("no errno at all"))
    }
    fn stretch(&self, _: u64, _: u64) -> io::Result<Stretch> {
        // Nonsense must not turn into an endless loop.
        Ok(Stretch { len: 0, hole: true })
    }
}

#[test]
fn errors_of_a_disk_keep_their_meaning() {
    let read_only = Arc::new(MemoryDisk::read_only(noise(8192, 3)));
    let served = Served::unix().with("bad", Arc::new(Failing)).with("ro", read_only);
    let script = "
import errno, nbd, sys
def fails(call):
    try: call()
    except nbd.Error as e: return e.errno
def connect(uri):
    h = nbd.NBD(); h.set_strict_mode(0); h.add_meta_context('base:allocation'); h.connect_uri(uri); return h
h = connect(sys.argv[1])
DF = nbd.CMD_FLAG_DF
assert fails(lambda: h.pread(512, 0)) == 'EIO'
assert fails(lambda: h.pread(512, 0, DF)) == 'EIO'
assert fails(lambda: h.pread(512, 4096, DF)) == 'EIO', 'a panic'
assert fails(lambda: h.pwrite(b'x' * 512, 0)) == 'ENOSPC'
assert fails(lambda: h.zero(512, 0)) == 'ENOTSUP'
assert fails(lambda: h.flush()) == 'EIO'
assert fails(lambda: h.block_status(512, 0, lambda *a: 0)) == 'EIO'
h = connect(sys.argv[2])
assert fails(lambda: h.pwrite(b'x' * 512, 0)) == 'EPERM'
assert fails(lambda: h.zero(512, 0)) == 'EPERM'
assert fails(lambda: h.trim(512, 0)) == 'EPERM'
assert fails(lambda: h.flush()) is None
assert len(h.pread(8192, 0)) == 8192
";
    good("/usr/bin/python3", &["-c", script, &served.uri("bad"), &served.uri("ro")]);
    served.stop();
}

#[test]
fn a_malformed_peer_loses_its_connection_only() {
    let served = Served::unix().with("one", sparse_disk());
    let mut idle = served.connect();
    idle.read_exact(&mut [0; 18]).unwrap();
    let option = |option: u32, len: u32| [b"IHAVEOPT", &option.to_be_bytes()[..], &len.to_be_bytes()].concat();
    let go = [option(7, 9), vec![0, 0, 0, 3], b"one".to_vec(), vec![0, 0]].concat();
    let flags = 3u32.to_be_bytes().to_vec();
    let cases: [(&str, Vec<u8>); 6] = [
        ("unknown client flags", vec![0xff; 4]),
        ("no option", [flags.clone(), vec![0; 16]].concat()),
        ("an option of 4 GiB", [flags.clone(), option(7, u32::MAX)].concat()),
        ("no such export, the old way", [flags.clone(), option(1, 3), b"six".to_vec()].concat()),
        ("no request", [flags.clone(), go.clone(), vec![0xaa; 28]].concat()),
        ("half a request", [flags.clone(), go.clone(), vec![0x25, 0x60]].concat()),
    ];
    for (what, bytes) in cases {
        let mut stream = served.connect();
        stream.write_all(&bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        // Ends, by a close or a reset, before the timeout.
        let ended = stream.read_to_end(&mut answer);
        assert!(!matches!(&ended, Err(e) if e.kind() == io::ErrorKind::WouldBlock), "{what}: {ended:?}");
    }
    good("nbdinfo", &["--size", &served.uri("one")]);
    // Waiting connections are limited.
    let many: Vec<_> = (0..80).map(|_| served.connect()).collect();
    // By reference: one that is dropped gives its place to the next.
    let greeted = many.iter().filter(|stream| (&mut &**stream).read(&mut [0; 18]).is_ok_and(|n| n == 18)).count();
    assert!((40..=64).contains(&greeted), "{greeted}");
    drop((idle, many));
    served.stop();
}

#[test]
fn an_old_client_names_its_export() {
    let served = Served::unix().with("one", sparse_disk());
    let mut stream = served.connect();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream
        .write_all(&[&1u32.to_be_bytes()[..], b"IHAVEOPT", &1u32.to_be_bytes(), &3u32.to_be_bytes(), b"one"].concat())
        .unwrap();
    let mut answer = [0; 134];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[..8], (8u64 << 20).to_be_bytes());
    assert!(answer[10..].iter().all(|&b| b == 0));
    let request = |command: u16, offset: u64, len: u32| {
        let head = [&0x2560_9513u32.to_be_bytes()[..], &[0, 0], &command.to_be_bytes(), &77u64.to_be_bytes()];
        [&head.concat()[..], &offset.to_be_bytes(), &len.to_be_bytes()].concat()
    };
    stream.write_all(&request(0, MIB as u64, 5)).unwrap();
    let mut reply = [0; 21];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..16], [&0x6744_6698u32.to_be_bytes()[..], &[0; 4], &77u64.to_be_bytes()].concat());
    assert_eq!(reply[16..], noise(5, 1));
    stream.write_all(&request(2, 0, 0)).unwrap();
    assert_eq!(stream.read(&mut reply).unwrap(), 0, "DISC closes");
    served.stop();
}

#[test]
fn a_removed_export_lets_go_of_its_disk() {
    let disk = sparse_disk();
    let served = Served::unix().with("one", disk.clone()).with("two", Arc::new(MemoryDisk::new(MIB)));
    let error = served.exports.add("one", disk.clone(), "").unwrap_err();
    assert_eq!(error.kind(), ExportErrorKind::Exists);
    let mut stream = served.connect();
    let go = [
        &3u32.to_be_bytes()[..],
        b"IHAVEOPT",
        &7u32.to_be_bytes(),
        &9u32.to_be_bytes(),
        &3u32.to_be_bytes(),
        b"one\0\0",
    ];
    stream.write_all(&go.concat()).unwrap();
    let begin = Instant::now();
    while served.exports.connections("one") != Some(1) {
        assert!(begin.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(Arc::strong_count(&disk) > 1);
    assert!(served.runtime.block_on(served.exports.remove("one")));
    assert_eq!((Arc::strong_count(&disk), served.exports.connections("one")), (1, None));
    assert!(!served.runtime.block_on(served.exports.remove("one")));
    stream.read_to_end(&mut Vec::new()).unwrap();
    good("nbdinfo", &["--size", &served.uri("two")]);
    served.stop();
}

#[test]
fn a_dead_socket_is_replaced_and_a_served_one_is_not() {
    let served = Served::unix().with("one", sparse_disk());
    {
        let _inside = served.runtime.enter();
        let error = NbdServer::unix(&served.socket(), served.exports.clone()).unwrap_err();
        assert_eq!(error.kind(), ExportErrorKind::Exists);
        drop(std::os::unix::net::UnixListener::bind(served.file("dead")).unwrap());
        let second = NbdServer::unix(&served.file("dead"), served.exports.clone()).unwrap();
        good("nbdinfo", &["--size", &format!("nbd+unix:///one?socket={}", served.file("dead").display())]);
        served.runtime.block_on(second.stop());
        assert!(!served.file("dead").exists());
    }
    let socket = served.socket();
    let Served { runtime, mut server, dir, .. } = served;
    runtime.block_on(server.take().unwrap().stop());
    assert!(!socket.exists());
    drop(dir);
}

/// An authority, and certificates of it in the places where clients look.
fn certificates(dir: &Path) -> Arc<ServerConfig> {
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    authority.distinguished_name.push(rcgen::DnType::CommonName, "an authority of a test");
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    let issue = |names: &[&str], usage| {
        let mut params = CertificateParams::new(names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>()).unwrap();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![usage];
        params.distinguished_name.push(rcgen::DnType::CommonName, names[0]);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &authority).unwrap(), key)
    };
    let (client, client_key) = issue(&["client"], ExtendedKeyUsagePurpose::ClientAuth);
    fs::write(dir.join("ca-cert.pem"), authority.pem()).unwrap();
    fs::write(dir.join("client-cert.pem"), client.pem()).unwrap();
    fs::write(dir.join("client-key.pem"), client_key.serialize_pem()).unwrap();
    let (server, server_key) = issue(&["localhost", "127.0.0.1"], ExtendedKeyUsagePurpose::ServerAuth);
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(authority.der().to_vec())).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().unwrap();
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let key = PrivateKeyDer::try_from(server_key.serialize_der()).unwrap();
    let config = builder.with_client_cert_verifier(verifier).with_single_cert(vec![server.der().clone()], key);
    Arc::new(config.unwrap())
}

fn over_tcp(dir: &Path, exports: Arc<Exports>, may_stay: Arc<AtomicBool>) -> NbdServer {
    let may_stay = Arc::new(move |_: &CertificateDer<'_>| may_stay.load(Ordering::SeqCst));
    let clients = Clients { tls: certificates(dir), may_stay };
    NbdServer::tcp("127.0.0.1:0".parse().unwrap(), clients, exports).unwrap()
}

/// Whoever is not wanted any more is sent away in the middle of his session.
#[test]
fn a_client_that_may_not_stay_goes() {
    let may_stay = Arc::new(AtomicBool::new(true));
    let served = Served::new(|dir, exports| over_tcp(dir, exports, may_stay.clone())).with("one", sparse_disk());
    let port = served.server.as_ref().unwrap().address().unwrap().port();
    let uri = format!("nbds://localhost:{port}/one?tls-certificates={}", served.dir.path().display());
    let began = served.file("began");
    let code = format!(
        "import nbd, time\nh = nbd.NBD()\nh.set_uri_allow_local_file(True)\nh.connect_uri('{uri}')\nh.pread(512, 0)\n\
         open('{}', 'w').close()\nwhile True: h.pread(512, 0); time.sleep(0.02)",
        began.display()
    );
    // The system's own: libnbd's module is Debian's.
    let mut client = Command::new("/usr/bin/python3").args(["-c", &code]).spawn().unwrap();
    let start = Instant::now();
    while !began.exists() {
        assert!(start.elapsed() < Duration::from_secs(30), "it does not begin");
        std::thread::sleep(Duration::from_millis(10));
    }
    may_stay.store(false, Ordering::SeqCst);
    let start = Instant::now();
    let ended = loop {
        match client.try_wait().unwrap() {
            Some(ended) => break ended,
            None if start.elapsed() > Duration::from_secs(30) => {
                client.kill().unwrap();
                panic!("it stays");
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    assert!(!ended.success());
    served.stop();
}

#[test]
fn over_tcp_nothing_goes_without_tls() {
    let disk = sparse_disk();
    let served =
        Served::new(|dir, exports| over_tcp(dir, exports, Arc::new(AtomicBool::new(true)))).with("one", disk.clone());
    let port = served.server.as_ref().unwrap().address().unwrap().port();
    let dir = served.dir.path().to_str().unwrap().to_owned();
    let uri = format!("nbds://localhost:{port}/one?tls-certificates={dir}");
    let text = good("nbdinfo", &[&uri]);
    assert!(text.contains("newstyle-fixed with TLS") && text.contains("base:allocation"), "{text}");
    good("nbdcopy", &["--connections=4", &uri, served.file("copy").to_str().unwrap()]);
    assert!(fs::read(served.file("copy")).unwrap() == disk.snapshot());
    let creds = format!("tls-creds-x509,id=tls,dir={dir},endpoint=client");
    let image = format!("driver=nbd,host=localhost,port={port},export=one,tls-creds=tls");
    let info = good("qemu-img", &["info", "--object", &creds, "--image-opts", &image]);
    assert!(info.contains("8388608 bytes"), "{info}");

    let refused = run("nbdinfo", &[&format!("nbd://localhost:{port}/one")]);
    assert!(!refused.status.success());
    assert!(!run("nbdinfo", &["--list", &format!("nbd://localhost:{port}")]).status.success());
    // A client without a certificate: it may only know the authority.
    let stranger = served.file("stranger");
    fs::create_dir(&stranger).unwrap();
    fs::copy(served.file("ca-cert.pem"), stranger.join("ca-cert.pem")).unwrap();
    let refused = run("nbdinfo", &[&format!("nbds://localhost:{port}/one?tls-certificates={}", stranger.display())]);
    assert!(!refused.status.success(), "no certificate, no disk");
    plain_text_does_not_count(port);
    served.stop();
}

fn plain_text_does_not_count(port: u16) {
    let connect = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream
    };
    let option = |option: u32, data: &[u8]| {
        [b"IHAVEOPT", &option.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
    };
    let mut stream = connect();
    for (number, data) in [(7, &b"\0\0\0\x03one\0\0"[..]), (3, b""), (8, b""), (6, b"junk"), (99, b"")] {
        stream.write_all(&option(number, data)).unwrap();
        let mut head = [0; 20];
        stream.read_exact(&mut head).unwrap();
        assert_eq!(head[12..16], 0x8000_0005u32.to_be_bytes(), "option {number} before TLS");
        let len = u32::from_be_bytes(head[16..].try_into().unwrap());
        stream.read_exact(&mut vec![0; len as usize]).unwrap();
    }
    // An option that somebody put behind STARTTLS in plain text: the handshake fails on it.
    stream.write_all(&[option(5, b""), option(8, b"")].concat()).unwrap();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert_eq!(rest[8..16], [0, 0, 0, 5, 0, 0, 0, 1], "the acknowledgement of STARTTLS");
    assert!(!rest[20..].windows(8).any(|bytes| bytes == 0x0003_e889_0455_65a9u64.to_be_bytes()), "and no more answers");
    let mut stream = connect();
    stream.write_all(&option(1, b"one")).unwrap();
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0, "EXPORT_NAME has no answer that refuses");
}
