//! Functions of a kernel image by their addresses, as binutils tell them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::{command, paths};

const LIMIT: Duration = Duration::from_secs(120);
/// Addresses that one `addr2line` is asked for.
const CHUNK: usize = 4000;

/// A function at an address, or one that was inlined there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    /// Its name, without what it is generic over.
    pub(super) name: String,
    /// The source file, from the root of the workspace, and the line.
    pub(super) place: String,
}

/// An image, and where its functions start.
pub(super) struct Symbols {
    image: PathBuf,
    starts: BTreeMap<u64, String>,
}

impl Symbols {
    /// Reads the image.
    ///
    /// # Errors
    ///
    /// When `nm` is missing or cannot read it.
    pub(super) fn read(image: &Path) -> Result<Self> {
        let listed = command::output(Command::new("nm").arg(image), LIMIT);
        let listed = listed.context("`nm` names the kernel's functions; it is part of binutils")?;
        Ok(Self { image: image.to_owned(), starts: starts(&listed) })
    }

    /// Whether a function starts there.
    pub(super) fn is_start(&self, address: u64) -> bool {
        self.starts.contains_key(&address)
    }

    /// Where a function starts that is named as in the source.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub(super) fn address(&self, name: &str) -> Result<u64> {
        let found = self.starts.iter().find(|(_, start)| *start == name);
        let address = found.map(|(address, _)| *address);
        address.with_context(|| format!("the kernel has no function {name}"))
    }

    /// The functions at each address, the outermost first.
    ///
    /// # Errors
    ///
    /// When `addr2line` is missing or fails.
    pub(super) fn frames(&self, addresses: &BTreeSet<u64>) -> Result<BTreeMap<u64, Vec<Frame>>> {
        let all: Vec<u64> = addresses.iter().copied().collect();
        let mut frames = BTreeMap::new();
        let root = format!("{}/", paths::root().display());
        for chunk in all.chunks(CHUNK) {
            let mut name = Command::new("addr2line");
            name.args(["--addresses", "--inlines", "--functions", "--demangle", "--exe"]).arg(&self.image);
            name.args(chunk.iter().map(|address| format!("{address:#x}")));
            let named = command::output(&mut name, LIMIT);
            let named = named.context("`addr2line` names what was inlined; it is part of binutils")?;
            parse(&named.replace(&root, ""), &mut frames);
        }
        Ok(frames)
    }
}

/// The functions in what `nm` prints: `ADDRESS t NAME`.
fn starts(listed: &str) -> BTreeMap<u64, String> {
    let symbol = |line: &str| {
        let mut words = line.split_whitespace();
        let (address, kind, name) = (words.next()?, words.next()?, words.next()?);
        let address = u64::from_str_radix(address, 16).ok()?;
        matches!(kind, "t" | "T" | "w" | "W").then(|| (address, name.to_owned()))
    };
    listed.lines().filter_map(symbol).collect()
}

/// Reads what `addr2line` prints: an address, then a name and a place for each frame, the innermost first.
fn parse(named: &str, frames: &mut BTreeMap<u64, Vec<Frame>>) {
    let mut lines = named.lines();
    let mut address = None;
    while let Some(line) = lines.next() {
        if let Some(digits) = line.strip_prefix("0x") {
            address = u64::from_str_radix(digits, 16).ok();
            continue;
        }
        let (Some(address), Some(place)) = (address, lines.next()) else { return };
        let place = place.split(" (discriminator").next().unwrap_or(place).to_owned();
        frames.entry(address).or_default().insert(0, Frame { name: short(line), place });
    }
}

/// A name without what it is generic over, and without the modules around it:
/// `<a::b::Type<c::D> as e::Trait<F>>::work::<G>::{closure#0}` becomes `Type::work::{closure#0}`.
fn short(name: &str) -> String {
    let (own, rest) = match name.strip_prefix('<').and_then(|inner| inner.split_at_checked(closing(inner)?)) {
        Some((inner, rest)) => {
            (inner.split(" as ").next().unwrap_or(inner), rest.strip_prefix('>').unwrap_or(rest))
        }
        None => ("", name),
    };
    let own = without_generics(own);
    let rest = without_generics(rest);
    if own.is_empty() {
        // The last module, the function, and closures in it.
        let parts: Vec<&str> = rest.split("::").filter(|part| !part.is_empty()).collect();
        let closures = parts.iter().rev().take_while(|part| part.starts_with('{')).count();
        return parts[parts.len().saturating_sub(closures + 2)..].join("::");
    }
    format!("{}{rest}", own.rsplit("::").next().unwrap_or(&own))
}

/// Where the bracket closes that was open before `text`.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 1;
    let mut last = ' ';
    for (index, c) in text.char_indices() {
        match c {
            '<' => depth += 1,
            // Not the one of an arrow.
            '>' if last != '-' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(index);
        }
        last = c;
    }
    None
}

fn without_generics(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    while let Some((before, inner)) = rest.split_once('<') {
        kept.push_str(before.strip_suffix("::").unwrap_or(before));
        rest = closing(inner).map_or("", |end| &inner[end + 1..]);
    }
    kept + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shortened_to_type_and_function() {
        let cases = [
            (
                "<virtio_iommu::exchange::Shared<platform::K>>::wait::<a::{closure#0}>::{closure#1}",
                "Shared::wait::{closure#1}",
            ),
            ("<a::Endpoint<b::K> as a::dma::DmaDevice>::map", "Endpoint::map"),
            (
                "virtio_iommu::exchange::map::map_once::<a::K, b::Once<c>>::{closure#0}",
                "map::map_once::{closure#0}",
            ),
            ("core::ptr::drop_in_place::<<a::B>::c::{closure#0}>", "ptr::drop_in_place"),
            ("<core::option::Option<fn(u8) -> u8>>::map", "Option::map"),
            ("memcpy", "memcpy"),
            ("??", "??"),
        ];
        for (long, expected) in cases {
            assert_eq!(short(long), expected, "{long}");
        }
    }

    #[test]
    fn inlined_frames_come_outermost_first() {
        let text = "0x0000000000001000\ninner::f\nsrc/a.rs:3 (discriminator 2)\nouter::g\nsrc/b.rs:7\n0x2000\n??\n??:0\n";
        let mut frames = BTreeMap::new();
        parse(text, &mut frames);
        let frame = |name: &str, place: &str| Frame { name: name.into(), place: place.into() };
        assert_eq!(frames[&0x1000], [frame("outer::g", "src/b.rs:7"), frame("inner::f", "src/a.rs:3")]);
        assert_eq!(frames[&0x2000], [frame("??", "??:0")]);
    }

    #[test]
    fn only_functions_are_starts() {
        let found = starts(
            "0000000000201000 t _Rabc\n0000000000202000 T bench_mark\n0000000000203000 d data\n U gone\n",
        );
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            [(0x20_1000, "_Rabc".into()), (0x20_2000, "bench_mark".into())]
        );
    }
}
