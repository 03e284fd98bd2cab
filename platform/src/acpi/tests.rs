//! Generated ACPI images: both kinds of root table, and everything that can be wrong with them.

use alloc::vec::Vec;

use super::*;
use crate::memory::physical::Image;

/// A table with a good checksum.
pub(crate) fn table(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let len = (HEADER_BYTES + body.len()) as u32;
    let mut bytes = [&signature[..], &len.to_le_bytes(), &[0; 28], body].concat();
    bytes[9] = 0u8.wrapping_sub(sum(&bytes));
    bytes
}

/// A root pointer of revision 0 or 2.
pub(crate) fn root_pointer(revision: u8, rsdt: u32, xsdt: u64) -> Vec<u8> {
    let mut bytes = [&b"RSD PTR "[..], &[0], b"UNIT  ", &[revision], &rsdt.to_le_bytes()].concat();
    bytes[8] = 0u8.wrapping_sub(sum(&bytes));
    if revision >= 2 {
        bytes.extend(36u32.to_le_bytes());
        bytes.extend(xsdt.to_le_bytes());
        bytes.extend([0; 4]);
        bytes[32] = 0u8.wrapping_sub(sum(&bytes));
    }
    bytes
}

fn pointers32(pointers: &[u32]) -> Vec<u8> {
    pointers.iter().flat_map(|pointer| pointer.to_le_bytes()).collect()
}

pub(crate) fn pointers64(pointers: &[u64]) -> Vec<u8> {
    pointers.iter().flat_map(|pointer| pointer.to_le_bytes()).collect()
}

const RSDP: u64 = 0xf_5250;
const VIOT: Signature = Signature(*b"VIOT");

/// As QEMU has it: revision 0, the RSDT and a table at odd addresses.
fn old_image() -> Image {
    let mut image = Image::default();
    image.put(RSDP, &root_pointer(0, 0x7fe_1235, 0));
    image.put(0x7fe_1235, &table(b"RSDT", &pointers32(&[0x7fe_0001, 0x7fe_0101])));
    image.put(0x7fe_0001, &table(b"FACP", &[1, 2, 3]));
    image.put(0x7fe_0101, &table(b"VIOT", &[4; 52]));
    image
}

/// An image with these tables, and where its root pointer is.
pub(crate) fn image_with(tables: &[&[u8]]) -> (Image, u64) {
    let mut image = Image::default();
    let places: Vec<u32> = (1..).map(|index| 0x6_0000 + index * 0x1_0000).take(tables.len()).collect();
    image.put(RSDP, &root_pointer(0, 0x6_0000, 0));
    image.put(0x6_0000, &table(b"RSDT", &pointers32(&places)));
    places.iter().zip(tables).for_each(|(place, table)| image.put((*place).into(), table));
    (image, RSDP)
}

fn names(tables: &Tables<'_>) -> Vec<[u8; 4]> {
    tables.iter().map(|table| table.signature.0).collect()
}

#[test]
fn an_rsdt_with_unaligned_tables_is_followed() {
    let image = old_image();
    let tables = Tables::find_all(&image, Some(RSDP)).expect("a good image");
    assert_eq!(names(&tables), [*b"RSDT", *b"FACP", *b"VIOT"]);
    assert_eq!(tables.find(VIOT).expect("there").len(), 88);
    assert_eq!(tables.find(Signature(*b"MCFG")), Err(AcpiError::Absent { signature: Signature(*b"MCFG") }));
    assert_eq!(tables.broken().count(), 0);
    assert_eq!(tables.ranges().count(), 4);
    assert_eq!(tables.ranges().next(), PhysRange::from_len(RSDP, 20));
}

#[test]
fn a_root_pointer_is_searched_in_the_bios_area() {
    assert_eq!(names(&Tables::find_all(&old_image(), None).expect("found")).len(), 3);
    let mut image = Image::default();
    image.put(0xe_0000, &alloc::vec![0; 0x2_0000]);
    assert_eq!(Tables::find_all(&image, None).err(), Some(AcpiError::NoRootPointer));
    let mut image = Image::default();
    image.put(0xe_0010, &root_pointer(2, 0, 0x5000));
    image.put(0x5000, &table(b"XSDT", &[]));
    assert_eq!(names(&Tables::find_all(&image, None).expect("found")), [*b"XSDT"]);
}

#[test]
fn an_xsdt_above_four_gigabytes_is_followed() {
    let mut image = Image::default();
    image.put(0xa_0000, &root_pointer(2, 0, 0x1_0000_0003));
    image.put(0x1_0000_0003, &table(b"XSDT", &pointers64(&[0, 0x2_0000_0000])));
    image.put(0x2_0000_0000, &table(b"VIOT", &[]));
    let tables = Tables::find_all(&image, Some(0xa_0000)).expect("a good image");
    assert_eq!(names(&tables), [*b"XSDT", *b"VIOT"]);
}

#[test]
fn a_new_root_pointer_without_an_xsdt_falls_back() {
    let mut image = Image::default();
    image.put(0xa_0000, &root_pointer(2, 0x5000, 0));
    image.put(0x5000, &table(b"RSDT", &[]));
    assert_eq!(names(&Tables::find_all(&image, Some(0xa_0000)).expect("found")), [*b"RSDT"]);
}

#[test]
fn broken_tables_are_named_and_hide_no_other() {
    let mut bad_sum = table(b"VIOT", &[9; 4]);
    bad_sum[HEADER_BYTES] ^= 1;
    let mut too_short = table(b"SSDT", &[]);
    too_short[4] = 35;
    let mut too_long = table(b"HPET", &[]);
    too_long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut cut = table(b"BGRT", &[0; 100]);
    cut.truncate(HEADER_BYTES + 10);

    let mut image = Image::default();
    image.put(RSDP, &root_pointer(0, 0x5000, 0));
    let list = pointers32(&[0x6000, 0x7000, 0x8000, 0x9000, 0xdead_0000, 0xffff_fff0, 0xa000]);
    // Three bytes that make no pointer.
    image.put(0x5000, &table(b"RSDT", &[&list[..], &[1, 2, 3]].concat()));
    image.put(0x6000, &bad_sum);
    image.put(0x7000, &too_short);
    image.put(0x8000, &too_long);
    image.put(0x9000, &cut);
    image.put(0xa000, &table(b"APIC", &[]));

    let tables = Tables::find_all(&image, Some(RSDP)).expect("the root is good");
    assert_eq!(names(&tables), [*b"RSDT", *b"APIC"]);
    let checksum = AcpiError::Checksum { signature: VIOT, phys: 0x6000, sum: sum(&bad_sum) };
    assert_eq!(tables.find(VIOT), Err(checksum));
    assert_eq!(
        tables.broken().collect::<Vec<_>>(),
        [
            checksum,
            AcpiError::Length { signature: Signature(*b"SSDT"), phys: 0x7000, len_bytes: 35 },
            AcpiError::Length { signature: Signature(*b"HPET"), phys: 0x8000, len_bytes: u32::MAX },
            AcpiError::Unreachable { phys: 0x9000, len_bytes: 136 },
            AcpiError::Unreachable { phys: 0xdead_0000, len_bytes: 36 },
            AcpiError::Unreachable { phys: 0xffff_fff0, len_bytes: 36 },
        ]
    );
}

#[test]
fn a_whole_table_wins_over_a_broken_one_of_its_name() {
    let mut broken = table(b"VIOT", &[9; 4]);
    broken[40 - 1] ^= 1;
    let mut image = Image::default();
    image.put(RSDP, &root_pointer(0, 0x5000, 0));
    image.put(0x5000, &table(b"RSDT", &pointers32(&[0x6000, 0x7000])));
    image.put(0x6000, &broken);
    image.put(0x7000, &table(b"VIOT", &[7]));
    let tables = Tables::find_all(&image, Some(RSDP)).expect("a good root");
    assert_eq!(tables.find(VIOT).expect("the second one").last(), Some(&7));
}

#[test]
fn broken_roots_are_refused() {
    let refused = |image: &Image| Tables::find_all(image, Some(RSDP)).expect_err("broken");
    let reason = |reason| AcpiError::RootPointer { phys: RSDP, reason };
    assert_eq!(refused(&Image::default()), reason("cannot be reached"));

    let with_root = |bytes: &[u8]| {
        let mut image = Image::default();
        image.put(RSDP, bytes);
        image
    };
    assert_eq!(refused(&with_root(&[0; 36])), reason("does not begin with \"RSD PTR \""));
    let mut bad = root_pointer(0, 0x5000, 0);
    bad[16] ^= 1;
    assert_eq!(refused(&with_root(&bad)), reason("has a wrong checksum"));
    assert_eq!(refused(&with_root(&root_pointer(2, 0, 1)[..30])), reason("is cut short"));
    let mut bad = root_pointer(2, 0, 0x5000);
    bad[24] ^= 1;
    assert_eq!(refused(&with_root(&bad)), reason("has a wrong extended checksum"));
    let mut bad = root_pointer(2, 0, 0x5000);
    bad[20] = 35;
    assert_eq!(refused(&with_root(&bad)), reason("states a length that it cannot have"));

    let nowhere = with_root(&root_pointer(0, 0x5000, 0));
    assert_eq!(refused(&nowhere), AcpiError::Unreachable { phys: 0x5000, len_bytes: 36 });
    let mut misnamed = nowhere;
    misnamed.put(0x5000, &table(b"XSDT", &[]));
    assert_eq!(refused(&misnamed), AcpiError::RootSignature { phys: 0x5000, found: Signature(*b"XSDT") });
}
