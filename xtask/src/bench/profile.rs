//! `cargo xtask bench --profile ROW`: which function executes how many instructions of one operation.
//!
//! A debugger's connection steps through the operation, one instruction after the other, between two calls of the
//! kernel's `bench_mark`. Calls are seen by the stack pointer, inlined functions come from the debug information, so
//! that the tree is exact and the measured code is the code that is always measured.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use super::gdb::{Guest, Registers};
use super::symbols::{Frame, Symbols};

/// Where the guest says that a stretch begins or ends.
const MARK: &str = "bench_mark";
/// Longer stretches are not stepped through.
const MAX_STEPS: u64 = 2_000_000;
/// Parts of the tree below this share are left out, in thousandths.
const SHOWN_PER_MILLE: u64 = 8;
/// Rows of the lists below the tree.
const LISTED: usize = 25;

/// A stretch that was stepped through.
pub(super) struct Stretch {
    /// What the guest calls it.
    pub(super) name: String,
    /// For each stack of addresses, the outermost first, how many instructions were executed at the last one.
    stacks: BTreeMap<Vec<u64>, u64>,
}

/// Steps through every stretch that the guest marks. Returns when the machine ended.
///
/// # Errors
///
/// When the guest marks none, or QEMU cannot be debugged.
pub(super) fn record(socket: &Path, symbols: &Symbols) -> Result<Vec<Stretch>> {
    let mark = symbols.address(MARK)?;
    let mut guest = Guest::connect(socket)?;
    guest.break_at(mark)?;
    let mut stretches = Vec::new();
    while guest.go_on()? {
        let [address, len] = guest.registers()?.arguments;
        // The end of a stretch.
        if len == 0 {
            continue;
        }
        if len > 256 {
            bail!("the guest's mark has a name of {len:#x} bytes");
        }
        let name = String::from_utf8_lossy(&guest.memory(address, len)?).into_owned();
        let stacks = stretch(&mut guest, symbols, mark).with_context(|| format!("in {name}"))?;
        stretches.push(Stretch { name, stacks });
    }
    if stretches.is_empty() {
        bail!("the guest marked no operation");
    }
    Ok(stretches)
}

/// Steps to the next mark.
fn stretch(guest: &mut Guest, symbols: &Symbols, mark: u64) -> Result<BTreeMap<Vec<u64>, u64>> {
    let mut stacks = BTreeMap::new();
    let mut calls = Calls::new(guest.registers()?);
    for _ in 0..MAX_STEPS {
        if !guest.step()? {
            bail!("the machine ended before the operation did");
        }
        let now = guest.registers()?;
        if now.rip == mark {
            return Ok(stacks);
        }
        calls.step(now, symbols.is_start(now.rip));
        *stacks.entry(calls.stack(now.rip)).or_default() += 1;
    }
    bail!("it takes more than {MAX_STEPS} instructions")
}

/// Which calls have not returned.
struct Calls {
    before: Registers,
    /// Where each call is, and the stack pointer when it will have returned.
    open: Vec<(u64, u64)>,
}

impl Calls {
    fn new(start: Registers) -> Self {
        Self { before: start, open: Vec::new() }
    }

    fn step(&mut self, now: Registers, at_start_of_function: bool) {
        self.open.retain(|(_, rsp)| now.rsp < *rsp);
        if at_start_of_function && now.rsp.wrapping_add(8) == self.before.rsp {
            self.open.push((self.before.rip, self.before.rsp));
        }
        self.before = now;
    }

    fn stack(&self, rip: u64) -> Vec<u64> {
        self.open.iter().map(|(site, _)| *site).chain([rip]).collect()
    }
}

/// A function in the tree, with what it called.
#[derive(Default)]
struct Node {
    own: u64,
    all: u64,
    callees: BTreeMap<String, Node>,
}

/// Words a stretch: the tree of calls, then who executes most by itself, by function and by file.
///
/// # Errors
///
/// When the addresses cannot be named.
pub(super) fn describe(stretch: &Stretch, symbols: &Symbols) -> Result<String> {
    let addresses: BTreeSet<u64> = stretch.stacks.keys().flatten().copied().collect();
    let frames = symbols.frames(&addresses)?;
    let mut root = Node::default();
    let (mut functions, mut files) = (BTreeMap::new(), BTreeMap::new());
    for (stack, count) in &stretch.stacks {
        let path: Vec<&Frame> = stack.iter().filter_map(|address| frames.get(address)).flatten().collect();
        root.all += count;
        let mut node = &mut root;
        for frame in &path {
            node = node.callees.entry(frame.name.clone()).or_default();
            node.all += count;
        }
        node.own += count;
        let Some(last) = path.last() else { continue };
        *functions.entry(last.name.clone()).or_default() += count;
        // What the standard library does is done for whoever called it.
        let ours = path.iter().rev().find(|frame| !frame.place.starts_with('/')).unwrap_or(last);
        let file = ours.place.rsplit_once(':').map_or(ours.place.as_str(), |(file, _)| file);
        *files.entry(file.to_owned()).or_default() += count;
    }
    let mut text = format!("{}: {} instructions, the measuring included\n\n", stretch.name, root.all);
    text.push_str("   with    own  function\n");
    draw(&root, 0, root.all * SHOWN_PER_MILLE / 1000, &mut text);
    list("by function, callees excluded", &functions, &mut text);
    list("by file, the standard library counted for its caller", &files, &mut text);
    Ok(text)
}

fn draw(node: &Node, depth: usize, least: u64, text: &mut String) {
    let mut callees: Vec<_> = node.callees.iter().filter(|(_, callee)| callee.all >= least).collect();
    callees.sort_by_key(|(_, callee)| std::cmp::Reverse(callee.all));
    for (name, callee) in callees {
        // A string takes everything.
        let _ = writeln!(text, "{:>7}{:>7}  {:indent$}{name}", callee.all, callee.own, "", indent = depth);
        draw(callee, depth + 1, least, text);
    }
}

fn list(title: &str, counts: &BTreeMap<String, u64>, text: &mut String) {
    let mut sorted: Vec<_> = counts.iter().collect();
    sorted.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    // A string takes everything.
    let _ = writeln!(text, "\n{title}");
    for (name, count) in sorted.into_iter().take(LISTED) {
        let _ = writeln!(text, "{count:>7}  {name}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_open_at_starts_of_functions_and_close_by_the_stack_pointer() {
        let at = |rip, rsp| Registers { rip, rsp, arguments: [0, 0] };
        let mut calls = Calls::new(at(0x10, 0x1000));
        calls.step(at(0x11, 0xff8), false);
        assert_eq!(calls.stack(0x11), [0x11], "a push is no call");
        calls.step(at(0x100, 0xff0), true);
        assert_eq!(calls.stack(0x100), [0x11, 0x100]);
        calls.step(at(0x200, 0xfe8), true);
        assert_eq!(calls.stack(0x200), [0x11, 0x100, 0x200]);
        calls.step(at(0x300, 0xfe8), true);
        assert_eq!(calls.stack(0x300), [0x11, 0x100, 0x300], "a jump to a function is no call");
        calls.step(at(0x101, 0xff0), false);
        assert_eq!(calls.stack(0x101), [0x11, 0x101]);
        calls.step(at(0x12, 0xff8), false);
        assert_eq!(calls.stack(0x12), [0x12]);
    }
}
