//! Records of mappings, with the boundaries that their MAP requests had.
//!
//! ```text
//!              MAP ok                begin unmap              UNMAP ok
//!   Mapping ------------> Live ---------------> Unmapping ---------------> gone, or Released
//!      |  \ MAP refused: Returned, gone            ^  | \ failed or unknown
//!      |  unknown                          Apart -'<-'  v   (RANGE for several: each by itself)
//!      '------------------------------------> Quarantined ---- answered, or reclaimed ----> gone, or Released
//! ```
//! When the domain dies with its last endpoint, live records stay: they are replayed (Live, Replaying, Live) when it
//! gets an endpoint again, or go without a request when they are unmapped.
//!
//! In a domain that defers unmapping a record is Deferred between Live and Unmapping, see [`super::deferred`].
//!
//! One that is in quarantine although its owner did not unmap it, since mapping it again went wrong, becomes live again
//! when it is known that the device does not have it.
//!
//! A record whose memory the driver holds does not go by itself: it is Released until the memory went back to its
//! owner. One whose MAP was refused is Returned until whoever sent that took it.
//!
//! Addresses that are not free for another reason have a record too, so that there is one place that says who has them:
//! see [`Holder`].

use super::Tag;
use crate::addr::{IovaRange, PhysAddr};
use crate::dma::{HeldMemory, Kept};
use crate::prot::Prot;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum MappingState {
    /// MAP was, or is about to be, sent.
    Mapping,
    /// The device confirmed the MAP.
    Live,
    /// Its owner unmapped it, and the domain's next flush will.
    Deferred,
    /// MAP was, or is about to be, sent again.
    Replaying,
    /// UNMAP was, or is about to be, sent.
    Unmapping,
    /// UNMAP for this and others was answered RANGE: whoever sent it unmaps each by itself.
    Apart,
    /// The device may still reach the memory, and nobody uses the mapping, or its owner cannot.
    Quarantined,
    /// The same, and the device owes an answer about it.
    QuarantinedInFlight,
    /// The device was reset, and an endpoint may still reach the memory by a number that the domain does not have any
    /// more: no UNMAP can be sent for it.
    Stranded,
    /// The device cannot reach the memory any more, which waits to go back to its owner.
    Released,
    /// The device refused the MAP. Address and memory wait for whoever sent it, and for nobody else: he rolls his
    /// list back, and what lies in it is to be his alone until then.
    Returned,
}

/// What a mapping allows, and what its maker calls it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Purpose {
    pub prot: Prot,
    /// For people who look for whoever forgot to unmap.
    pub tag: Tag,
}

/// Names a list of mappings that are made together, and rolled back together: what lies at their addresses by then
/// may be another's.
///
/// A number of 48 bits, where [`Making`] has it: at a million lists a second they repeat after nine years.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListId(u64);

impl ListId {
    #[inline(always)]
    pub(super) const fn new(number: u64) -> Self {
        Self(number << 16)
    }

    #[inline(always)]
    pub(super) fn next(self) -> Self {
        Self(self.0.wrapping_add(Self::new(1).0))
    }
}

/// Whose a mapping is, and what it allows: the list that it was made with, its tag, and its flags, from the highest bits to
/// the lowest. One word, since all of it is written at once.
#[derive(Clone, Copy)]
pub(super) struct Making(u64);

impl Making {
    const NONE: Self = Self(0);

    #[inline(always)]
    pub(super) fn new(Purpose { prot, tag }: Purpose, ListId(list): ListId) -> Self {
        // The standard's flags take three bits.
        Self(list | u64::from(tag.0) | u64::from(prot.bits() as u8))
    }

    fn list(self) -> ListId {
        ListId::new(self.0 >> 16)
    }
}

/// Names a mapping's record as long as it is there, and maybe another one later: who has a handle has to know the
/// address too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MappingHandle(pub(super) u32);

impl MappingHandle {
    /// Names none.
    pub(crate) const UNKNOWN: Self = Self(u32::MAX);
}

/// Who has the addresses of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Holder {
    /// The record is not in use.
    Nobody,
    /// They are not usable: the end of the list.
    End,
    /// They are reserved for good.
    Reserved,
    /// Whoever allocated them, and did not map them yet.
    Taken,
    /// Nobody; they are kept for the next one who wants as many.
    Cached,
    Mapping,
    /// A mapping, the first of a [list](super::space) that may be unmapped in one step.
    Head,
    /// A mapping, another one of such a list. It is found by its neighbours alone: a record that is not in use may say so.
    Part,
}

impl Holder {
    /// Whether it is a mapping of any kind.
    #[inline(always)]
    pub(super) fn is_mapping(self) -> bool {
        matches!(self, Self::Mapping | Self::Head | Self::Part)
    }
}

/// A range of addresses that is not free: most are mappings, and to the rest of the engine all are.
///
/// Small, since there may be millions: what held memory has in common with its mapping is kept once, and the links of
/// [`Order`](super::space) lie between the rest.
#[repr(C)]
pub(crate) struct Record {
    /// Never changed but by the space that the record is in.
    pub range: IovaRange,
    pub phys: PhysAddr,
    kept: Option<Kept>,
    making: Making,
    pub(super) left: u32,
    pub(super) right: u32,
    pub(super) prev: u32,
    pub(super) next: u32,
    pub(super) gap: u32,
    pub(super) rank: i8,
    /// Whether somebody counts on it, who will unmap it. Such a record does not go by itself, in quarantine neither.
    pub owned: bool,
    // The following four are looked at together, in one word.
    pub state: MappingState,
    pub(super) holder: Holder,
    /// Whether the device may have it. False when the domain died since.
    pub on_device: bool,
    /// Whether its bytes are in the domain's count of mapped ones.
    pub counted: bool,
}

/// What most records are like at each step of their way: a state, who has it, whether it is on the device, and whether it
/// counts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing(u32);

impl Standing {
    pub(super) const MAPPING: Self = Self::new(MappingState::Mapping, Holder::Mapping, true, false);
    pub(super) const LIVE: Self = Self::new(MappingState::Live, Holder::Mapping, true, true);
    pub(super) const UNMAPPING: Self = Self::new(MappingState::Unmapping, Holder::Mapping, true, true);
    pub(super) const DEFERRED: Self = Self::new(MappingState::Deferred, Holder::Mapping, true, true);

    const fn new(state: MappingState, holder: Holder, on_device: bool, counted: bool) -> Self {
        Self(u32::from_ne_bytes([state as u8, holder as u8, on_device as u8, counted as u8]))
    }
}

#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<Record>() == 80);

impl Record {
    pub(super) fn new(range: IovaRange, holder: Holder) -> Self {
        Self {
            range,
            phys: PhysAddr::new(0),
            kept: None,
            making: Making::NONE,
            left: u32::MAX,
            right: u32::MAX,
            prev: u32::MAX,
            next: u32::MAX,
            gap: 0,
            rank: 0,
            owned: false,
            state: MappingState::Mapping,
            holder,
            on_device: false,
            counted: false,
        }
    }

    /// Makes a mapping of taken or cached addresses, which hold no memory and do not count.
    #[inline(always)]
    pub(super) fn begin(&mut self, holder: Holder, phys: PhysAddr, purpose: Purpose, list: ListId) {
        debug_assert!(self.kept.is_none() && !self.counted, "it was a mapping");
        (self.phys, self.making) = (phys, Making::new(purpose, list));
        self.owned = false;
        (self.state, self.holder, self.on_device) = (MappingState::Mapping, holder, true);
    }

    /// Holds memory for the mapping that it has just become.
    pub(super) fn hold(&mut self, held: HeldMemory) {
        self.kept = Some(held.into_kept());
    }

    /// What [`begin`](Self::begin) does, for one of a list, of a record that was in use before or has the addresses of the list.
    /// Where it lies is said by the caller; what is kept of the tree, and of lists, is what it was before.
    #[inline(always)]
    pub(super) fn begin_listed(&mut self, holder: Holder, phys: PhysAddr, making: Making) {
        debug_assert!(self.kept.is_none(), "it was a mapping");
        (self.phys, self.making) = (phys, making);
        (self.owned, self.state, self.holder) = (false, MappingState::Mapping, holder);
        (self.on_device, self.counted) = (true, false);
    }

    #[inline(always)]
    pub(super) fn standing(&self) -> Standing {
        Standing::new(self.state, self.holder, self.on_device, self.counted)
    }

    /// The device confirmed its MAP, which somebody waits for.
    #[inline(always)]
    pub(super) fn make_live(&mut self, holder: Holder) {
        self.owned = true;
        (self.state, self.holder, self.on_device, self.counted) = (MappingState::Live, holder, true, true);
    }

    /// What it allows.
    pub(crate) fn prot(&self) -> Prot {
        Prot::from_bits_retain((self.making.0 as u8).into())
    }

    /// What its maker calls it.
    pub(super) fn tag(&self) -> Tag {
        Tag(self.making.0 as u16 & Tag::BITS)
    }

    /// Its maker's word for it from now on.
    #[inline(always)]
    pub(super) fn set_tag(&mut self, Tag(tag): Tag) {
        self.making = Making(self.making.0 & !u64::from(Tag::BITS) | u64::from(tag));
    }

    /// Whether it was made with this list.
    pub(crate) fn is_of(&self, list: ListId) -> bool {
        self.making.list() == list
    }

    /// Whether both were made together.
    pub(super) fn is_beside(&self, other: &Self) -> bool {
        self.is_of(other.making.list())
    }

    /// Whether there is memory that goes back to its owner when the device cannot reach it any more.
    pub(crate) fn holds_memory(&self) -> bool {
        self.kept.is_some()
    }

    pub(super) fn take_held(&mut self, granule: u64) -> Option<HeldMemory> {
        // It was a `usize` when it was mapped.
        let len = self.range.len_bytes().unwrap_or(0) as usize;
        Some(self.kept.take()?.into_held(self.phys, len, granule as usize))
    }

    /// Whether the device may have it in a domain without endpoints, now or when it answers.
    pub(crate) fn is_in_doubt(&self) -> bool {
        match self.state {
            MappingState::Live | MappingState::Apart | MappingState::Deferred => self.on_device,
            MappingState::Mapping | MappingState::Replaying | MappingState::Unmapping => true,
            MappingState::Stranded => true,
            MappingState::QuarantinedInFlight => true,
            MappingState::Quarantined => self.on_device,
            MappingState::Released | MappingState::Returned => false,
        }
    }

    /// Whether it is out of use until an answer, a detachment or a recovery tells what became of it.
    pub(crate) fn is_stuck(&self) -> bool {
        matches!(
            self.state,
            MappingState::Quarantined | MappingState::QuarantinedInFlight | MappingState::Stranded
        )
    }

    /// Whether it has to be mapped again, since the domain died.
    pub(crate) fn needs_replay(&self) -> bool {
        !self.on_device && self.state == MappingState::Live
    }

    /// Whether it adds nothing to a [`Tally`]: so it is with nearly all, which keeps counting cheap.
    #[inline]
    fn is_plain(&self) -> bool {
        use MappingState::{Deferred, Live, Mapping, Replaying, Unmapping};
        self.on_device && matches!(self.state, Mapping | Live | Replaying | Deferred | Unmapping)
    }
}

/// Counts of mappings that something is the matter with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// In quarantine, with nobody who could unmap them.
    pub quarantined: u64,
    pub quarantined_bytes: u64,
    /// To be mapped again.
    pub lost: u64,
    pub stranded: u64,
    pub released: u64,
    /// Those that the device does not have in a domain without endpoints.
    pub certain: u64,
}

impl Tally {
    /// Changes a record, and counts what it is then instead of what it was.
    #[inline]
    pub(super) fn change<R>(&mut self, record: &mut Record, change: impl FnOnce(&mut Record) -> R) -> R {
        if !record.is_plain() {
            self.count(record, |count, by| *count -= by);
        }
        let result = change(record);
        if !record.is_plain() {
            self.count(record, |count, by| *count += by);
        }
        result
    }

    /// Counts a record.
    #[cfg(test)]
    pub(super) fn remember(&mut self, record: &Record) {
        self.count(record, |count, by| *count += by);
    }

    /// Counts a record no more.
    #[inline]
    pub(super) fn forget(&mut self, record: &Record) {
        if !record.is_plain() {
            self.count(record, |count, by| *count -= by);
        }
    }

    #[cold]
    fn count(&mut self, record: &Record, by: fn(&mut u64, u64)) {
        let quarantined = match record.state {
            MappingState::Quarantined | MappingState::QuarantinedInFlight => !record.owned,
            state => state == MappingState::Stranded,
        };
        let bytes = if quarantined { record.range.len_bytes().unwrap_or(0) } else { 0 };
        by(&mut self.quarantined, quarantined.into());
        by(&mut self.quarantined_bytes, bytes);
        by(&mut self.lost, record.needs_replay().into());
        by(&mut self.stranded, (record.state == MappingState::Stranded).into());
        by(&mut self.released, (record.state == MappingState::Released).into());
        by(&mut self.certain, (!record.is_in_doubt()).into());
    }
}
