//! Where QEMU differs from the strict model (PROTOCOL 4.2 and 4.3), one row each.

use qtest::Request;
use virtio_iommu_model::Device;

use crate::support::{ENDPOINTS, PAGE};

/// A status, or `None` for a request that came back unwritten.
pub(super) type Status = Option<u8>;

const OK: Status = Some(0);
const UNSUPP: Status = Some(2);
const DEVERR: Status = Some(3);
const INVAL: Status = Some(4);
const RANGE: Status = Some(5);
const NOENT: Status = Some(6);

const ATTACH: u8 = 1;
const UNMAP: u8 = 4;
const PROBE: u8 = 5;

/// What shows the difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shows {
    /// QEMU's status is one of these, the strict model's is the other.
    Status(&'static [Status], Status),
    /// The answers are the same, with this status; the state behind them is not.
    State(Status),
    /// The status is the same, the place of the tail is not.
    Length,
}

/// Which versions have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Versions {
    All,
    /// All but those like 7.2.
    Later,
    /// All but those like 11.1.
    Earlier,
}

/// One known difference.
pub(super) struct Difference {
    pub(super) what: &'static str,
    pub(super) shows: Shows,
    pub(super) versions: Versions,
    /// Whether it can come with this request in this state.
    pub(super) applies: fn(&Event<'_>) -> bool,
}

/// What happens, in a state on which both agreed.
pub(super) struct Event<'a> {
    /// As it was sent. `None` for a reset.
    sent: Option<&'a Request>,
    /// What it says, also where more bytes follow than are needed.
    request: Option<Request>,
    device: &'a Device,
}

impl<'a> Event<'a> {
    pub(super) fn new(sent: Option<&'a Request>, device: &'a Device) -> Self {
        Self { sent, request: sent.and_then(|request| Request::decode(&request.readable())), device }
    }

    fn attach(&self, test: impl FnOnce(u32, u32, bool, u32) -> bool) -> bool {
        match self.request {
            Some(Request::Attach { domain, endpoint, flags, reserved }) if flags <= 1 => {
                test(domain, endpoint, flags == 1, reserved)
            }
            _ => false,
        }
    }

    /// A MAP in a domain that can be mapped, with flags that exist.
    fn map(&self, test: impl FnOnce(u64, u64, u64) -> bool) -> bool {
        match self.request {
            Some(Request::Map { domain, first, last, phys, flags }) => {
                flags < 8 && self.is_normal(domain) && test(first, last, phys)
            }
            _ => false,
        }
    }

    fn unmap(&self, test: impl FnOnce(u32, u64, u64, u32) -> bool) -> bool {
        match self.request {
            Some(Request::Unmap { domain, first, last, reserved }) => test(domain, first, last, reserved),
            _ => false,
        }
    }

    fn raw(&self, test: impl FnOnce(&[u8], u32) -> bool) -> bool {
        match self.sent {
            Some(Request::Raw { readable, writable }) => test(readable, *writable),
            _ => false,
        }
    }

    fn is_normal(&self, domain: u32) -> bool {
        self.device.domains().any(|other| other == domain) && !self.device.is_bypass_domain(domain)
    }

    /// Attached endpoints of a domain, of those that the tests use.
    fn attached(&self, domain: u32) -> usize {
        ENDPOINTS.iter().filter(|endpoint| self.device.domain_of(endpoint.get()) == Some(domain)).count()
    }

    /// Whether an ATTACH asks for another kind of domain than the one that is there.
    fn mismatch(&self, domain: u32, bypass: bool) -> bool {
        self.attached(domain) > 0 && self.device.is_bypass_domain(domain) != bypass
    }

    fn last_input(&self) -> u64 {
        *self.device.config().input_range.end()
    }
}

fn misaligned(first: u64, last: u64, phys: u64) -> bool {
    !(first | phys | last.wrapping_add(1)).is_multiple_of(PAGE)
}

pub(super) const DIFFERENCES: &[Difference] = &[
    Difference {
        what: "ATTACH with reserved bytes is not refused",
        shows: Shows::Status(&[OK, NOENT], INVAL),
        versions: Versions::All,
        applies: |event| event.attach(|_, _, _, reserved| reserved != 0),
    },
    Difference {
        what: "a refused ATTACH to a domain of another kind detaches the endpoint",
        shows: Shows::State(INVAL),
        versions: Versions::All,
        applies: |event| {
            event.attach(|domain, endpoint, bypass, _| {
                let own = event.device.domain_of(endpoint);
                event.mismatch(domain, bypass) && own.is_some()
            })
        },
    },
    Difference {
        what: "an ATTACH of another kind replaces the domain that the endpoint has to itself",
        shows: Shows::Status(&[OK], INVAL),
        versions: Versions::All,
        applies: |event| {
            event.attach(|domain, endpoint, bypass, _| {
                let own = event.device.domain_of(endpoint);
                event.mismatch(domain, bypass) && own == Some(domain) && event.attached(domain) == 1
            })
        },
    },
    Difference {
        what: "ATTACH of the only endpoint to its own domain drops all mappings",
        shows: Shows::State(OK),
        versions: Versions::All,
        applies: |event| {
            event.attach(|domain, endpoint, _, _| {
                let own = event.device.domain_of(endpoint) == Some(domain);
                own && event.attached(domain) == 1 && event.device.mappings(domain).next().is_some()
            })
        },
    },
    Difference {
        what: "DETACH of an endpoint that is there and not attached finds none",
        shows: Shows::Status(&[NOENT], INVAL),
        versions: Versions::All,
        applies: |event| match event.request {
            Some(Request::Detach { endpoint, .. }) => event.device.domain_of(endpoint).is_none(),
            _ => false,
        },
    },
    Difference {
        what: "MAP that is not aligned is taken, or refused for an overlap only",
        shows: Shows::Status(&[OK, INVAL], RANGE),
        versions: Versions::All,
        applies: |event| event.map(misaligned),
    },
    Difference {
        what: "MAP of a single byte is taken",
        shows: Shows::Status(&[OK], INVAL),
        versions: Versions::All,
        applies: |event| event.map(|first, last, _| first == last),
    },
    Difference {
        what: "MAP whose physical range wraps is taken, or refused for an overlap only",
        shows: Shows::Status(&[OK, INVAL], RANGE),
        versions: Versions::All,
        applies: |event| event.map(|first, last, phys| phys.checked_add(last - first).is_none()),
    },
    Difference {
        what: "MAP over the MSI window is taken",
        shows: Shows::Status(&[OK], INVAL),
        versions: Versions::All,
        applies: |event| event.map(|first, last, _| first <= 0xfeef_ffff && last >= 0xfee0_0000),
    },
    Difference {
        what: "MAP outside the input range is taken, or refused for an overlap only",
        shows: Shows::Status(&[OK, INVAL], RANGE),
        versions: Versions::Later,
        applies: |event| event.map(|_, last, _| last > event.last_input()),
    },
    Difference {
        what: "UNMAP outside the input range is carried out",
        shows: Shows::Status(&[OK], RANGE),
        versions: Versions::Later,
        applies: |event| event.unmap(|_, _, last, _| last > event.last_input()),
    },
    Difference {
        what: "UNMAP with reserved bytes is carried out",
        shows: Shows::Status(&[OK, RANGE, NOENT], INVAL),
        versions: Versions::All,
        applies: |event| event.unmap(|_, _, _, reserved| reserved != 0),
    },
    Difference {
        what: "an inverted UNMAP is OK, or RANGE when it meets a mapping",
        shows: Shows::Status(&[OK, RANGE], INVAL),
        versions: Versions::Earlier,
        applies: |event| event.unmap(|_, first, last, _| last < first),
    },
    Difference {
        what: "UNMAP that would split a mapping has removed others",
        shows: Shows::State(RANGE),
        versions: Versions::All,
        applies: |event| {
            event.unmap(|domain, first, last, _| {
                let covered = |start, end| first <= start && end <= last;
                let mut mappings = event.device.mappings(domain);
                mappings.any(|mapping| covered(mapping.virt_first, mapping.virt_last))
            })
        },
    },
    Difference {
        what: "a request of an unknown type is answered",
        shows: Shows::Status(&[UNSUPP], None),
        versions: Versions::All,
        applies: |event| event.raw(|readable, _| !(ATTACH..=PROBE).contains(&readable[0])),
    },
    Difference {
        what: "PROBE without room for all properties is answered DEVERR, before them",
        shows: Shows::Status(&[DEVERR], INVAL),
        versions: Versions::Later,
        applies: |event| event.raw(|readable, writable| readable[0] == PROBE && writable < 516),
    },
    Difference {
        what: "the tail of PROBE is behind the properties, not at the end",
        shows: Shows::Length,
        versions: Versions::All,
        applies: |event| event.raw(|readable, writable| readable[0] == PROBE && writable > 516),
    },
    Difference {
        what: "the tail of other requests is at the start, not at the end",
        shows: Shows::Length,
        versions: Versions::All,
        applies: |event| {
            event.raw(|readable, writable| (ATTACH..=UNMAP).contains(&readable[0]) && writable > 4)
        },
    },
    Difference {
        what: "domains outlive a device reset",
        shows: Shows::State(OK),
        versions: Versions::Later,
        applies: |event| event.sent.is_none(),
    },
];
