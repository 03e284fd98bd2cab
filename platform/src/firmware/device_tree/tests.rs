//! Generated trees: what QEMU's machines have in them, and everything that can be wrong.

use alloc::string::String;
use alloc::vec::Vec;

use super::boot;
use super::pci::host_bridges;
use super::*;
use crate::memory::physical::Image;

const BEGIN: u32 = 1;
const END: u32 = 2;
const PROPERTY: u32 = 3;
const LAST: u32 = 9;

/// A tree in the making.
#[derive(Clone, Default)]
pub(crate) struct Writer {
    structure: Vec<u8>,
    strings: Vec<u8>,
    reservations: Vec<(u64, u64)>,
}

impl Writer {
    fn word(mut self, word: u32) -> Self {
        self.structure.extend(word.to_be_bytes());
        self
    }

    fn pad(mut self) -> Self {
        self.structure.resize(self.structure.len().next_multiple_of(4), 0);
        self
    }

    pub(crate) fn begin(self, name: &str) -> Self {
        let mut begun = self.word(BEGIN);
        begun.structure.extend(name.bytes().chain([0]));
        begun.pad()
    }

    pub(crate) fn end(self) -> Self {
        self.word(END)
    }

    pub(crate) fn bytes(mut self, name: &str, value: &[u8]) -> Self {
        let at = self.strings.len() as u32;
        self.strings.extend(name.bytes().chain([0]));
        let mut written = self.word(PROPERTY).word(value.len() as u32).word(at);
        written.structure.extend(value);
        written.pad()
    }

    pub(crate) fn cells(self, name: &str, cells: &[u32]) -> Self {
        let value: Vec<u8> = cells.iter().flat_map(|cell| cell.to_be_bytes()).collect();
        self.bytes(name, &value)
    }

    pub(crate) fn text(self, name: &str, text: &str) -> Self {
        let value: Vec<u8> = text.bytes().chain([0]).collect();
        self.bytes(name, &value)
    }

    fn reserve(mut self, start: u64, len_bytes: u64) -> Self {
        self.reservations.push((start, len_bytes));
        self
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        let whole = self.word(LAST);
        let mut reservations = Vec::new();
        for (start, len_bytes) in whole.reservations.iter().chain([&(0, 0)]) {
            reservations.extend(start.to_be_bytes());
            reservations.extend(len_bytes.to_be_bytes());
        }
        let structure_at = HEADER_BYTES + reservations.len();
        let strings_at = structure_at + whole.structure.len();
        let total = strings_at + whole.strings.len();
        let header = [
            MAGIC as usize,
            total,
            structure_at,
            strings_at,
            HEADER_BYTES,
            17,
            16,
            0,
            whole.strings.len(),
            whole.structure.len(),
        ];
        let mut bytes: Vec<u8> = header.iter().flat_map(|word| (*word as u32).to_be_bytes()).collect();
        bytes.extend(reservations);
        bytes.extend(whole.structure);
        bytes.extend(whole.strings);
        bytes
    }
}

/// Where tests put the tree.
const PHYS: u64 = 0x8fe0_0000;

pub(crate) fn image(bytes: &[u8]) -> Image {
    let mut image = Image::default();
    image.put(PHYS, bytes);
    image
}

pub(crate) fn with_tree<T>(bytes: &[u8], act: impl FnOnce(&DeviceTree<'_>) -> T) -> T {
    let image = image(bytes);
    act(&DeviceTree::read(&image, PHYS).expect("a good tree"))
}

/// The beginning of every tree here: the root, with addresses and lengths of two cells.
fn root() -> Writer {
    Writer::default().begin("").cells("#address-cells", &[2]).cells("#size-cells", &[2])
}

/// As QEMU's riscv64 machine has it, with the firmware's reservation.
fn machine() -> Writer {
    root()
        .reserve(0x8000_0000, 0x1000)
        .begin("reserved-memory")
        .cells("#address-cells", &[2])
        .cells("#size-cells", &[2])
        .bytes("ranges", &[])
        .begin("mmode_resv0@80000000")
        .cells("reg", &[0, 0x8000_0000, 0, 0x4_0000])
        .bytes("no-map", &[])
        .end()
        .end()
        .begin("memory@80000000")
        .text("device_type", "memory")
        .cells("reg", &[0, 0x8000_0000, 0, 0x1000_0000])
        .end()
        .begin("chosen")
        .text("bootargs", "scenario=default seed=7")
        .text("stdout-path", "/soc/serial@10000000:115200n8")
        .cells("linux,initrd-start", &[0x8800_0000])
        .cells("linux,initrd-end", &[0, 0x8800_1000])
        .end()
        .begin("soc")
        .cells("#address-cells", &[2])
        .cells("#size-cells", &[2])
        .bytes("ranges", &[])
        .begin("serial@10000000")
        .text("compatible", "ns16550a")
        .cells("reg", &[0, 0x1000_0000, 0, 0x100])
        .end()
        .begin("pci@30000000")
        .text("compatible", "pci-host-ecam-generic")
        .cells("reg", &[0, 0x3000_0000, 0, 0x1000_0000])
        .cells("bus-range", &[0, 0xff])
        .cells("linux,pci-domain", &[0])
        .cells("#address-cells", &[3])
        .cells("#size-cells", &[2])
        .cells(
            "ranges",
            &[
                0x100_0000,
                0,
                0,
                0,
                0x300_0000,
                0,
                0x1_0000, // I/O
                0x200_0000,
                0,
                0x4000_0000,
                0,
                0x4000_0000,
                0,
                0x4000_0000, // below 4 GiB
                0x300_0000,
                4,
                0,
                4,
                0,
                4,
                0, // above
            ],
        )
        .end()
        .end()
}

fn range(start: u64, len_bytes: u64) -> PhysRange {
    PhysRange::from_len(start, len_bytes).expect("a test's range is not empty")
}

#[test]
fn boot_information_is_read() {
    let bytes = machine().end().finish();
    let info = boot::read(&image(&bytes), PHYS).expect("a good tree");
    assert_eq!(info.command_line.as_str(), "scenario=default seed=7");
    assert_eq!(info.device_tree, Some(range(PHYS, bytes.len() as u64)));
    assert_eq!(info.modules, [range(0x8800_0000, 0x1000)]);
    assert_eq!(info.rsdp, None);
    let ram: Vec<_> = info.memory_map.ram().iter().collect();
    assert_eq!(ram, [range(0x8004_0000, 0x0ffc_0000)]);
}

#[test]
fn a_tree_without_ram_is_refused() {
    let read = |bytes: &[u8]| boot::read(&image(bytes), PHYS).expect_err("no RAM");
    assert_eq!(read(&root().end().finish()), DeviceTreeError::NoMemory);
    let memory = |status: &str, cells: &[u32]| {
        let node = root().begin("memory@0").text("device_type", "memory").text("status", status);
        node.cells("reg", cells).end().end().finish()
    };
    assert_eq!(read(&memory("disabled", &[0, 0, 0, 0x1000])), DeviceTreeError::NoMemory);
    assert_eq!(read(&memory("okay", &[0, 0, 0, 0])), DeviceTreeError::NoMemory);
    let error = read(&memory("okay", &[0, 0, 0]));
    assert!(
        matches!(&error, DeviceTreeError::Property { node, property: "reg", .. } if node == "memory@0"),
        "{error}"
    );
}

#[test]
fn broken_trees_are_refused() {
    let good = machine().end().finish();
    let read = |bytes: &[u8]| DeviceTree::read(&image(bytes), PHYS).map(|_| ()).expect_err("broken");
    assert_eq!(read(&[]), DeviceTreeError::Unreachable { phys: PHYS, len_bytes: HEADER_BYTES });
    let with = |at: usize, word: u32| {
        let mut bytes = good.clone();
        bytes[at..at + 4].copy_from_slice(&word.to_be_bytes());
        bytes
    };
    assert_eq!(read(&with(0, 0xfeed)), DeviceTreeError::Magic { phys: PHYS, found: 0xfeed });
    for len_bytes in [0, HEADER_BYTES - 1, MAX_BYTES + 1] {
        assert_eq!(read(&with(4, len_bytes as u32)), DeviceTreeError::Length { phys: PHYS, len_bytes });
    }
    let beyond = good.len() + 1;
    assert_eq!(read(&with(4, beyond as u32)), DeviceTreeError::Unreachable { phys: PHYS, len_bytes: beyond });
    for (at, word) in [(8, 0), (8, u32::MAX), (12, u32::MAX), (20, 1), (36, u32::MAX)] {
        let error = read(&with(at, word));
        assert!(matches!(error, DeviceTreeError::Malformed { .. }), "{at}: {error}");
    }
}

/// Whatever single bytes are, nothing panics, and nothing takes long.
#[test]
fn damaged_trees_do_no_harm() {
    let good = machine().end().finish();
    let mut random = fastrand::Rng::with_seed(1);
    let mut read = 0;
    for _ in 0..4_000 {
        let mut bytes = good.clone();
        for _ in 0..random.usize(1..4) {
            let at = random.usize(HEADER_BYTES..bytes.len());
            let any = random.u8(..);
            bytes[at] = random.choice([0, 1, 2, 3, 0x7f, 0xff, any]).unwrap_or(any);
        }
        let image = image(&bytes);
        let _ = boot::read(&image, PHYS);
        let Ok(tree) = DeviceTree::read(&image, PHYS) else { continue };
        read += 1;
        let _ = host_bridges(&tree);
        let _ = boot::console(&tree);
        for node in tree.nodes() {
            let _ = node.registers();
        }
    }
    assert!(read > 200, "{read} of them were trees");
}

#[test]
fn nodes_are_found_in_order_and_depth_is_bounded() {
    let mut tree = root();
    for depth in 0..40 {
        tree = tree.begin(&alloc::format!("level@{depth}"));
    }
    for _ in 0..40 {
        tree = tree.end();
    }
    let tree = tree.begin("after").cells("phandle", &[7]).end().end();
    with_tree(&tree.finish(), |tree| {
        let names: Vec<_> = tree.nodes().map(|node| String::from(node.name())).collect();
        assert_eq!(names.len(), MAX_DEPTH + 1);
        assert_eq!((&names[0][..], &names[1][..], &names[MAX_DEPTH][..]), ("", "level@0", "after"));
        assert_eq!(tree.by_phandle(7).expect("there").name(), "after");
        assert!(tree.by_phandle(8).is_none());
        assert_eq!(tree.at(&["level", "level"]).expect("there").name(), "level@1");
        assert!(tree.at(&["level", "other"]).is_none());
    });
}

#[test]
fn registers_are_translated_by_every_bus_above() {
    let device = |tree: Writer, address: u32| {
        tree.begin("device").text("compatible", "unit,device").cells("reg", &[address, 0x10]).end()
    };
    let bus =
        |tree: Writer, name: &str| tree.begin(name).cells("#address-cells", &[1]).cells("#size-cells", &[1]);
    // 0x1000 on the inner bus is 0x5000 on the outer one, and that is 0x2_0000_5000.
    let tree = bus(root(), "outer").cells("ranges", &[0x4000, 2, 0x4000, 0x2000]);
    let tree = bus(tree, "inner").cells("ranges", &[0x1000, 0x5000, 0x1000]);
    let tree = device(device(tree, 0x1ff0), 0x1ff1).end().end();
    // Nothing is passed on by a bus that does not say so.
    let tree = device(bus(tree, "closed"), 0x1000).end().end();
    with_tree(&tree.finish(), |tree| {
        let found: Vec<_> =
            tree.compatible("unit,device").map(|node| node.registers().expect("whole entries")).collect();
        assert_eq!(found, [alloc::vec![range(0x2_0000_5ff0, 0x10)], alloc::vec![], alloc::vec![]]);
    });
}

#[test]
fn the_console_is_a_path_or_an_alias() {
    let name = |tree: Writer| {
        with_tree(&tree.end().finish(), |tree| boot::console(tree).map(|node| String::from(node.name())))
    };
    assert_eq!(name(machine()).as_deref(), Some("serial@10000000"));
    let tree = |path: &str| {
        let chosen = root().begin("chosen").text("stdout-path", path).end();
        let aliases = chosen.begin("aliases").text("serial0", "/uart@9000000").end();
        aliases.begin("uart@9000000").end()
    };
    assert_eq!(name(tree("serial0:9600")).as_deref(), Some("uart@9000000"));
    assert_eq!(name(tree("/uart")).as_deref(), Some("uart@9000000"));
    assert_eq!(name(tree("serial1")), None);
    assert_eq!(name(tree("/none/there")), None);
    assert_eq!(name(root()), None);
}

#[test]
fn host_bridges_are_read() {
    with_tree(&machine().end().finish(), |tree| {
        let bridges = host_bridges(tree).expect("one is there");
        assert_eq!(bridges.len(), 1);
        let area = bridges[0].area;
        assert_eq!((area.segment, area.first_bus, area.last_bus), (0, 0, 255));
        assert_eq!(area.range, range(0x3000_0000, 0x1000_0000));
        assert_eq!(bridges[0].windows, [range(0x4000_0000, 0x4000_0000), range(4 << 32, 4 << 32)]);
    });
}

/// A host bridge with these properties besides the usual ones.
fn bridge(properties: impl FnOnce(Writer) -> Writer) -> Vec<u8> {
    let node = root().begin("pcie@4000000").text("compatible", "pci-host-ecam-generic");
    properties(node.cells("#address-cells", &[3]).cells("#size-cells", &[2])).end().end().finish()
}

#[test]
fn what_a_host_bridge_leaves_out_has_a_default() {
    let bytes = bridge(|node| node.cells("reg", &[0, 0x400_0000, 0, 0x20_0000]).bytes("ranges", &[]));
    with_tree(&bytes, |tree| {
        let area = host_bridges(tree).expect("a good one")[0].area;
        assert_eq!((area.segment, area.first_bus, area.last_bus), (0, 0, 1));
    });
    let translated = bridge(|node| {
        let node = node.cells("reg", &[0, 0x400_0000, 0, 0x20_0000]);
        node.cells("ranges", &[0x200_0000, 0, 0, 0, 0x4000_0000, 0, 0x1000, 0x200_0000, 0, 0, 0, 0, 0, 0])
    });
    with_tree(&translated, |tree| assert_eq!(host_bridges(tree).expect("a good one")[0].windows, []));
}

#[test]
fn host_bridges_that_cannot_be_understood_are_named() {
    let refused = |bytes: &[u8]| with_tree(bytes, |tree| host_bridges(tree).map(|_| ()).expect_err("broken"));
    assert_eq!(
        refused(&root().end().finish()),
        DeviceTreeError::Absent { compatible: "pci-host-ecam-generic" }
    );
    let property = |bytes: &[u8]| match refused(bytes) {
        DeviceTreeError::Property { node, property, .. } if node == "pcie@4000000" => property,
        other => panic!("{other}"),
    };
    let space = [0, 0x400_0000, 0, 0x20_0000];
    assert_eq!(property(&bridge(|node| node.bytes("ranges", &[]))), "reg");
    assert_eq!(property(&bridge(|node| node.cells("reg", &[0, 0x400_0000, 0, 0x1000]))), "reg");
    for buses in [&[0u32, 2][..], &[1, 0], &[0, 256], &[0x100, 0x100], &[0]] {
        let bytes = bridge(|node| node.cells("reg", &space).cells("bus-range", buses).bytes("ranges", &[]));
        assert_eq!(property(&bytes), "bus-range", "{buses:?}");
    }
    let domain = bridge(|node| node.cells("reg", &space).cells("linux,pci-domain", &[0x1_0000]));
    assert_eq!(property(&domain), "linux,pci-domain");
    assert_eq!(property(&bridge(|node| node.cells("reg", &space))), "ranges");
    assert_eq!(property(&bridge(|node| node.cells("reg", &space).cells("ranges", &[1, 2]))), "ranges");
}
