//! Where in the tree of buses the endpoints are.

/// Where the endpoints are. Each has a slot by whose number it is told apart, on whichever bus that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the root bus.
    RootBus,
    /// On the root bus, as functions of one device.
    Functions,
    /// Each behind a root port of its own.
    RootPorts,
    /// All below one PCIe switch, each behind a downstream port of its own.
    Switch,
    /// All behind one PCIe-to-PCI bridge. The IOMMU cannot tell them apart: they are one endpoint.
    PciBridge,
    /// Each behind a root port of a second root bus (`pxb-pcie`), which begins with bus 0x10.
    SecondRoot,
    /// The same, but what is there bypasses the IOMMU.
    BypassingRoot,
}

/// The first slot of the root bus that no endpoint has.
const FREE: u8 = 8;

impl Place {
    /// The arguments that make the bridges for the endpoints in `slots`.
    pub(super) fn bridges(self, slots: &[u8]) -> String {
        let each = |port: &dyn Fn(u8) -> String| slots.iter().map(|slot| port(*slot)).collect::<String>();
        let root_port = |bus: &str, slot: u8| {
            format!(" -device pcie-root-port,id=port{slot},bus={bus},chassis={slot},addr={slot:#x}")
        };
        let second = |more: &str| {
            let ports = each(&|slot| root_port("second", slot));
            format!("-device pxb-pcie,id=second,bus_nr=16,bus=pcie.0,addr={FREE:#x}{more}{ports}")
        };
        match self {
            Self::RootBus | Self::Functions => String::new(),
            Self::RootPorts => each(&|slot| root_port("pcie.0", slot)),
            Self::Switch => {
                let down = each(&|slot| {
                    format!(" -device xio3130-downstream,id=port{slot},bus=up,chassis={slot},addr={slot:#x}")
                });
                format!(
                    "-device pcie-root-port,id=top,bus=pcie.0,chassis=1,addr={FREE:#x} \
                     -device x3130-upstream,id=up,bus=top{down}"
                )
            }
            Self::PciBridge => format!("-device pcie-pci-bridge,id=bridge,bus=pcie.0,addr={FREE:#x}"),
            Self::SecondRoot => second(""),
            Self::BypassingRoot => second(",bypass_iommu=on"),
        }
    }

    /// What makes a device the endpoint in `slot`.
    pub(super) fn of(self, slot: u8) -> String {
        match self {
            Self::RootBus => format!("bus=pcie.0,addr={slot:#x}"),
            // Function 0, without which the others are not looked for, is the entropy source, which is always there.
            Self::Functions => format!("bus=pcie.0,addr={FREE:#x}.{:#x},multifunction=on", (slot + 5) % 8),
            Self::PciBridge => format!("bus=bridge,addr={slot:#x}"),
            Self::RootPorts | Self::Switch | Self::SecondRoot | Self::BypassingRoot => {
                format!("bus=port{slot}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_on_buses_that_are_there() {
        assert_eq!(
            (Place::RootBus.bridges(&[2, 3]), Place::RootBus.of(3)),
            (String::new(), "bus=pcie.0,addr=0x3".into())
        );
        for place in [Place::RootPorts, Place::Switch, Place::SecondRoot, Place::BypassingRoot] {
            let bridges = place.bridges(&[2, 13]);
            assert_eq!(place.of(13), "bus=port13");
            assert!(bridges.contains("id=port2,") && bridges.contains("id=port13,"), "{bridges}");
        }
        assert_eq!(Place::Functions.of(3), "bus=pcie.0,addr=0x8.0x0,multifunction=on");
        assert_eq!(Place::Functions.of(2), "bus=pcie.0,addr=0x8.0x7,multifunction=on");
        assert!(Place::PciBridge.bridges(&[2]).contains("pcie-pci-bridge,id=bridge,bus=pcie.0,addr=0x8"));
        assert_eq!(Place::PciBridge.of(4), "bus=bridge,addr=0x4");
        assert!(Place::BypassingRoot.bridges(&[]).contains("bypass_iommu=on"));
    }
}
