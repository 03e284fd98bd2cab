//! Contexts by PASID, on a model of the device in a guest's memory.

use alloc::string::String;

use virtio_iommu::contexts::table::{PageTable, TableFormat, TableOptions};
use virtio_iommu::contexts::{Contexts, ContextsOptions, Pasid};
use virtio_iommu::{EndpointId, Iova, IovaRange, Options, PhysAddr, Prot, Viommu};
use virtio_iommu_model::{Config, Device, Endpoint};

use super::super::meter::Meter;
use super::super::rows::{End, Rig};
use super::super::text;
use super::below::Below;
use crate::guest::{Guest, VirtualIommu};

const AGENT: EndpointId = EndpointId::new(8);
const PAGE: u64 = 4096;
const GUEST_BASE: u64 = 0x4000_0000;
const GUEST_PAGES: usize = 256;
const READ_WRITE: Prot = Prot::READ.union(Prot::WRITE);
/// What is mapped and unmapped.
const TRIED: u64 = 0x40_0000;
/// What stays mapped beside it, so that no table comes or goes.
const NEIGHBOUR: u64 = TRIED + PAGE;

/// A guest with a domain of contexts. It stays as it is when the row is done.
struct Draft {
    device: VirtualIommu,
    driver: Viommu<Guest>,
    contexts: Contexts<Guest>,
    /// Where a page of the guest's is.
    page: PhysAddr,
}

impl Draft {
    fn new() -> Result<Self, String> {
        let guest = Guest::new(GUEST_BASE, GUEST_PAGES, 1).map_err(text)?;
        let page = PhysAddr::new(guest.allocate(1, 1).map_err(text)?);
        let mut device = Device::new(Config { bypass: false, ..Config::contexts() });
        device.add_endpoint(Endpoint::new(AGENT.get()));
        let device = VirtualIommu::new(device, guest.clone());
        let options = Options { accept_contexts: true, ..Options::default() };
        let staged = Viommu::start(device.clone(), guest, options).map_err(text)?;
        staged.introduce(AGENT).map_err(text)?;
        let driver = staged.go_live().map_err(text)?;
        let contexts = driver.create_contexts(ContextsOptions::default()).map_err(text)?;
        driver.attach(AGENT, contexts.domain()).map_err(text)?;
        Ok(Self { device, driver, contexts, page })
    }
}

fn pasid(number: u32) -> Result<Pasid, String> {
    Pasid::new(number).ok_or_else(|| "no PASID".into())
}

/// Maps and unmaps a page of a mapped context.
pub(super) fn mapped(_: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    let draft = Draft::new()?;
    let mut context = draft.contexts.add_mapped(pasid(1)?).map_err(text)?;
    let (iova, page) = (Iova::new(TRIED), draft.page);
    let range = range(TRIED)?;
    let name = "context_map_unmap";
    let mut below = Below::device(meter, &draft.device, &[]);
    meter.measure([name], 1, |laps| {
        below.during(|| {
            laps.time(0, || {
                // SAFETY: a page of the guest's that nothing else uses, and that is never freed.
                unsafe { context.map(iova, page, PAGE, READ_WRITE) }.map_err(text)?;
                context.unmap(range).map_err(text)
            })
        })
    })?;
    below.state(meter, name);
    below.state_asked(meter, name);
    Ok(End::Measured)
}

/// A page of an owned context: into the table, out of it, and INVALIDATE.
pub(super) fn owned(_: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    let draft = Draft::new()?;
    let table = PageTable::new(TableFormat::X86_64, draft.driver.clone(), TableOptions::default());
    let added = draft.contexts.add_owned(pasid(1)?, table.map_err(text)?, 0);
    let mut context = added.map_err(|not_added| text(not_added.error))?;
    let page = draft.page;
    // SAFETY: a page of the guest's that nothing else uses, and that is never freed.
    unsafe { context.map(Iova::new(NEIGHBOUR), page, PAGE, READ_WRITE) }.map_err(text)?;
    let (iova, range) = (Iova::new(TRIED), range(TRIED)?);
    let names = ["context_table_map_page", "context_table_unmap_page", "context_invalidate_page"];
    let mut below = names.map(|_| Below::device(meter, &draft.device, &[]));
    meter.measure(names, 1, |laps| {
        let [map, unmap, invalidate] = &mut below;
        // SAFETY: as above.
        let mapped = map.during(|| laps.time(0, || unsafe { context.map(iova, page, PAGE, READ_WRITE) }));
        mapped.map_err(text)?;
        unmap.during(|| laps.time(1, || context.unmap_later(range))).map_err(text)?;
        invalidate.during(|| laps.time(2, || context.invalidate())).map_err(text)
    })?;
    for (name, below) in names.into_iter().zip(&below) {
        below.state(meter, name);
        below.state_asked(meter, name);
    }
    Ok(End::Measured)
}

fn range(start: u64) -> Result<IovaRange, String> {
    IovaRange::from_len(Iova::new(start), PAGE).ok_or_else(|| "no range".into())
}
