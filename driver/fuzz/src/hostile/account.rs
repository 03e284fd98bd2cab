//! What a device was asked, and what it said: which memory it may still reach by its own word.

/// What a request asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// ATTACH.
    Attach {
        /// The domain's number.
        domain: u32,
        /// The endpoint's number.
        endpoint: u32,
    },
    /// DETACH.
    Detach {
        /// The domain's number.
        domain: u32,
        /// The endpoint's number.
        endpoint: u32,
    },
    /// MAP.
    Map {
        /// The domain's number.
        domain: u32,
        /// The first and last IOVA.
        virt: (u64, u64),
        /// The first physical address.
        phys: u64,
    },
    /// UNMAP.
    Unmap {
        /// The domain's number.
        domain: u32,
        /// The first and last IOVA.
        virt: (u64, u64),
    },
    /// PROBE.
    Probe,
}

/// What an answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// It was done.
    Yes,
    /// It was not done, since there is no such thing.
    NoSuchThing,
    /// It was not done.
    No,
    /// Nothing that could be relied on.
    Nothing,
}

impl Said {
    /// Reads the length of a used entry and the status in the buffer of `writable_len` bytes, whose status was
    /// preset to 0xff (virtio 1.4, IOMMU device, device operations).
    pub fn new(used_len: u32, writable_len: u32, status: u8) -> Self {
        match status {
            0 if used_len >= writable_len => Self::Yes,
            6 => Self::NoSuchThing,
            2 | 4 | 5 | 7 | 8 => Self::No,
            0xff if used_len == 0 => Self::No,
            _ => Self::Nothing,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Mapped {
    domain: u32,
    virt: (u64, u64),
    phys: (u64, u64),
    /// Whether its MAP was answered.
    answered: bool,
    /// Whether the domain died since: whatever is answered, it is gone then.
    dead: bool,
}

/// The account of one device.
#[derive(Debug, Default)]
pub struct Account {
    /// Whether endpoints that are in no domain are blocked.
    pub closed: bool,
    /// Endpoints that may be in a domain, with the domain.
    possible: Vec<(u32, u32)>,
    maps: Vec<Mapped>,
}

impl Account {
    /// A request was made.
    pub fn asked(&mut self, ask: Ask) {
        match ask {
            Ask::Attach { domain, endpoint } => self.possible.push((domain, endpoint)),
            Ask::Map { domain, virt, phys } => {
                let phys = (phys, phys.saturating_add(virt.1.saturating_sub(virt.0)));
                self.maps.push(Mapped { domain, virt, phys, answered: false, dead: false });
            }
            Ask::Detach { .. } | Ask::Unmap { .. } | Ask::Probe => {}
        }
    }

    /// A request was answered.
    pub fn answered(&mut self, ask: Ask, said: Said) {
        match (ask, said) {
            (Ask::Attach { domain, endpoint }, Said::No | Said::NoSuchThing)
            | (Ask::Detach { domain, endpoint }, Said::Yes | Said::NoSuchThing) => {
                let at = self.possible.iter().position(|pair| *pair == (domain, endpoint));
                at.map(|at| self.possible.swap_remove(at));
                self.bury();
            }
            (Ask::Map { domain, virt, .. }, said) => {
                let refused = matches!(said, Said::No | Said::NoSuchThing);
                let asked = |map: &Mapped| !map.answered && map.domain == domain && map.virt == virt;
                if let Some(at) = self.maps.iter().position(asked) {
                    self.maps[at].answered = true;
                    if refused || self.maps[at].dead {
                        self.maps.swap_remove(at);
                    }
                }
            }
            (Ask::Unmap { domain, virt }, Said::Yes) => {
                let gone = |map: &Mapped| {
                    map.domain == domain && map.answered && virt.0 <= map.virt.0 && map.virt.1 <= virt.1
                };
                self.maps.retain(|map| !gone(map));
            }
            _ => {}
        }
    }

    /// The bypass was opened or closed.
    pub fn set_closed(&mut self, closed: bool) {
        self.closed = closed;
        self.bury();
    }

    /// Domains without endpoints are dead, and their mappings with them, where nothing bypasses.
    fn bury(&mut self) {
        let Self { closed: true, possible, maps } = self else { return };
        for map in maps.iter_mut() {
            map.dead |= possible.iter().all(|(domain, _)| *domain != map.domain);
        }
        maps.retain(|map| !(map.dead && map.answered));
    }

    /// A mapping by which the device may reach any byte of a range.
    pub fn reaching(&self, first: u64, last: u64) -> Option<String> {
        let found = self.maps.iter().find(|map| map.phys.0 <= last && first <= map.phys.1)?;
        Some(format!("{found:x?}"))
    }
}
