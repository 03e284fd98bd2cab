//! Misbehaviour on demand: what happens to the next requests.
//!
//! Two sources, in this order: a script, one entry for each request, and a seeded random choice for requests that the script
//! does not reach. Nothing here is a property of a real device; see [`Quirks`](crate::Quirks) for those.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

/// What happens to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inject {
    /// Nothing special; steps over one request of the script.
    Pass,
    /// Answered only by [`Device::release`](crate::Device::release).
    Hold(Execute),
    /// Executed now, answered after the other requests of the same notification, last first.
    Defer,
    /// Never answered.
    Drop(Execute),
    /// Not executed; answered with this status byte.
    Refuse(u8),
    /// Executed, but the status byte is replaced.
    Status(u8),
    /// Executed, but the tail's reserved bytes are set.
    TailReserved([u8; 3]),
    /// Executed and written, but the used length is replaced.
    UsedLen(u32),
    /// Executed and written, but the used element names another chain.
    UsedId(u32),
    /// Executed and answered twice.
    Twice,
    /// Executed and answered, then the used index moves on by this count, past elements that nobody wrote.
    UsedJump(u16),
    /// Not executed; returned with nothing written and used length 0, so that an old OK stays in the driver's buffer.
    Unwritten,
    /// Not executed and never answered: the device asks for a reset.
    NeedsReset,
}

/// When a request that is not answered at once is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Execute {
    /// At once.
    Now,
    /// When it is released; its bytes are read from guest memory only then. Never, if it is dropped.
    AtRelease,
}

/// Which held requests are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// All, first come first.
    All,
    /// All, last come first.
    AllReversed,
    /// The one that came first.
    Oldest,
    /// The one that came last.
    Newest,
    /// The one at this place, counted from the oldest.
    Nth(usize),
}

/// Seeded random injection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Random {
    state: u64,
    /// One request in this many is hit; 0 hits none.
    pub one_in: u32,
    /// What a hit is chosen from; nothing happens when empty.
    pub choices: Vec<Inject>,
}

impl Random {
    /// Makes a source that depends on nothing but the seed.
    pub fn new(seed: u64, one_in: u32, choices: Vec<Inject>) -> Self {
        Self { state: seed ^ 0x9e37_79b9_7f4a_7c15, one_in, choices }
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn choose(&mut self) -> Inject {
        let hit = self.one_in != 0 && self.next().is_multiple_of(u64::from(self.one_in));
        if !hit || self.choices.is_empty() {
            return Inject::Pass;
        }
        let index = self.next() % self.choices.len() as u64;
        self.choices[index as usize]
    }
}

/// All misbehaviour that is still to come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Injection {
    /// One entry for each of the next requests.
    pub script: VecDeque<Inject>,
    /// For requests after the script.
    pub random: Option<Random>,
    /// FEATURES_OK does not stick this many times.
    pub refuse_features_ok: u32,
    /// A status of 0 (reset) is read back as non-zero for this many reads.
    pub slow_reset: u32,
    /// The configuration generation changes at this many reads of it.
    pub generation_changes: u32,
    /// No interrupt is raised, though one be due.
    pub lose_interrupts: bool,
}

impl Injection {
    /// Adds one entry to the script.
    pub fn push(&mut self, inject: Inject) {
        self.script.push_back(inject);
    }

    /// Lets `count` requests pass before what is pushed next.
    pub fn pass(&mut self, count: usize) {
        self.script.extend(core::iter::repeat_n(Inject::Pass, count));
    }

    pub(crate) fn next(&mut self) -> Inject {
        match (self.script.pop_front(), &mut self.random) {
            (Some(inject), _) => inject,
            (None, Some(random)) => random.choose(),
            (None, None) => Inject::Pass,
        }
    }
}
