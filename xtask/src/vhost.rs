//! The program that serves an IOMMU over vhost-user.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::{command, paths, progress};

/// Builds it, and says where it is.
///
/// # Errors
///
/// When it does not build, as on a host that is not Linux.
pub(crate) fn build_server() -> Result<PathBuf> {
    if !cfg!(target_os = "linux") {
        bail!("there is no vhost-user but on Linux");
    }
    progress::note("building what serves the IOMMU over vhost-user");
    command::run(&mut command::cargo(&["build", "--package", "virtio-iommu-vhost"]))?;
    let server = paths::target().join("debug/vhost-user-iommu");
    if !server.is_file() {
        bail!("the build left nothing at {}", server.display());
    }
    Ok(server)
}
