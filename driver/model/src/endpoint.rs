//! Endpoints as a test describes them, and the properties that PROBE returns for them (PROTOCOL 1.6).

use alloc::vec::Vec;

const PROPERTY_RESV_MEM: u16 = 1;
const RESV_MEM_LENGTH: u16 = 20;

/// A range of IOVAs that cannot be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservedRegion {
    /// 0 for reserved, 1 for the MSI doorbell; others are for tests of drivers, and act as reserved.
    pub subtype: u8,
    /// First IOVA.
    pub first: u64,
    /// Last IOVA.
    pub last: u64,
}

impl ReservedRegion {
    /// A region that faults.
    pub fn reserved(first: u64, last: u64) -> Self {
        Self { subtype: 0, first, last }
    }

    /// The MSI doorbell window, whose writes the device handles itself.
    pub fn msi(first: u64, last: u64) -> Self {
        Self { subtype: 1, first, last }
    }

    /// Whether the doorbell lies here.
    pub fn is_msi(&self) -> bool {
        self.subtype == 1
    }

    pub(crate) fn contains(&self, iova: u64) -> bool {
        (self.first..=self.last).contains(&iova)
    }

    pub(crate) fn meets(&self, first: u64, last: u64) -> bool {
        self.first <= last && first <= self.last
    }

    fn property(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..2].copy_from_slice(&PROPERTY_RESV_MEM.to_le_bytes());
        bytes[2..4].copy_from_slice(&RESV_MEM_LENGTH.to_le_bytes());
        bytes[4] = self.subtype;
        bytes[8..16].copy_from_slice(&self.first.to_le_bytes());
        bytes[16..].copy_from_slice(&self.last.to_le_bytes());
        bytes
    }
}

const PROPERTY_OUTPUT_SIZE: u16 = 4;
const PROPERTY_PASID_SIZE: u16 = 5;
const PROPERTY_PAGE_TABLE_FORMAT: u16 = 6;
const PROPERTY_PASID_TABLE_FORMAT: u16 = 7;

/// Format of a table of context descriptors; the others are of page tables.
pub(crate) const FORMAT_SMMU_V3: u16 = 2;

/// What an endpoint can do with contexts (PROTOCOL 5.3, in the form of drafts B, C and E).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextProperties {
    /// Bits of a PASID.
    pub pasid_bits: u8,
    /// Bits of a physical address that tables may name.
    pub output_bits: u8,
    /// Formats of tables, best first: 1 VMSAv8-64, 2 SMMUv3 descriptors, 3 x86-64, 4 VT-d first stage, 5 RISC-V.
    pub formats: Vec<u16>,
}

impl Default for ContextProperties {
    fn default() -> Self {
        Self { pasid_bits: 20, output_bits: 48, formats: [4, 1, 5, 3, 2].into() }
    }
}

impl ContextProperties {
    fn append(&self, bytes: &mut Vec<u8>) {
        let mut property = |kind: u16, value: &[u8]| {
            bytes.extend_from_slice(&kind.to_le_bytes());
            bytes.extend_from_slice(&(value.len() as u16).to_le_bytes());
            bytes.extend_from_slice(value);
        };
        property(PROPERTY_OUTPUT_SIZE, &[self.output_bits, 0, 0, 0]);
        property(PROPERTY_PASID_SIZE, &[self.pasid_bits, 0, 0, 0]);
        for format in &self.formats {
            let [low, high] = format.to_le_bytes();
            match *format {
                // ASIDs of 16 bits, no hardware updates, hierarchical permissions can be off.
                1 => property(PROPERTY_PAGE_TABLE_FORMAT, &[low, high, 16, 0, 8, 0, 0, 0, 0, 0, 0, 0]),
                // Faults stall: that is how page requests come.
                FORMAT_SMMU_V3 => {
                    property(PROPERTY_PASID_TABLE_FORMAT, &[low, high, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
                }
                // No capability registers are said.
                4 => property(PROPERTY_PAGE_TABLE_FORMAT, &[[low, high, 0, 0].as_slice(), &[0; 16]].concat()),
                _ => property(PROPERTY_PAGE_TABLE_FORMAT, &[low, high, 0, 0]),
            }
        }
    }
}

/// One endpoint behind the IOMMU.
///
/// R-45 allows one MSI region and no overlaps; the model takes what it is given, so that drivers can be tested with worse.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Endpoint ID.
    pub id: u32,
    /// Reserved regions, in the order in which PROBE returns them.
    pub reserved: Vec<ReservedRegion>,
    /// Endpoints of different classes cannot share a domain: UNSUPP.
    pub class: u32,
    /// What it can do with contexts, on a device of the draft.
    pub contexts: ContextProperties,
    /// Raw property bytes that PROBE returns before the reserved regions.
    pub raw_before: Vec<u8>,
    /// Raw property bytes that PROBE returns after the reserved regions.
    pub raw_after: Vec<u8>,
    /// Raw bytes that PROBE returns in place of all properties, cut to the size of the area.
    pub raw_instead: Option<Vec<u8>>,
}

impl Endpoint {
    /// An endpoint without reserved regions.
    pub fn new(id: u32) -> Self {
        Self { id, ..Self::default() }
    }

    /// An endpoint with the MSI window of x86, 0xfee00000..=0xfeefffff.
    pub fn x86(id: u32) -> Self {
        Self { id, reserved: [ReservedRegion::msi(0xfee0_0000, 0xfeef_ffff)].into(), ..Self::default() }
    }

    /// The properties, packed without padding, or `None` when they need more than `room` bytes.
    /// Those of the draft come last.
    pub(crate) fn properties(&self, room: usize, draft: bool) -> Option<Vec<u8>> {
        if let Some(raw) = &self.raw_instead {
            return Some(raw[..raw.len().min(room)].to_vec());
        }
        let mut bytes = self.raw_before.clone();
        for region in &self.reserved {
            bytes.extend_from_slice(&region.property());
        }
        bytes.extend_from_slice(&self.raw_after);
        if draft {
            self.contexts.append(&mut bytes);
        }
        (bytes.len() <= room).then_some(bytes)
    }
}
