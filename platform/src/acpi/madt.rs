//! MADT: the CPUs and the interrupt controllers of an x86 machine (ACPI 6.5, 5.2.12).

use alloc::vec::Vec;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{AcpiError, HEADER_BYTES, Signature};

/// The table's name.
pub const SIGNATURE: Signature = Signature(*b"APIC");

const LOCAL_APIC: u8 = 0;
const IO_APIC: u8 = 1;
const LOCAL_X2APIC: u8 = 9;
/// The table's flag for the 8259s.
const PC_COMPATIBLE: u32 = 1;
/// A CPU's flags: it runs, or it can be brought up.
const ENABLED_OR_CAPABLE: u32 = 0b11;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fixed {
    local_apic: U32,
    flags: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawLocalApic {
    processor: u8,
    apic_id: u8,
    flags: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawLocalX2Apic {
    reserved: [u8; 2],
    apic_id: U32,
    flags: U32,
    processor: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawIoApic {
    id: u8,
    reserved: u8,
    address: U32,
    first_interrupt: U32,
}

/// An I/O interrupt controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApic {
    /// Its number.
    pub id: u8,
    /// The physical address of its registers.
    pub phys: u64,
    /// The global number of its first line.
    pub first_interrupt: u32,
}

/// What the table says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Madt {
    /// The physical address of each CPU's own interrupt controller.
    pub local_apic_phys: u64,
    /// Whether the machine has the two 8259s of a PC too.
    pub has_8259s: bool,
    /// The CPUs that run or can be brought up, by their interrupt controller's number.
    pub cpus: Vec<u32>,
    /// The I/O interrupt controllers.
    pub io_apics: Vec<IoApic>,
}

/// Reads the table. Entries of other kinds are passed over; one that is cut ends the list.
///
/// # Errors
///
/// [`AcpiError::Content`] when the fixed part is cut.
pub fn parse(table: &[u8]) -> Result<Madt, AcpiError> {
    let wrong = AcpiError::Content {
        signature: SIGNATURE,
        len_bytes: table.len(),
        reason: "is too short for its fixed part",
    };
    let body = table.get(HEADER_BYTES..).ok_or(wrong)?;
    let (fixed, mut rest) = Fixed::ref_from_prefix(body).map_err(|_| wrong)?;
    let mut madt = Madt {
        local_apic_phys: fixed.local_apic.get().into(),
        has_8259s: fixed.flags.get() & PC_COMPATIBLE != 0,
        ..Madt::default()
    };
    while let [kind, len_bytes, ..] = *rest {
        // An entry is at least its own two bytes long, so that the loop moves on.
        let Some(entry) = rest.get(2..usize::from(len_bytes)) else { break };
        read_entry(&mut madt, kind, entry);
        rest = &rest[usize::from(len_bytes)..];
    }
    Ok(madt)
}

fn read_entry(madt: &mut Madt, kind: u8, entry: &[u8]) {
    match kind {
        LOCAL_APIC => {
            if let Ok((cpu, _)) = RawLocalApic::ref_from_prefix(entry)
                && cpu.flags.get() & ENABLED_OR_CAPABLE != 0
            {
                madt.cpus.push(cpu.apic_id.into());
            }
        }
        LOCAL_X2APIC => {
            if let Ok((cpu, _)) = RawLocalX2Apic::ref_from_prefix(entry)
                && cpu.flags.get() & ENABLED_OR_CAPABLE != 0
            {
                madt.cpus.push(cpu.apic_id.get());
            }
        }
        IO_APIC => {
            if let Ok((raw, _)) = RawIoApic::ref_from_prefix(entry) {
                let phys = raw.address.get().into();
                madt.io_apics.push(IoApic { id: raw.id, phys, first_interrupt: raw.first_interrupt.get() });
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(entries: &[&[u8]]) -> Vec<u8> {
        let mut bytes = alloc::vec![0; HEADER_BYTES];
        bytes.extend(0xfee0_0000u32.to_le_bytes());
        bytes.extend(1u32.to_le_bytes());
        entries.iter().for_each(|entry| bytes.extend(*entry));
        bytes
    }

    #[test]
    fn cpus_and_controllers_are_listed() {
        let madt = parse(&table(&[
            &[0, 8, 0, 0, 1, 0, 0, 0],
            &[0, 8, 1, 5, 0, 0, 0, 0],
            &[9, 16, 0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 7, 0, 0, 0],
            &[1, 12, 3, 0, 0, 0, 0xc0, 0xfe, 16, 0, 0, 0],
            &[2, 10, 0, 0, 2, 0, 0, 0, 0, 0],
        ]))
        .expect("a good table");
        assert_eq!(madt.local_apic_phys, 0xfee0_0000);
        assert_eq!(madt.cpus, [0, 0x100]);
        assert_eq!(madt.io_apics, [IoApic { id: 3, phys: 0xfec0_0000, first_interrupt: 16 }]);
    }

    #[test]
    fn broken_lengths_end_the_list() {
        for broken in [&[0, 0, 0, 0, 1, 0, 0, 0][..], &[0, 1], &[0, 9, 0, 0, 1, 0, 0, 0], &[0], &[0, 4, 0, 0]]
        {
            let madt = parse(&table(&[&[0, 8, 0, 4, 1, 0, 0, 0], broken])).expect("a good fixed part");
            assert_eq!(madt.cpus, [4], "{broken:?}");
        }
        assert!(parse(&[0; HEADER_BYTES + 7]).is_err());
    }
}
