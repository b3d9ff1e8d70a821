//! Serves a file: `serve attach FILE DIR NAME` as a block device until a line on standard input, or
//! `serve nbd FILE SOCKET`.

use std::sync::Arc;

use varve_export::disks::FileDisk;
use varve_export::nbd::{Exports, NbdServer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["attach", file, dir, name] => {
            let disk = Arc::new(FileDisk::open(file, false)?);
            let mut attached =
                varve_export::device::attach(disk, dir.as_ref(), name, false, varve_export::device::Way::Fastest)?;
            println!("{} ({})", attached.path().display(), attached.how());
            std::io::stdin().read_line(&mut String::new())?;
            attached.detach()?;
        }
        ["nbd", file, socket] => {
            let disk = Arc::new(FileDisk::open(file, false)?);
            let runtime = tokio::runtime::Runtime::new()?;
            let _inside = runtime.enter();
            let exports = Exports::new();
            exports.add("disk", disk, file)?;
            let server = NbdServer::unix(socket.as_ref(), exports)?;
            std::io::stdin().read_line(&mut String::new())?;
            runtime.block_on(server.stop());
        }
        _ => return Err("usage: serve attach FILE DIR NAME | serve nbd FILE SOCKET".into()),
    }
    Ok(())
}
