//! The smallest NBD client that reads: no structured replies, one request at a time.

use std::io::{Error, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// One export, opened.
pub struct Nbd {
    stream: UnixStream,
    pub bytes: u64,
    cookie: u64,
}

impl Nbd {
    /// Of `nbd+unix:///NAME?socket=PATH`.
    pub fn open(uri: &str) -> Result<Self> {
        let rest = uri.strip_prefix("nbd+unix:///").expect("a Unix socket's URI");
        let (name, path) = rest.split_once("?socket=").expect("a URI with a socket");
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        // Fixed newstyle, no zeroes; option 1: the export's name.
        let mut ask = 3u32.to_be_bytes().to_vec();
        ask.extend_from_slice(b"IHAVEOPT");
        ask.extend_from_slice(&1u32.to_be_bytes());
        ask.extend_from_slice(&(name.len() as u32).to_be_bytes());
        ask.extend_from_slice(name.as_bytes());
        stream.write_all(&ask)?;
        let mut export = [0; 10];
        stream.read_exact(&mut export)?;
        let bytes = u64::from_be_bytes(export[..8].try_into().unwrap());
        Ok(Self { stream, bytes, cookie: 0 })
    }

    /// The server's error comes back as one; the connection goes on.
    pub fn read(&mut self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.cookie += 1;
        let mut ask = 0x2560_9513u32.to_be_bytes().to_vec();
        ask.extend_from_slice(&[0, 0, 0, 0]);
        ask.extend_from_slice(&self.cookie.to_be_bytes());
        ask.extend_from_slice(&offset.to_be_bytes());
        ask.extend_from_slice(&(buf.len() as u32).to_be_bytes());
        self.stream.write_all(&ask)?;
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        assert_eq!(&head[..4], &0x6744_6698u32.to_be_bytes(), "a simple reply");
        assert_eq!(&head[8..], &self.cookie.to_be_bytes());
        match u32::from_be_bytes(head[4..8].try_into().unwrap()) {
            0 => self.stream.read_exact(buf),
            error => Err(Error::from_raw_os_error(error as i32)),
        }
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        // A polite end; whether it is heard does not matter.
        let mut end = 0x2560_9513u32.to_be_bytes().to_vec();
        end.extend_from_slice(&[0, 0, 0, 2]);
        end.resize(28, 0);
        let _ = self.stream.write_all(&end);
    }
}
