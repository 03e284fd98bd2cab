//! Whose a context is.

use super::handle::Contexts;
use crate::engine::ContextKey;
use crate::platform::Platform;

/// One who has a context, and will remove it. When it goes, what the device has of the context stays with the device, and is
/// not told again to one that lost it.
pub(super) struct Claim<P: Platform> {
    pub(super) contexts: Contexts<P>,
    pub(super) key: ContextKey,
}

impl<P: Platform> Drop for Claim<P> {
    fn drop(&mut self) {
        self.contexts.shared().state.lock().engine.release_context(self.key);
        self.contexts.sweep();
    }
}
