//! Where sockets are.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// A path that nothing has yet, for a socket of this kind: in a temporary directory, since the path of a socket is short.
pub(crate) fn path(kind: &str) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("qemu-tests-{}-{number}.{kind}", std::process::id()))
}
