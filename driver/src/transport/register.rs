//! A register at a fixed address.

use core::ptr::NonNull;
use safe_mmio::UniqueMmioPointer;
use safe_mmio::fields::ReadWrite;

/// A device register of type `T`, aligned, in a mapping that stays.
///
/// # Invariants
/// The pointer is aligned for `T` and points into device memory that stays mapped.
pub(super) struct Register<T>(NonNull<ReadWrite<T>>);

// SAFETY: device memory belongs to no thread; every access is one volatile load or store.
unsafe impl<T: Send> Send for Register<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Register<T> {}

impl<T> Register<T> {
    /// # Safety
    /// `address` points at a mapped device register that fits `T` and stays mapped as long as this exists.
    pub(super) unsafe fn new(address: NonNull<u8>) -> Self {
        // INVARIANT: the caller's promise.
        Self(address.cast())
    }
}

macro_rules! access {
    ($($t:ty),*) => {$(
        impl Register<$t> {
            #[inline]
            pub(super) fn read(&self) -> $t {
                // SAFETY: valid by the type's invariant. The pointer lives for one access; accesses of other
                // CPUs to the same register are single and volatile too, and device memory is not subject to
                // the compiler's idea of a data race.
                let mut register = unsafe { UniqueMmioPointer::new(self.0) };
                <$t>::from_le(register.read())
            }

            #[inline]
            pub(super) fn write(&self, value: $t) {
                // SAFETY: as in `read`.
                let mut register = unsafe { UniqueMmioPointer::new(self.0) };
                register.write(value.to_le());
            }
        }
    )*};
}
access!(u8, u16, u32);
