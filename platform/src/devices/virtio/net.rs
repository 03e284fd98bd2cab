//! A network card: whole Ethernet frames, without waiting.

use alloc::boxed::Box;
use alloc::vec::Vec;

use virtio_drivers::device::net::VirtIONetRaw;
use virtio_iommu::bridge::virtio_drivers::IommuHal;
use virtio_iommu::dma_slot;

use super::{VirtioError, Wrapped, transport};
use crate::machine::Machine;
use crate::memory::virtio_hal::KernelHal;
use crate::pci::function::Function;

dma_slot!(
    /// The network card.
    pub NetSlot
);

/// The longest frame, without its checksum.
pub const FRAME_BYTES: usize = 1514;

/// Buffers of each ring. The bounce pages have room for both.
const BUFFERS: usize = 32;
/// A frame with the header that virtio puts before it, which has 12 bytes; the driver insists on a little more.
const BUFFER_BYTES: usize = 1536;
/// The bounce pages that the card needs: one for each buffer of both rings.
pub const BOUNCE_BYTES: usize = 2 * BUFFERS * 4096;

type Driver = VirtIONetRaw<IommuHal<KernelHal, NetSlot>, Wrapped<NetSlot>, BUFFERS>;
type Buffer = Box<[u8; BUFFER_BYTES]>;

/// A network card. Nothing here waits.
///
/// # Invariants
/// A buffer in `incoming` or `outgoing` is the one that the driver was given for the token that is its index, and
/// nobody touches it before it is complete.
pub struct Net {
    // Dropped first, which resets the device, so that the buffers are nobody's when they go.
    driver: Driver,
    incoming: [Option<Buffer>; BUFFERS],
    outgoing: [Option<(Buffer, usize)>; BUFFERS],
    spare: Vec<Buffer>,
}

impl Net {
    /// Resets the device, sets its rings up through [`NetSlot`], and gives it buffers for what comes in.
    ///
    /// # Errors
    ///
    /// [`VirtioError`].
    pub fn new(machine: &Machine, function: &Function) -> Result<Self, VirtioError> {
        let driver = Driver::new(transport(machine, function)?)?;
        let mut net = Self {
            driver,
            incoming: [const { None }; BUFFERS],
            outgoing: [const { None }; BUFFERS],
            spare: (0..BUFFERS).map(|_| empty()).collect(),
        };
        for _ in 0..BUFFERS {
            net.offer(empty())?;
        }
        Ok(net)
    }

    /// The card's address.
    pub fn mac_address(&self) -> [u8; 6] {
        self.driver.mac_address()
    }

    /// A frame that came in, if there is one. Its buffer is with the device again at once.
    ///
    /// # Errors
    ///
    /// [`VirtioError`]; the card must be given up.
    pub fn receive(&mut self) -> Result<Option<Vec<u8>>, VirtioError> {
        let Some(token) = self.driver.poll_receive() else { return Ok(None) };
        let Some(Some(buffer)) = self.incoming.get_mut(usize::from(token)) else {
            return Err(VirtioError::StrayAnswer { token });
        };
        // SAFETY: the buffer of this token, by the invariant.
        let (header, len) = unsafe { self.driver.receive_complete(token, &mut buffer[..]) }?;
        let frame = header.checked_add(len).and_then(|end| buffer.get(header..end));
        let frame = frame.ok_or(VirtioError::Length { len })?.to_vec();
        if let Some(buffer) = self.incoming[usize::from(token)].take() {
            self.offer(buffer)?;
        }
        Ok(Some(frame))
    }

    /// Whether [`send`](Self::send) has a buffer. Takes back those of frames that went out.
    ///
    /// # Errors
    ///
    /// [`VirtioError`]; the card must be given up.
    pub fn can_send(&mut self) -> Result<bool, VirtioError> {
        // Bounded by what is in flight: each round ends one.
        while let Some(token) = self.driver.poll_transmit() {
            let Some(Some((buffer, len))) = self.outgoing.get(usize::from(token)) else {
                return Err(VirtioError::StrayAnswer { token });
            };
            // SAFETY: the buffer of this token, by the invariant.
            unsafe { self.driver.transmit_complete(token, &buffer[..*len]) }?;
            self.spare.extend(self.outgoing[usize::from(token)].take().map(|(buffer, _)| buffer));
        }
        Ok(!self.spare.is_empty())
    }

    /// Sends a frame, of at most [`FRAME_BYTES`].
    ///
    /// # Errors
    ///
    /// [`VirtioError`], when the frame is too long, no buffer is free, or the driver gives up.
    pub fn send(&mut self, frame: &[u8]) -> Result<(), VirtioError> {
        let len = frame.len();
        if len > FRAME_BYTES {
            return Err(VirtioError::Length { len });
        }
        let mut buffer = self.spare.pop().ok_or(virtio_drivers::Error::QueueFull)?;
        let header = self.driver.fill_buffer_header(&mut buffer[..])?;
        let end = header + len;
        buffer[header..end].copy_from_slice(frame);
        // SAFETY: the buffer goes to `outgoing`, where it stays untouched until it is complete.
        let token = unsafe { self.driver.transmit_begin(&buffer[..end]) }?;
        // INVARIANT: stored under its token.
        self.outgoing[usize::from(token)] = Some((buffer, end));
        Ok(())
    }

    /// Gives the device a buffer for a frame to come.
    fn offer(&mut self, mut buffer: Buffer) -> Result<(), VirtioError> {
        // SAFETY: the buffer goes to `incoming`, where it stays untouched until it is complete.
        let token = unsafe { self.driver.receive_begin(&mut buffer[..]) }?;
        // INVARIANT: stored under its token.
        self.incoming[usize::from(token)] = Some(buffer);
        Ok(())
    }
}

fn empty() -> Buffer {
    Box::new([0; BUFFER_BYTES])
}
