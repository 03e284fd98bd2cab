//! PROBE and the properties it returns: D-27 to D-35.

use virtio_iommu::{Introduction, Iova, MapError, PhysAddr, ReservedKind, ReservedRegion, Viommu};
use virtio_iommu_model::{Config, Endpoint, Request};

use super::{map, map_at, map_identity, new_domain, one_slot, whole_life};
use crate::support::{EP, EP2, Machine, PAGE, RW, TestPlatform};

/// Any property: the type word, the length of the value, the value.
pub(super) fn property(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = value.len() as u16;
    [&kind.to_le_bytes()[..], &len.to_le_bytes(), value].concat()
}

/// The value of RESV_MEM, with garbage where it is reserved if there is some.
fn resv_mem(subtype: u8, garbage: [u8; 3], first: u64, last: u64) -> Vec<u8> {
    [&[subtype][..], &garbage, &first.to_le_bytes(), &last.to_le_bytes()].concat()
}

/// RESV_MEM as it should be.
pub(super) fn region(subtype: u8, first: u64, last: u64) -> Vec<u8> {
    property(1, &resv_mem(subtype, [0; 3], first, last))
}

/// A device whose endpoint [`EP`] has exactly these bytes in a properties area of `probe_size`, introduced.
pub(super) fn introduced(probe_size: usize, area: Vec<u8>) -> (Machine, Viommu<TestPlatform>) {
    let machine = Machine::new(Config { probe_size: probe_size as u32, ..Config::default() });
    machine.device().add_endpoint(Endpoint { raw_instead: Some(area), ..Endpoint::new(EP.get()) });
    let staged = machine.start().unwrap();
    assert_eq!(staged.introduce(EP), Ok(Introduction::Known));
    let viommu = staged.go_live().unwrap();
    (machine, viommu)
}

/// The first and last address and the kind of each region that the driver found.
fn regions(viommu: &Viommu<TestPlatform>) -> Vec<(u64, u64, ReservedKind)> {
    let plain =
        |region: &ReservedRegion| (region.range.start().get(), region.range.last().get(), region.kind);
    viommu.reserved_regions(EP).unwrap().iter().map(plain).collect()
}

pub(super) fn regions_in(area: Vec<u8>) -> Vec<(u64, u64, ReservedKind)> {
    regions(&introduced(512, area).1)
}

/// The region that the tests look for behind something else.
pub(super) const FOUND: (u64, u64, ReservedKind) = (0x50_0000, 0x5f_ffff, ReservedKind::Msi);

pub(super) fn found() -> Vec<u8> {
    region(1, FOUND.0, FOUND.1)
}

// Seen to fail with a `RequestQueue` that rounds the area up to 8 bytes.
#[test]
fn d27_the_properties_area_is_as_long_as_the_device_says() {
    for probe_size in [0, 1, 2, 3, 4, 5, 24, 100, 511, 512, 4096, 65_532] {
        let machine = Machine::new(Config { probe_size, ..Config::default() });
        for id in [EP, EP2] {
            machine.device().add_endpoint(Endpoint::new(id.get()));
        }
        drop(machine.bring_up());
        // The next life finds another size.
        machine.device().change_config(|config| config.probe_size = probe_size / 2);
        drop(machine.bring_up());
        let entries = machine.entries().into_iter();
        let probes = entries.filter(|entry| matches!(entry.request, Request::Probe { .. }));
        let sizes: Vec<_> = probes.map(|entry| entry.writable_len - 4).collect();
        let (first, second) = (u64::from(probe_size), u64::from(probe_size / 2));
        assert_eq!(sizes, [first, first, second, second]);
    }
}

// Seen to fail with a 1 in PROBE's reserved bytes.
#[test]
fn d28_reserved_of_probe_is_zero() {
    for options in [Machine::options(), one_slot()] {
        let machine = Machine::new(Config::default());
        whole_life(&machine, options);
        let probes: Vec<_> = machine.entries().into_iter().filter(|e| e.readable_len == 72).collect();
        assert_eq!(probes.len(), 2);
        let zero = |request: &Request| matches!(request, Request::Probe { reserved_zero: true, .. });
        assert!(probes.iter().all(|entry| zero(&entry.request)));
    }
}

// Seen to fail with a `Properties::next` that reads every type as RESV_MEM.
#[test]
fn d29_properties_of_unknown_type_are_ignored() {
    // Types of drafts among them. The value could be read as a region.
    for kinds in [&[2, 3, 4, 5, 6, 7][..], &[0x7ff, 0xfff, 0x101, 0x800, 0x0ff]] {
        let value = resv_mem(0, [0; 3], 0x20_0000, 0x2f_ffff);
        let mut area: Vec<u8> = kinds.iter().flat_map(|kind| property(*kind, &value)).collect();
        area.extend(found());
        let (machine, viommu) = introduced(512, area);
        assert_eq!((regions(&viommu), viommu.granule()), (vec![FOUND], PAGE));
        let domain = new_domain(&viommu);
        viommu.attach(EP, &domain).unwrap();
        map_at(&domain, 0x20_0000, machine.memory(PAGE).phys, PAGE, RW).unwrap();
    }
}

// Seen to fail with a `Properties::next` that goes on 24 bytes after any RESV_MEM.
#[test]
fn d30_a_propertys_length_is_what_its_header_says() {
    let other = (0x20_0000, 0x2f_ffff, ReservedKind::Reserved);
    for more in [0, 1, 3, 4, 8, 24, 400] {
        let value = [resv_mem(0, [0; 3], other.0, other.1), vec![0x01; more]].concat();
        let area = [property(1, &value), found()].concat();
        assert_eq!(regions_in(area), [other, FOUND], "{more} bytes more");
        // And of a type whose usual length nobody knows.
        let area = [property(0x7ff, &vec![0x01; more]), found()].concat();
        assert_eq!(regions_in(area), [FOUND], "{more} bytes");
    }
    // Shorter than its type has: it cannot be read, and what follows can.
    for len in 0..20 {
        let value = &resv_mem(0, [0; 3], other.0, other.1)[..len];
        assert_eq!(regions_in([property(1, value), found()].concat()), [FOUND], "{len} bytes");
    }
}

// Seen to fail with a `Properties::next` that masks the type's four high bits.
#[test]
fn d31_a_property_with_reserved_bits_is_ignored() {
    for bits in (1..16).map(|bits: u16| bits << 12) {
        let (first, last) = (0x20_0000, 0x2f_ffff);
        let area = [property(1 | bits, &resv_mem(0, [0; 3], first, last)), found()].concat();
        let (machine, viommu) = introduced(512, area);
        assert_eq!(regions(&viommu), [FOUND], "reserved bits {bits:#x}");
        let domain = new_domain(&viommu);
        viommu.attach(EP, &domain).unwrap();
        map_at(&domain, first, machine.memory(PAGE).phys, PAGE, RW).unwrap();
    }
}

// Seen to fail with a `probe` that stops at the first property that is ignored.
#[test]
fn d32_parsing_goes_on_after_an_ignored_property() {
    let ignored = [
        property(0x7ff, &[9; 7]),
        property(0x1001, &[9; 20]),
        property(0xf000, &[]),
        property(0x8000, &[9; 5]),
        property(1, &[9; 4]),
        region(1, 0x2f_ffff, 0x20_0000),
        property(2, &[]).repeat(20),
    ];
    for property in &ignored {
        assert_eq!(regions_in([property.clone(), found()].concat()), [FOUND], "{property:x?}");
    }
    let last = (0x60_0000, 0x60_ffff, ReservedKind::Reserved);
    let area = [ignored.concat(), found(), ignored.concat(), region(0, last.0, last.1)].concat();
    assert_eq!(regions_in(area), [FOUND, last]);
}

// Seen to fail with a `begin_attach` that leaves out MSI windows, and with one that reserves for the first endpoint only.
#[test]
fn d33_nothing_is_mapped_in_reserved_and_msi_regions() {
    let msi = (0x40_0000, 0x40_ffff);
    let odd = (0x42_1234, 0x42_2001);
    let of_other = (0x44_0fff, 0x44_1000);
    let model = |region: (u64, u64)| virtio_iommu_model::ReservedRegion::reserved(region.0, region.1);
    let machine = Machine::new(Config { input_range: 0x3f_0000..=0x45_ffff, ..Config::default() });
    let mut endpoint = Endpoint::new(EP.get());
    endpoint.reserved = vec![virtio_iommu_model::ReservedRegion::msi(msi.0, msi.1), model(odd)];
    machine.device().add_endpoint(endpoint);
    machine.device().add_endpoint(Endpoint { reserved: vec![model(of_other)], ..Endpoint::new(EP2.get()) });
    let (machine, viommu, domain) = machine.attach_one();
    viommu.attach(EP2, &domain).unwrap();

    let memory = machine.memory(0x20 * PAGE).phys;
    let free = |at: u64, pages: u64| {
        let last = at + pages * PAGE - 1;
        [msi, odd, of_other].iter().all(|region| region.1 < at || last < region.0)
    };
    for page in 0x3f0..0x460 {
        for pages in [1, 2, 0x20] {
            let (at, len) = (page * PAGE, pages * PAGE);
            let result = map_at(&domain, at, memory, len, RW);
            let inside = at + len <= 0x46_0000;
            assert_eq!(result.is_ok(), inside && free(at, pages), "{pages} pages at {at:#x}: {result:?}");
            match result {
                Ok(()) => super::unmap(&domain, at, len).unwrap(),
                Err(MapError::InUse(_)) => assert!(inside),
                Err(_) => assert!(!inside),
            }
        }
    }
    // At their own addresses, around what is reserved: by far not all of it at once.
    map_identity(&domain, PhysAddr::new(0x3f_0000), 0x7_0000).unwrap();
    let mapped: u64 =
        machine.device().mappings(domain.id().get()).map(|m| m.virt_last - m.virt_first + 1).sum();
    assert_eq!(mapped, (0x70 - 0x10 - 2 - 2) * PAGE);
    let starts: Vec<_> =
        machine.device().mappings(domain.id().get()).map(|m| (m.virt_first, m.virt_last)).collect();
    for (start, last) in starts {
        super::unmap(&domain, start, last - start + 1).unwrap();
    }
    // The allocator takes all that is left, and the model reports each MAP that meets a region.
    let mut mapped = Vec::new();
    while let Ok(at) = map(&domain, memory, PAGE, RW) {
        assert!(free(at, 1), "{at:#x}");
        mapped.push(at);
    }
    assert_eq!(mapped.len(), 0x70 - 0x10 - 2 - 2);
}

// Seen to fail with a `reserved_region` that takes garbage there for a malformed property.
#[test]
fn d34_reserved_bytes_of_a_region_are_ignored() {
    for garbage in [[1, 0, 0], [0, 1, 0], [0, 0, 0x80], [0xff; 3]] {
        for (subtype, kind) in [(0, ReservedKind::Reserved), (1, ReservedKind::Msi)] {
            let area = property(1, &resv_mem(subtype, garbage, 0x20_0000, 0x2f_ffff));
            assert_eq!(regions_in(area), [(0x20_0000, 0x2f_ffff, kind)]);
        }
    }
}

// Seen to fail with a `reserved_region` that ignores subtypes other than 0 and 1.
#[test]
fn d35_a_region_of_unknown_subtype_is_reserved() {
    for subtype in 2..=u8::MAX {
        let (first, last) = (0x20_0000, 0x20_0fff);
        let (machine, viommu) = introduced(512, [region(subtype, first, last), found()].concat());
        assert_eq!(regions(&viommu), [(first, last, ReservedKind::Reserved), FOUND], "subtype {subtype}");
        let domain = new_domain(&viommu);
        viommu.attach(EP, &domain).unwrap();
        let mapped = map_at(&domain, first, machine.memory(PAGE).phys, PAGE, RW);
        assert!(matches!(mapped, Err(MapError::InUse(_))), "{mapped:?}");
        assert_eq!(domain.translate(Iova::new(first)), None);
    }
}
