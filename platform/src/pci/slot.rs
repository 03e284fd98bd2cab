//! A slot: a port into which a device can be plugged while the machine runs.
//!
//! ```text
//!  empty --- a device is plugged in ---> occupied, off --- set_power(On) ---> on
//!    ^                                                                        |
//!    '-- presence is gone --- off <--- set_power(Off) <--- attention button --'
//! ```
//!
//! Nobody takes a device out before the slot is off: who wants it back presses the attention button, and waits.
//! Leaves out: the slot's interrupt, latches and indicators other than the power's.

use pci_types::PciAddress;

use super::capability;
use super::config::ConfigSpace;
use super::function::Function;

/// The PCI Express capability, and its registers: flags, slot capabilities, slot control, slot status.
const EXPRESS: u8 = 0x10;
const FLAGS: u16 = 0x02;
const CAPABILITIES: u16 = 0x14;
const CONTROL: u16 = 0x18;
const STATUS: u16 = 0x1a;

const FLAGS_SLOT: u16 = 1 << 8;
const CAPABILITIES_HOT_PLUG: u32 = 1 << 6;
/// The power indicator, and the power itself, whose bit turns it off.
const CONTROL_INDICATOR: u16 = 3 << 8;
const INDICATOR_ON: u16 = 1 << 8;
const INDICATOR_OFF: u16 = 3 << 8;
const CONTROL_POWER_OFF: u16 = 1 << 10;
/// Written as one, it is forgotten.
const STATUS_BUTTON: u16 = 1 << 0;
/// All events that are forgotten that way.
const STATUS_EVENTS: u16 = 0x11f;
const STATUS_OCCUPIED: u16 = 1 << 6;

/// Whether a slot feeds its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// It does.
    On,
    /// It does not, and the device may be taken out.
    Off,
}

/// A slot for devices that come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The port that it belongs to.
    pub port: PciAddress,
    /// The bus that a device in it is on.
    pub bus: u8,
    /// Where the port's PCI Express capability begins.
    express: u16,
}

impl Slot {
    /// The slot of a bridge, if it is one for devices that come and go.
    pub fn of(config: &impl ConfigSpace, function: &Function) -> Option<Self> {
        let bus = function.bridge?.secondary_bus;
        let port = function.address;
        let capabilities = capability::list(config, port);
        let express = capabilities.iter().find(|capability| capability.id == EXPRESS)?.offset;
        let flags = config.read16(port, express + FLAGS);
        // Capabilities begin at multiples of 4, so that the register is at one too.
        let slot = config.read32(port, express + CAPABILITIES);
        let takes_devices_later = flags & FLAGS_SLOT != 0 && slot & CAPABILITIES_HOT_PLUG != 0;
        takes_devices_later.then_some(Self { port, bus, express })
    }

    /// Whether there is a device in it.
    pub fn is_occupied(&self, config: &impl ConfigSpace) -> bool {
        self.status(config) & STATUS_OCCUPIED != 0
    }

    /// Whether the attention button was pressed: somebody wants the device back.
    pub fn is_button_pressed(&self, config: &impl ConfigSpace) -> bool {
        self.status(config) & STATUS_BUTTON != 0
    }

    /// Forgets what happened so far. Plugging a device in may press the button too.
    pub fn forget_events(&self, config: &impl ConfigSpace) {
        // Those that were seen and no others: one may happen now. QEMU ignores a write that would lose one.
        config.write16(self.port, self.express + STATUS, self.status(config) & STATUS_EVENTS);
    }

    /// Turns the slot on or off, and its indicator with it.
    pub fn set_power(&self, config: &impl ConfigSpace, power: Power) {
        let at = self.express + CONTROL;
        let others = config.read16(self.port, at) & !(CONTROL_INDICATOR | CONTROL_POWER_OFF);
        let own = match power {
            Power::On => INDICATOR_ON,
            Power::Off => INDICATOR_OFF | CONTROL_POWER_OFF,
        };
        config.write16(self.port, at, others | own);
    }

    fn status(&self, config: &impl ConfigSpace) -> u16 {
        config.read16(self.port, self.express + STATUS)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Pci;
    use super::super::config::offset;
    use super::super::fake::{FakeFunction, FakeSpace};
    use super::*;

    const AT: u16 = 0x40;

    fn port_address() -> PciAddress {
        PciAddress::new(0, 0, 1, 0)
    }

    /// A port with a capability, which has these flags and slot capabilities, and this control and status.
    fn port(flags: u16, slot: u32, control_and_status: u32) -> FakeFunction {
        FakeFunction::bridge(3, 3, 0, 0)
            .with(offset::STATUS, &[0x10])
            .with(offset::CAPABILITIES, &[AT as u8])
            .with(AT, &[EXPRESS, 0])
            .with(AT + FLAGS, &flags.to_le_bytes())
            .with(AT + CAPABILITIES, &slot.to_le_bytes())
            .with_register(AT + CONTROL, control_and_status, 0x0000_ffff)
    }

    fn slot(function: FakeFunction) -> (Pci<FakeSpace>, Option<Slot>) {
        let pci = Pci::scan(FakeSpace::new([(port_address(), function)]));
        let slot = Slot::of(pci.config(), pci.at(port_address()).expect("the port"));
        (pci, slot)
    }

    #[test]
    fn only_ports_that_say_so_take_devices_later() {
        assert_eq!(
            slot(port(FLAGS_SLOT, CAPABILITIES_HOT_PLUG, 0)).1,
            Some(Slot { port: port_address(), bus: 3, express: AT })
        );
        assert_eq!(slot(port(0, CAPABILITIES_HOT_PLUG, 0)).1, None);
        assert_eq!(slot(port(FLAGS_SLOT, 0, 0)).1, None);
        assert_eq!(slot(FakeFunction::bridge(3, 3, 0, 0)).1, None, "no such capability");
        assert_eq!(slot(FakeFunction::endpoint(1, 1)).1, None, "no bridge");
    }

    #[test]
    fn presence_and_button_are_bits_of_the_status() {
        let state = |status: u16| {
            let (pci, slot) = slot(port(FLAGS_SLOT, CAPABILITIES_HOT_PLUG, u32::from(status) << 16));
            let slot = slot.expect("a slot");
            (slot.is_occupied(pci.config()), slot.is_button_pressed(pci.config()))
        };
        assert_eq!(state(0), (false, false));
        assert_eq!(state(STATUS_OCCUPIED), (true, false));
        assert_eq!(state(STATUS_BUTTON), (false, true));
    }

    #[test]
    fn power_leaves_the_other_controls_alone() {
        let (pci, slot) = slot(port(FLAGS_SLOT, CAPABILITIES_HOT_PLUG, 0x07c0));
        let slot = slot.expect("a slot");
        let control = || pci.config().read16(port_address(), AT + CONTROL);
        slot.set_power(pci.config(), Power::On);
        assert_eq!(control(), 0x01c0);
        slot.set_power(pci.config(), Power::Off);
        assert_eq!(control(), 0x07c0);
    }
}
