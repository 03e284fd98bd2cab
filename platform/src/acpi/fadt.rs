//! FADT: how the machine is turned off (ACPI 6.5, 5.2.9 and 16.1).
//!
//! A machine has either the PM1 control registers, one or two, or the sleep control register of hardware-reduced ACPI. Both
//! are told the type of the deepest sleep, which only the DSDT says, in AML: a package of integers under the name `_S5_`.
//! Its bytes are looked for, and no AML is run.

use super::{AcpiError, HEADER_BYTES, Signature, Tables};
use crate::memory::physical::PhysicalMemory;

/// The table's name.
pub const SIGNATURE: Signature = Signature(*b"FACP");

/// Offsets of fields. Older tables end before the later ones.
const DSDT: usize = 40;
const PM1A_CONTROL: usize = 64;
const PM1B_CONTROL: usize = 68;
const FLAGS: usize = 112;
const DSDT_64: usize = 140;
const PM1A_CONTROL_64: usize = 172;
const PM1B_CONTROL_64: usize = 184;
const SLEEP_CONTROL: usize = 244;

/// The flag of machines that have the sleep control register instead of PM1.
const HARDWARE_REDUCED: u32 = 1 << 20;
/// The address space of a register that is a port.
const PORT_SPACE: u8 = 1;

/// Where a machine is turned off: ports, and the type of sleep for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerOff {
    /// The PM1 control registers, of 16 bits: type in bits 10 to 12, bit 13 goes to sleep.
    Pm1 {
        /// The first one.
        first: Control,
        /// The second one, if there is one.
        second: Option<Control>,
    },
    /// The sleep control register, of 8 bits: type in bits 2 to 4, bit 5 goes to sleep.
    SleepControl(Control),
}

/// A control register at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control {
    /// The port.
    pub port: u16,
    /// The type of sleep, of 3 bits.
    pub sleep_type: u8,
}

/// Finds out how the machine is turned off.
///
/// # Errors
///
/// [`AcpiError`] when a table is missing or broken, or does not say it.
pub fn power_off(memory: &impl PhysicalMemory, tables: &Tables<'_>) -> Result<PowerOff, AcpiError> {
    let fadt = tables.find(SIGNATURE)?;
    let wrong = |reason| AcpiError::Content { signature: SIGNATURE, len_bytes: fadt.len(), reason };
    let dsdt = u64_at(fadt, DSDT_64).filter(|phys| *phys != 0).or(u32_at(fadt, DSDT).map(u64::from));
    let dsdt = super::read_table(memory, dsdt.ok_or(wrong("names no DSDT"))?).table?;
    let unknown = AcpiError::Content {
        signature: dsdt.signature,
        len_bytes: dsdt.bytes.len(),
        reason: "has no good _S5_",
    };
    let [first_type, second_type] = sleep_types(&dsdt.bytes[HEADER_BYTES..]).ok_or(unknown)?;
    let control = |port, sleep_type| Control { port, sleep_type };

    if u32_at(fadt, FLAGS).unwrap_or(0) & HARDWARE_REDUCED != 0 {
        let port =
            generic_port(fadt, SLEEP_CONTROL).ok_or(wrong("has no sleep control register at a port"))?;
        return Ok(PowerOff::SleepControl(control(port, first_type)));
    }
    let port = |wide, narrow| {
        let narrow = || u16::try_from(u32_at(fadt, narrow)?).ok().filter(|port| *port != 0);
        generic_port(fadt, wide).or_else(narrow)
    };
    let first = port(PM1A_CONTROL_64, PM1A_CONTROL).ok_or(wrong("has no PM1 control register at a port"))?;
    let second = port(PM1B_CONTROL_64, PM1B_CONTROL).map(|port| control(port, second_type));
    Ok(PowerOff::Pm1 { first: control(first, first_type), second })
}

fn u32_at(table: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*table.get(at..)?.first_chunk()?))
}

fn u64_at(table: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*table.get(at..)?.first_chunk()?))
}

/// The port of a register in the form of 12 bytes: space, width, offset, access size, address.
fn generic_port(table: &[u8], at: usize) -> Option<u16> {
    let space = *table.get(at)?;
    let port = u16::try_from(u64_at(table, at + 4)?).ok()?;
    (space == PORT_SPACE && port != 0).then_some(port)
}

/// The first two numbers of the package `_S5_`: `Name (_S5, Package () { a, b, ... })`.
fn sleep_types(aml: &[u8]) -> Option<[u8; 2]> {
    const NAME: [u8; 5] = *b"\x08_S5_";
    const NAME_AT_ROOT: [u8; 6] = *b"\x08\\_S5_";
    let starts = (0..aml.len()).filter_map(|at| {
        let rest = &aml[at..];
        rest.strip_prefix(&NAME[..]).or_else(|| rest.strip_prefix(&NAME_AT_ROOT[..]))
    });
    let mut packages = starts.filter_map(package);
    packages.next()
}

/// A package that begins with one or two small numbers. Of one, the second is the same.
fn package(aml: &[u8]) -> Option<[u8; 2]> {
    const PACKAGE: u8 = 0x12;
    let (code, rest) = aml.split_first()?;
    let (lead, _) = rest.split_first().filter(|_| *code == PACKAGE)?;
    // The upper two bits say how many more bytes the length has. How long the package is makes no difference here.
    let (count, elements) = rest.get(1 + usize::from(lead >> 6)..)?.split_first()?;
    let (first, elements) = small_number(elements)?;
    let second = if *count > 1 { small_number(elements)?.0 } else { first };
    (*count != 0 && first < 8 && second < 8).then_some([first, second])
}

fn small_number(aml: &[u8]) -> Option<(u8, &[u8])> {
    const BYTE: u8 = 0x0a;
    match *aml {
        [value @ 0..=1, ref rest @ ..] => Some((value, rest)),
        [BYTE, value, ref rest @ ..] => Some((value, rest)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::super::tests::{image_with, table};
    use super::*;
    use crate::memory::physical::Image;

    const DSDT_PHYS: u32 = 0x5_0001;

    /// A FADT of `len` bytes with these fields.
    fn fadt(len: usize, fields: &[(usize, &[u8])]) -> Vec<u8> {
        let mut body = alloc::vec![0; len - HEADER_BYTES];
        body[DSDT - HEADER_BYTES..][..4].copy_from_slice(&DSDT_PHYS.to_le_bytes());
        for (at, bytes) in fields {
            body[at - HEADER_BYTES..][..bytes.len()].copy_from_slice(bytes);
        }
        table(b"FACP", &body)
    }

    fn found(fadt: &[u8], aml: &[u8]) -> Result<PowerOff, AcpiError> {
        let (mut image, rsdp): (Image, u64) = image_with(&[fadt]);
        image.put(DSDT_PHYS.into(), &table(b"DSDT", aml));
        let tables = Tables::find_all(&image, Some(rsdp)).expect("a good image");
        power_off(&image, &tables)
    }

    /// As QEMU writes it: `_S5_` with four zeros.
    const ZEROS: &[u8] = b"\x10\x05\\_SB_\x08_S5_\x12\x06\x04\x00\x00\x00\x00";

    #[test]
    fn the_first_register_of_an_old_table_is_enough() {
        let fadt = fadt(116, &[(PM1A_CONTROL, &[4, 6, 0, 0])]);
        let expected = PowerOff::Pm1 { first: Control { port: 0x604, sleep_type: 0 }, second: None };
        assert_eq!(found(&fadt, ZEROS), Ok(expected));
    }

    #[test]
    fn both_registers_have_a_type_of_their_own() {
        let generic = |port: u8| [1, 16, 0, 2, port, 6, 0, 0, 0, 0, 0, 0];
        let fadt = fadt(
            244,
            &[
                (PM1A_CONTROL, &[9, 9, 0, 0]),
                (PM1A_CONTROL_64, &generic(4)),
                (PM1B_CONTROL_64, &generic(8)),
                (DSDT_64, &u64::from(DSDT_PHYS).to_le_bytes()),
            ],
        );
        let aml = b"\x08\\_S5_\x12\x07\x04\x0a\x05\x01\x00\x00";
        let expected = PowerOff::Pm1 {
            first: Control { port: 0x604, sleep_type: 5 },
            second: Some(Control { port: 0x608, sleep_type: 1 }),
        };
        assert_eq!(found(&fadt, aml), Ok(expected));
    }

    #[test]
    fn hardware_reduced_machines_have_one_register() {
        let flags = HARDWARE_REDUCED.to_le_bytes();
        let register = [1, 8, 0, 1, 0, 6, 0, 0, 0, 0, 0, 0];
        let reduced = fadt(276, &[(FLAGS, &flags), (SLEEP_CONTROL, &register)]);
        let aml = b"\x08_S5_\x12\x05\x01\x0a\x05";
        assert_eq!(found(&reduced, aml), Ok(PowerOff::SleepControl(Control { port: 0x600, sleep_type: 5 })));
        let in_memory = [0, 8, 0, 1, 0, 6, 0, 0, 0, 0, 0, 0];
        assert!(found(&fadt(276, &[(FLAGS, &flags), (SLEEP_CONTROL, &in_memory)]), aml).is_err());
        assert!(found(&fadt(200, &[(FLAGS, &flags)]), aml).is_err(), "cut before the register");
    }

    #[test]
    fn without_a_good_package_nothing_is_found() {
        let fadt = fadt(116, &[(PM1A_CONTROL, &[4, 6, 0, 0])]);
        let broken: [&[u8]; 8] = [
            b"",
            b"\x08_S5_",
            b"\x08_S5_\x12",
            b"\x08_S5_\x12\xc6",
            b"\x08_S5_\x12\x06\x00",
            b"\x08_S5_\x12\x06\x04\x0a\x08\x00",
            b"\x08_S5_\x12\x06\x04\x0b\x05\x00\x00",
            b"\x08_S5_\x11\x06\x04\x00\x00",
        ];
        for aml in broken {
            assert!(found(&fadt, aml).is_err(), "{aml:x?}");
        }
        let later = [&b"\x08_S5_\x11 "[..], ZEROS].concat();
        assert!(found(&fadt, &later).is_ok(), "the name somewhere else before");
        assert!(found(&table(b"FACP", &[]), ZEROS).is_err(), "an empty FADT");
    }
}
