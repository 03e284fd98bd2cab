//! An IOTLB that keeps what it found until it is told to forget it: pages, and the tables on the way to them.

use alloc::collections::BTreeMap;

use super::{Allowed, Place, Table, Translation, WalkFault};
use crate::fault::AccessKind;
use crate::memory::GuestMemory;

/// Pages, and tables on the way, that are kept. The first goes for one more.
const LIMIT: usize = 4096;

/// What a device cached of one page table.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    /// By first address.
    pages: BTreeMap<u64, Translation>,
    /// Tables by their level and the first address that they translate.
    tables: BTreeMap<(u32, u64), Kept>,
}

/// A table on the way, and the last address that it translates.
#[derive(Clone, Copy, Debug)]
struct Kept {
    place: Place,
    last: u64,
}

impl Cache {
    /// Translates by what is cached, and walks the table, from the lowest cached table on, for what is not.
    ///
    /// # Errors
    ///
    /// [`WalkFault`]. That something is not present is never cached.
    pub fn translate(
        &mut self,
        table: &Table,
        mem: &dyn GuestMemory,
        address: u64,
        kind: AccessKind,
    ) -> Result<Translation, WalkFault> {
        let found = self.pages.range(..=address).next_back().map(|(_, page)| *page);
        let page = match found.filter(|page| address <= page.last) {
            Some(page) => page,
            None => self.walk(table, mem, address)?,
        };
        if page.permits(kind) { Ok(page) } else { Err(WalkFault::Permission) }
    }

    fn walk(&mut self, table: &Table, mem: &dyn GuestMemory, address: u64) -> Result<Translation, WalkFault> {
        let regime = table.regime(address)?;
        let root = Place { table: regime.root, level: regime.top_level, allowed: Allowed::ALL };
        let lowest = (0..regime.top_level).find_map(|level| {
            let first = address & !regime.span(level + 1);
            self.tables.get(&(level, first)).map(|kept| kept.place)
        });
        let tables = &mut self.tables;
        let visit = |place: Place| {
            let span = regime.span(place.level + 1);
            let kept = Kept { place, last: address | span };
            insert(tables, (place.level, address & !span), kept);
        };
        let page = table.walk_from(mem, &regime, lowest.unwrap_or(root), address, visit)?;
        insert(&mut self.pages, page.first, page);
        Ok(page)
    }

    /// Forgets pages that meet the range and, unless only leaf entries changed, the tables on the way to it.
    pub fn invalidate(&mut self, first: u64, last: u64, leaf_only: bool) {
        self.pages.retain(|_, page| page.last < first || last < page.first);
        if !leaf_only {
            self.tables.retain(|(_, start), kept| kept.last < first || last < *start);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.pages.clear();
        self.tables.clear();
    }

    /// How many pages are cached.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether no page is cached.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

fn insert<K: Ord + Copy, V>(map: &mut BTreeMap<K, V>, key: K, value: V) {
    if map.len() >= LIMIT {
        map.pop_first();
    }
    map.insert(key, value);
}
