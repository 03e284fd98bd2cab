//! Where the interrupt lines of devices go.
//!
//! ```text
//! on a device          interrupts-extended  = < phandle  specifier ... >, ...
//!                 or   interrupts           = < specifier ... >, ...   of the nearest interrupt-parent above
//! on a host bridge     interrupt-map        = < function (3 cells)  pin  phandle  address ...  specifier ... >, ...
//!                      interrupt-map-mask   = < function (3 cells)  pin >
//! ```
//! How long a specifier is the controller says, in `#interrupt-cells`, and how long the address before it, in
//! `#address-cells`. What is in it only the controller's driver knows.

use alloc::format;
use alloc::vec::Vec;

use super::{DeviceTree, DeviceTreeError, Node};

/// The longest specifier, and address of a controller, that is accepted.
const MAX_CELLS: usize = 4;
/// A function's address and its pin.
const CHILD_CELLS: usize = 4;

/// A pin of a PCI function on a root bus, as the map names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The bus.
    pub bus: u8,
    /// The device.
    pub device: u8,
    /// The function.
    pub function: u8,
    /// The pin, 1 to 4.
    pub pin: u8,
}

impl Pin {
    fn cells(self) -> [u32; CHILD_CELLS] {
        let Self { bus, device, function, pin } = self;
        let address = u32::from(bus) << 16 | u32::from(device) << 11 | u32::from(function) << 8;
        [address, 0, 0, pin.into()]
    }
}

/// The specifier of a device's first line.
///
/// # Errors
///
/// [`DeviceTreeError::Property`], when it has none or it cannot be understood.
pub fn of_node(tree: &DeviceTree<'_>, node: &Node<'_>) -> Result<Vec<u32>, DeviceTreeError> {
    const EXTENDED: &str = "interrupts-extended";
    const PLAIN: &str = "interrupts";
    let (property, controller, specifiers) = match node.cells(EXTENDED) {
        Some(cells) => {
            let (phandle, rest) = cells.split_first().ok_or_else(|| node.wrong(EXTENDED, "is empty"))?;
            (EXTENDED, controller(tree, node, EXTENDED, *phandle)?, rest.to_vec())
        }
        None => {
            let cells = node.cells(PLAIN).ok_or_else(|| node.wrong(PLAIN, "is absent"))?;
            let phandle =
                inherited_parent(node).ok_or_else(|| node.wrong(PLAIN, "has no interrupt-parent"))?;
            (PLAIN, controller(tree, node, PLAIN, phandle)?, cells)
        }
    };
    let len = specifiers.len();
    let specifier = specifiers.get(..controller.interrupt_cells);
    let specifier = specifier.ok_or_else(|| node.wrong(property, format!("ends after {len:#x} cells")))?;
    Ok(specifier.to_vec())
}

/// The specifier of a pin of a function on a root bus, by the map of its host bridge.
///
/// # Errors
///
/// [`DeviceTreeError::Property`], when the map does not have it or cannot be understood.
pub fn of_pin(tree: &DeviceTree<'_>, bridge: &Node<'_>, pin: Pin) -> Result<Vec<u32>, DeviceTreeError> {
    const MAP: &str = "interrupt-map";
    const MASK: &str = "interrupt-map-mask";
    let map = bridge.cells(MAP).ok_or_else(|| bridge.wrong(MAP, "is absent or not made of cells"))?;
    let mask = match bridge.cells(MASK) {
        None => [u32::MAX; CHILD_CELLS],
        Some(cells) => <[u32; CHILD_CELLS]>::try_from(cells).map_err(|cells| {
            bridge.wrong(MASK, format!("has {} cells instead of {CHILD_CELLS}", cells.len()))
        })?,
    };
    let masked =
        |cells: [u32; CHILD_CELLS]| core::array::from_fn::<_, CHILD_CELLS, _>(|at| cells[at] & mask[at]);
    let wanted = masked(pin.cells());
    let mut rest = &map[..];
    // Each entry takes five cells at least.
    while let Some((child, after)) = rest.split_first_chunk::<CHILD_CELLS>() {
        let at = map.len() - rest.len();
        let cut = || bridge.wrong(MAP, format!("ends inside of the entry at cell {at:#x}"));
        let (phandle, after) = after.split_first().ok_or_else(cut)?;
        let controller = controller(tree, bridge, MAP, *phandle)?;
        let after = after.get(controller.address_cells..).ok_or_else(cut)?;
        let (specifier, after) = after.split_at_checked(controller.interrupt_cells).ok_or_else(cut)?;
        if masked(*child) == wanted {
            return Ok(specifier.to_vec());
        }
        rest = after;
    }
    Err(bridge.wrong(MAP, format!("does not have {pin:x?}")))
}

/// How many cells a controller's specifiers have, and its addresses.
struct Controller {
    address_cells: usize,
    interrupt_cells: usize,
}

fn controller(
    tree: &DeviceTree<'_>,
    node: &Node<'_>,
    property: &'static str,
    phandle: u32,
) -> Result<Controller, DeviceTreeError> {
    let named = tree.by_phandle(phandle);
    let named = named
        .ok_or_else(|| node.wrong(property, format!("names phandle {phandle:#x}, which no node has")))?;
    let count = |property: &str| named.cell(property).map(|count| count as usize);
    // A controller without addresses is the usual case.
    let address_cells = count("#address-cells").unwrap_or(0);
    match count("#interrupt-cells") {
        Some(interrupt_cells @ 1..=MAX_CELLS) if address_cells <= MAX_CELLS => {
            Ok(Controller { address_cells, interrupt_cells })
        }
        _ => Err(node.wrong(property, format!("names {}, which is no interrupt controller", named.name()))),
    }
}

/// The interrupt parent of the node itself, or of the nearest node above that has one.
fn inherited_parent(node: &Node<'_>) -> Option<u32> {
    let mut at = node.clone();
    loop {
        if let Some(phandle) = at.cell("interrupt-parent") {
            return Some(phandle);
        }
        // Upwards, so that it ends at the root.
        at = at.parent()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firmware::device_tree::tests::{Writer, with_tree};

    /// A controller with addresses of two cells and specifiers of three, phandle 1; one with none and one, phandle 2; a
    /// device, and a host bridge.
    fn tree(device: impl Fn(Writer) -> Writer, bridge: impl Fn(Writer) -> Writer) -> Vec<u8> {
        let tree = Writer::default()
            .begin("")
            .cells("interrupt-parent", &[1])
            .begin("gic")
            .cells("phandle", &[1])
            .cells("#address-cells", &[2])
            .cells("#interrupt-cells", &[3])
            .end()
            .begin("plic")
            .cells("phandle", &[2])
            .cells("#interrupt-cells", &[1])
            .end()
            .begin("no-controller")
            .cells("phandle", &[3])
            .end();
        let tree = device(tree.begin("soc").begin("device")).end().end();
        bridge(tree.begin("pcie")).end().end().finish()
    }

    fn of_device(device: impl Fn(Writer) -> Writer) -> Result<Vec<u32>, DeviceTreeError> {
        with_tree(&tree(device, |bridge| bridge), |tree| {
            of_node(tree, &tree.at(&["soc", "device"]).expect("there"))
        })
    }

    fn of_bridge(cells: &[u32], mask: &[u32], pin: Pin) -> Result<Vec<u32>, DeviceTreeError> {
        let bytes = tree(|d| d, |b| b.cells("interrupt-map", cells).cells("interrupt-map-mask", mask));
        with_tree(&bytes, |tree| of_pin(tree, &tree.at(&["pcie"]).expect("there"), pin))
    }

    #[test]
    fn devices_name_their_line_in_two_ways() {
        assert_eq!(of_device(|d| d.cells("interrupts", &[0, 16, 1, 0, 17, 1])), Ok(alloc::vec![0, 16, 1]));
        assert_eq!(
            of_device(|d| d.cells("interrupt-parent", &[2]).cells("interrupts", &[8])),
            Ok(alloc::vec![8])
        );
        assert_eq!(of_device(|d| d.cells("interrupts-extended", &[2, 9, 1, 0, 1, 4])), Ok(alloc::vec![9]));
        for broken in [&[0u32, 16][..], &[]] {
            assert!(of_device(|d| d.cells("interrupts", broken)).is_err(), "{broken:?}");
        }
        for broken in [&[][..], &[2], &[1, 0, 16], &[3, 1], &[9, 1]] {
            assert!(of_device(|d| d.cells("interrupts-extended", broken)).is_err(), "{broken:?}");
        }
        assert!(of_device(|device| device).is_err(), "no line at all");
    }

    #[test]
    fn pins_are_mapped_under_the_mask() {
        let map = [
            0x0000, 0, 0, 1, 2, 32, // device 0, pin 1
            0x0800, 0, 0, 1, 1, 0xa, 0xb, 0, 3, 4, // device 1, pin 1, with an address of two cells
            0x0800, 0, 0, 2, 2, 34,
        ];
        let mask = [0x1800, 0, 0, 7];
        let pin = |device, pin| Pin { bus: 0, device, function: 3, pin };
        assert_eq!(of_bridge(&map, &mask, pin(4, 1)), Ok(alloc::vec![32]));
        assert_eq!(of_bridge(&map, &mask, pin(5, 1)), Ok(alloc::vec![0, 3, 4]));
        assert_eq!(of_bridge(&map, &mask, pin(1, 2)), Ok(alloc::vec![34]));
        assert!(of_bridge(&map, &mask, pin(2, 1)).is_err(), "not in the map");
        for len in 0..map.len() {
            // Whatever is cut off, nothing else is found in its place.
            let found = of_bridge(&map[..len], &mask, pin(1, 2));
            assert!(found.is_err(), "{len}: {found:?}");
        }
        assert!(of_bridge(&map, &mask[..3], pin(4, 1)).is_err(), "a short mask");
        assert!(of_bridge(&[0, 0, 0, 1, 9, 32], &mask, pin(4, 1)).is_err(), "a phandle of nobody");
    }
}
