//! Rules for drivers (PROTOCOL 2.1), checked on each request before it is executed.

use crate::iommu::Iommu;
use crate::number::{feature, flag};
use crate::request::Request;

/// What is checked of a request besides its fields.
pub(crate) struct Envelope {
    pub(crate) head_reserved: [u8; 3],
    pub(crate) writable_len: u64,
    /// Whether the endpoint of an ATTACH was probed before.
    pub(crate) probed: bool,
}

type Report<'a, 'f> = &'a mut (dyn FnMut(&'static str, &'static str) + 'f);

/// Reports every rule that a request breaks.
pub(crate) fn check(iommu: &Iommu, request: &Request, envelope: &Envelope, report: Report<'_, '_>) {
    if envelope.head_reserved != [0; 3] {
        report("D-08", "head.reserved is not 0");
    }
    if request.domain().is_some_and(|domain| {
        iommu.active(feature::DOMAIN_RANGE) && !iommu.config.domain_range.contains(&domain)
    }) {
        report("D-11", "the domain is outside the domain range");
    }
    match *request {
        Request::Attach { .. } => check_attach(iommu, request, envelope, report),
        // With the draft it is flags and a PASID, which the request itself judges.
        Request::Detach { reserved, .. } if reserved != 0 && !iommu.active(feature::ATTACH_TABLE) => {
            report("D-16", "DETACH.reserved is not 0");
        }
        Request::Map { .. } => check_map(iommu, request, report),
        Request::Unmap { .. } => check_unmap(iommu, request, report),
        Request::Probe { reserved_zero, .. } => {
            if envelope.writable_len != u64::from(iommu.config.probe_size) + 4 {
                report("D-27", "the properties area is not probe_size bytes");
            }
            if !reserved_zero {
                report("D-28", "PROBE.reserved is not 0");
            }
        }
        Request::Malformed | Request::Truncated { .. } => report("core", "the request is too short"),
        Request::Unknown { .. } => report("core", "the request's type is unknown, or its feature is off"),
        Request::Detach { .. } => {}
        Request::AttachTable { .. }
        | Request::Invalidate { .. }
        | Request::PageResponse { .. }
        | Request::MapContext { .. }
        | Request::UnmapContext { .. } => {}
    }
}

fn check_attach(iommu: &Iommu, request: &Request, envelope: &Envelope, report: Report<'_, '_>) {
    let Request::Attach { domain, endpoint, flags, reserved } = *request else {
        return;
    };
    if iommu.active(feature::PROBE) && iommu.endpoints.contains_key(&endpoint) && !envelope.probed {
        report("D-07", "ATTACH of an endpoint that was never probed");
    }
    if reserved != 0 {
        report("D-12", "ATTACH.reserved is not 0");
    }
    let bypass = flags & flag::ATTACH_BYPASS != 0;
    if iommu.domains.get(&domain).is_some_and(|target| target.bypass != bypass) {
        report("D-14", "the bypass flag is not the domain's");
    }
    if bypass && !iommu.active(feature::BYPASS_CONFIG) {
        report("D-15", "the bypass flag without BYPASS_CONFIG");
    }
    let draft = if iommu.active(feature::ATTACH_TABLE) { flag::ATTACH_ANONYMOUS } else { 0 };
    if flags & !flag::ATTACH_BYPASS & !draft != 0 {
        report("D-15", "undefined flags in ATTACH");
    }
}

fn check_map(iommu: &Iommu, request: &Request, report: Report<'_, '_>) {
    let Request::Map { domain, virt_start, virt_end, phys_start, flags } = *request else {
        return;
    };
    check_input_range(iommu, virt_start, virt_end, report);
    if flags & !(flag::MAP_READ | flag::MAP_WRITE | flag::MAP_MMIO) != 0 {
        report("D-17", "undefined flags in MAP");
    }
    if iommu.domains.get(&domain).is_some_and(|target| target.bypass) {
        report("D-18", "MAP on a bypass domain");
    }
    check_last_address(virt_end, report);
    let mask = iommu.config.granule().map_or(0, |granule| granule - 1);
    if (virt_start | phys_start | virt_end.wrapping_add(1)) & mask != 0 {
        report("I5", "MAP is not aligned to the granule");
    }
    if iommu.domains.get(&domain).is_some_and(|target| target.overlap(virt_start, virt_end).is_some()) {
        report("I5", "MAP overlaps a mapping");
    }
    if virt_end <= virt_start {
        report("D-19", "virt_end is not above virt_start");
    }
    if flags & flag::MAP_MMIO != 0 && !iommu.active(feature::MMIO) {
        report("D-22", "the MMIO flag without its feature");
    }
    if iommu.meets_reserved(domain, virt_start, virt_end) {
        report("D-33", "MAP in a reserved region");
    }
    if virt_end.checked_sub(virt_start).is_none_or(|span| phys_start.checked_add(span).is_none()) {
        report("D-41", "the physical range ends before it starts, or beyond 2^64-1");
    }
}

fn check_unmap(iommu: &Iommu, request: &Request, report: Report<'_, '_>) {
    let Request::Unmap { domain, virt_start, virt_end, reserved } = *request else {
        return;
    };
    check_input_range(iommu, virt_start, virt_end, report);
    check_last_address(virt_end, report);
    if reserved != 0 {
        report("D-23", "UNMAP.reserved is not 0");
    }
    let Some(target) = iommu.domains.get(&domain) else {
        return;
    };
    let splits_low = target.lookup(virt_start).is_some_and(|mapping| mapping.virt_first != virt_start);
    let splits_high = target.lookup(virt_end).is_some_and(|mapping| mapping.virt_last != virt_end);
    if splits_low || splits_high {
        report("D-25", "UNMAP starts or ends inside a mapping");
    }
    if target.bypass {
        report("D-26", "UNMAP on a bypass domain");
    }
}

fn check_last_address(last: u64, report: Report<'_, '_>) {
    if last == u64::MAX {
        report("I5", "the range ends at 2^64-1, which ends another VMM");
    }
}

fn check_input_range(iommu: &Iommu, first: u64, last: u64, report: Report<'_, '_>) {
    let range = &iommu.config.input_range;
    if iommu.active(feature::INPUT_RANGE) && (first < *range.start() || last > *range.end()) {
        report("D-10", "the IOVAs are outside the input range");
    }
}
