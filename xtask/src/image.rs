//! Makes a flat image of an ELF file.
//!
//! arm64's boot protocol wants memory as it is to be, from its first byte on, with a header of 64 bytes that the kernel's
//! own linker script puts there. QEMU reads the header, places the image, and passes the device tree in x0.

use anyhow::{Context as _, Result, ensure};
use object::LittleEndian as Little;
use object::elf::{FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader as _, ProgramHeader as _};

/// A kernel has no reason to be larger; a wild address in a program header does not become a wild file.
const MOST_BYTES: u64 = 64 << 20;
/// Where arm64's header has its magic number, and what it is.
const MAGIC: (usize, &[u8]) = (0x38, b"ARM\x64");
/// Where it says how much memory the kernel takes, and from where on.
const IMAGE_SIZE: usize = 0x10;

/// One segment that is loaded.
struct Segment<'a> {
    address: u64,
    /// What the file has of it; the rest is zero.
    bytes: &'a [u8],
    /// In memory.
    len_bytes: u64,
}

/// The memory that the segments of `elf` fill, from the lowest address on, up to the last byte that is not zero by
/// default. Its header is checked.
///
/// # Errors
///
/// When it is no ELF file of 64 bits and low byte first, when its segments do not fit together, or when there is no header
/// where arm64's boot protocol wants one.
pub(crate) fn flatten(elf: &[u8]) -> Result<Vec<u8>> {
    let segments = segments(elf)?;
    let start = segments.iter().map(|segment| segment.address).min().context("it has nothing to load")?;
    let mut image = Vec::new();
    let mut last = start;
    for segment in &segments {
        ensure!(segment.address >= last, "two segments lie over each other at {:#x}", segment.address);
        let end = segment.address.checked_add(segment.len_bytes).filter(|end| end - start <= MOST_BYTES);
        last = end.with_context(|| {
            format!(
                "{:#x} bytes from {start:#x} on do not hold a segment at {:#x}",
                MOST_BYTES, segment.address
            )
        })?;
        if !segment.bytes.is_empty() {
            // Below 64 MiB by the check above.
            image.resize((segment.address - start) as usize, 0);
            image.extend_from_slice(segment.bytes);
        }
    }
    check_header(&image, last - start)?;
    Ok(image)
}

/// The segments that are loaded, by their addresses.
fn segments(elf: &[u8]) -> Result<Vec<Segment<'_>>> {
    let header = FileHeader64::<Little>::parse(elf).context("it is no ELF file of 64 bits")?;
    let endian = header.endian().context("it is not of low byte first")?;
    let headers = header.program_headers(endian, elf).context("its program headers cannot be read")?;
    let mut segments = Vec::new();
    for header in headers.iter().filter(|header| header.p_type(endian) == PT_LOAD) {
        let address = header.p_paddr(endian);
        let len_bytes = header.p_memsz(endian);
        let bytes = header.data(endian, elf).ok().filter(|bytes| bytes.len() as u64 <= len_bytes);
        let bytes = bytes.with_context(|| format!("the segment at {address:#x} is not in the file"))?;
        if len_bytes != 0 {
            segments.push(Segment { address, bytes, len_bytes });
        }
    }
    segments.sort_by_key(|segment| segment.address);
    Ok(segments)
}

/// QEMU takes an image without a header for one of before it, and enters it without a device tree; and what lies behind
/// the end that the header states it may overwrite.
fn check_header(image: &[u8], memory_bytes: u64) -> Result<()> {
    let (offset, magic) = MAGIC;
    let found = image.get(offset..offset + magic.len());
    ensure!(found == Some(magic), "it does not begin with the header of arm64's boot protocol");
    let stated = image[IMAGE_SIZE..IMAGE_SIZE + 8].try_into().map(u64::from_le_bytes)?;
    ensure!(
        stated >= memory_bytes,
        "its header says that it takes {stated:#x} bytes of memory, but its segments are {memory_bytes:#x}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A segment of an ELF file: address, what the file has of it, bytes in memory.
    type Part<'a> = (u64, &'a [u8], u64);

    /// arm64's header, stating this size.
    fn header(image_size: u64) -> Vec<u8> {
        let mut header = vec![0; 64];
        header[IMAGE_SIZE..IMAGE_SIZE + 8].copy_from_slice(&image_size.to_le_bytes());
        header[MAGIC.0..MAGIC.0 + 4].copy_from_slice(MAGIC.1);
        header
    }

    /// An ELF file for AArch64 with these segments, in this order.
    fn elf(parts: &[Part<'_>]) -> Vec<u8> {
        let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let words: [&[u8]; 13] = [
            &2_u16.to_le_bytes(),
            &183_u16.to_le_bytes(),
            &1_u32.to_le_bytes(),
            &0_u64.to_le_bytes(),
            &64_u64.to_le_bytes(),
            &0_u64.to_le_bytes(),
            &0_u32.to_le_bytes(),
            &64_u16.to_le_bytes(),
            &56_u16.to_le_bytes(),
            &(parts.len() as u16).to_le_bytes(),
            &64_u16.to_le_bytes(),
            &0_u16.to_le_bytes(),
            &0_u16.to_le_bytes(),
        ];
        file.extend(words.concat());
        let mut offset = 64 + 56 * parts.len() as u64;
        for (address, bytes, memory) in parts {
            file.extend([1_u32.to_le_bytes(), 5_u32.to_le_bytes()].concat());
            let sizes = [offset, address + 0xffff_0000_0000_0000, *address, bytes.len() as u64, *memory, 8];
            file.extend(sizes.map(u64::to_le_bytes).concat());
            offset += bytes.len() as u64;
        }
        file.extend(parts.iter().flat_map(|(_, bytes, _)| bytes.iter()));
        file
    }

    fn complaint(parts: &[Part<'_>]) -> String {
        format!("{:#}", flatten(&elf(parts)).unwrap_err())
    }

    #[test]
    fn segments_lie_where_their_physical_addresses_say() {
        let header = header(0x200);
        let image = flatten(&elf(&[(0x80100, b"data", 0x100), (0x80000, &header, 64)])).unwrap();
        assert_eq!(image.len(), 0x104);
        assert_eq!(image[..64], header);
        assert!(image[64..0x100].iter().all(|byte| *byte == 0));
        assert_eq!(&image[0x100..], b"data");
    }

    #[test]
    fn what_is_zero_is_not_in_the_image() {
        let header = header(0x10_0000);
        let image = flatten(&elf(&[(0, &header, 64), (0x1000, b"", 0x8000), (0x9000, b"", 0)])).unwrap();
        assert_eq!(image, header);
    }

    #[test]
    fn a_kernel_has_a_header_that_tells_its_size() {
        assert!(complaint(&[(0, &[0; 64], 64)]).contains("does not begin with the header"));
        assert!(complaint(&[(0, b"ARM", 3)]).contains("does not begin with the header"));
        let small = complaint(&[(0, &header(0x1000), 0x1001)]);
        assert!(small.contains("takes 0x1000 bytes") && small.contains("are 0x1001"), "{small}");
    }

    #[test]
    fn segments_that_do_not_fit_together_are_named() {
        let header = header(u64::MAX);
        assert!(complaint(&[(0, &header, 64), (0x20, b"x", 1)]).contains("each other at 0x20"));
        assert!(complaint(&[(0, &header, 64), (0x7000_0000, b"x", 1)]).contains("segment at 0x70000000"));
        assert!(complaint(&[(0, &header, u64::MAX)]).contains("segment at 0x0"));
        assert!(complaint(&[]).contains("nothing to load"));
        assert!(complaint(&[(0x40, b"more than memory", 2)]).contains("at 0x40 is not in the file"));
    }

    #[test]
    fn what_is_no_elf_file_is_refused() {
        let good = elf(&[(0, &header(64), 64)]);
        for cut in [0, 4, 63, 100, good.len() - 1] {
            assert!(flatten(&good[..cut]).is_err(), "{cut}");
        }
        let mut high_first = good;
        high_first[5] = 2;
        assert!(flatten(&high_first).is_err());
    }
}
