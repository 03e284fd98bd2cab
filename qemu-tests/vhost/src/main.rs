//! `vhost-user-iommu SOCKET`: serves a virtio-iommu of the draft, with two agents behind it, to one front end.
//!
//! It prints `listening` when the socket is there, and what the device was asked when the front end has gone.

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    linux::main()
}

#[cfg(not(target_os = "linux"))]
fn main() -> std::process::ExitCode {
    eprintln!("there is no vhost-user but on Linux");
    std::process::ExitCode::FAILURE
}

#[cfg(target_os = "linux")]
mod linux {
    use std::path::Path;
    use std::process::ExitCode;

    use anyhow::{Context as _, Result};
    use virtio_iommu_vhost::{End, Server, draft};

    /// The agents.
    const ENDPOINTS: [u32; 2] = [8, 9];

    pub(crate) fn main() -> ExitCode {
        match serve() {
            Ok(None) => ExitCode::SUCCESS,
            Ok(Some(trouble)) => {
                eprintln!("vhost-user-iommu: {trouble}");
                ExitCode::FAILURE
            }
            Err(error) => {
                eprintln!("vhost-user-iommu: {error:#}");
                ExitCode::FAILURE
            }
        }
    }

    /// Serves one front end, and says what is to be said against it.
    fn serve() -> Result<Option<String>> {
        let path = std::env::args_os().nth(1).context("usage: vhost-user-iommu SOCKET")?;
        let server = Server::listen(Path::new(&path), draft(ENDPOINTS))?;
        let backend = server.backend();
        println!("listening");
        let end = server.serve()?;
        let backend = backend.lock();
        print!("{}", backend.requests());
        let refused = match end {
            End::Closed => None,
            End::Refused(why) => Some(format!("the front end was refused: {why}")),
        };
        Ok(backend.trouble().map(str::to_owned).or(refused))
    }
}
