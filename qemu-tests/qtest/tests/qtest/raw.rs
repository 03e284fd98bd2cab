//! The cases of QEMU's own test of the device, and what it leaves out, as raw requests.

use qtest::{Answer, EDU, EDU2, HOST_BRIDGE, Machine, Peer as _, QemuPeer, Request, Requester};

use crate::Case;

pub(crate) const CASES: &[Case] = &[
    ("raw/config", config),
    ("raw/attach_detach", attach_detach),
    ("raw/map_unmap", map_unmap),
    ("raw/map_unmap_scaled_to_4_kib", map_unmap_scaled),
    ("raw/properties", properties),
    ("raw/reserved_bits_and_flags", reserved_bits_and_flags),
    ("raw/short_and_unknown_requests", short_and_unknown_requests),
    ("raw/malformed_chains_stop_the_device", malformed_chains_stop_the_device),
    ("raw/bad_bypass_writes_stop_the_device", bad_bypass_writes_stop_the_device),
];

const OK: Option<u8> = Some(0);
const UNSUPP: Option<u8> = Some(2);
const DEVERR: Option<u8> = Some(3);
const INVAL: Option<u8> = Some(4);
const RANGE: Option<u8> = Some(5);
const NOENT: Option<u8> = Some(6);

const READ: u32 = 1;
/// The endpoint that QEMU's test uses.
const EP: u32 = HOST_BRIDGE.get();
/// Endpoints that are not there.
const ABSENT: u32 = 444;
const ABSENT2: u32 = 1;
/// DRIVER_OK and below, with NEEDS_RESET.
const STOPPED: u8 = 0x4f;

/// The device of a machine, and a queue to it.
struct Rig<'a> {
    peer: QemuPeer<'a>,
    requester: Requester,
}

impl<'a> Rig<'a> {
    fn new(machine: &'a Machine) -> Self {
        let mut peer = QemuPeer::new(machine);
        let requester = Requester::start(&mut peer);
        Self { peer, requester }
    }

    fn send(&mut self, request: &Request) -> Answer {
        self.requester.send(&mut self.peer, request)
    }

    /// The status of a request whose answer is a tail and nothing else.
    fn status(&mut self, request: &Request) -> Option<u8> {
        let answer = self.send(request);
        if let Answer::Used { len, written } = &answer {
            assert_eq!((*len, &written[1..]), (4, &[0, 0, 0][..]), "the tail of {request:x?}");
        }
        answer.status()
    }

    fn attach(&mut self, domain: u32, endpoint: u32) -> Option<u8> {
        self.status(&Request::attach(domain, endpoint))
    }

    fn detach(&mut self, domain: u32, endpoint: u32) -> Option<u8> {
        self.status(&Request::detach(domain, endpoint))
    }

    fn map(&mut self, domain: u32, first: u64, last: u64, phys: u64) -> Option<u8> {
        self.status(&Request::map(domain, (first, last), phys, READ))
    }

    fn unmap(&mut self, domain: u32, first: u64, last: u64) -> Option<u8> {
        self.status(&Request::unmap(domain, (first, last)))
    }

    fn raw(&mut self, readable: &[u8], writable: u32) -> Answer {
        self.send(&Request::Raw { readable: readable.to_vec(), writable })
    }
}

fn config(machine: &Machine) {
    let config = QemuPeer::new(machine).config();
    let long = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap());
    assert_eq!(long(0), !0xfff, "page_size_mask");
    assert_eq!(long(8), 0, "input_range.start");
    assert!(long(16) >= 0xffff_ffff, "input_range.end");
    assert_eq!(config[24..28], [0; 4], "domain_range.start");
    assert_eq!(config[28..32], [0xff; 4], "domain_range.end");
    assert_eq!(config[32..36], 512u32.to_le_bytes(), "probe_size");
    assert_eq!(config[36], 1, "bypass");
    assert_eq!(QemuPeer::new(machine).features(), 0x101_3000_0077);
}

fn attach_detach(machine: &Machine) {
    let mut rig = Rig::new(machine);
    assert_eq!(rig.attach(0, EP), OK);
    assert_eq!(rig.attach(0, ABSENT), NOENT);
    assert_eq!(rig.detach(0, ABSENT2), NOENT);
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.detach(0, EP), INVAL);
    assert_eq!(rig.detach(1, EP), OK);
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(1, 0, 0xfff, 0xa1000), OK);
    assert_eq!(rig.map(1, 0x2000, 0x2fff, 0xb1000), OK);
    assert_eq!(rig.detach(1, EP), OK);
    // Not in QEMU's test: the domain died, and one with the same number is empty.
    assert_eq!(rig.map(1, 0, 0xfff, 0xa1000), NOENT);
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(1, 0, 0xfff, 0xa1000), OK);
}

fn map_unmap(machine: &Machine) {
    map_unmap_by(machine, 1);
}

fn map_unmap_scaled(machine: &Machine) {
    map_unmap_by(machine, 0x1000);
}

/// QEMU's sequence, with the small numbers of the standard's examples multiplied by `scale`.
fn map_unmap_by(machine: &Machine, scale: u64) {
    let mut rig = Rig::new(machine);
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(0, 0, 0xfff, 0xa1000), NOENT);
    assert_eq!(rig.map(1, 0, 0xfff, 0xa1000), OK);
    assert_eq!(rig.map(1, 0, 0xffff, 0xb1000), INVAL);
    assert_eq!(rig.unmap(4, 0x10, 0xfff), NOENT);
    assert_eq!(rig.unmap(1, 0x10, 0xfff), RANGE);
    assert_eq!(rig.unmap(1, 0, 0x1000), OK);

    let range = |first: u64, last: u64| (first * scale, (last + 1) * scale - 1);
    let map = |rig: &mut Rig<'_>, first, last, phys| {
        let (first, last) = range(first, last);
        rig.map(1, first, last, phys)
    };
    let unmap = |rig: &mut Rig<'_>, first, last| {
        let (first, last) = range(first, last);
        rig.unmap(1, first, last)
    };
    assert_eq!(unmap(&mut rig, 0, 4), OK, "example 1");
    assert_eq!(map(&mut rig, 0, 9, 0xa1000), OK, "example 2");
    assert_eq!(unmap(&mut rig, 0, 9), OK);
    assert_eq!(map(&mut rig, 0, 4, 0xb1000), OK, "example 3");
    assert_eq!(map(&mut rig, 5, 9, 0xb2000), OK);
    assert_eq!(unmap(&mut rig, 0, 9), OK);
    assert_eq!(map(&mut rig, 0, 9, 0xc1000), OK, "example 4");
    assert_eq!(unmap(&mut rig, 0, 4), RANGE);
    assert_eq!(unmap(&mut rig, 0, 10), OK);
    assert_eq!(map(&mut rig, 0, 4, 0xd1000), OK, "example 5");
    assert_eq!(map(&mut rig, 5, 9, 0xd2000), OK);
    assert_eq!(unmap(&mut rig, 0, 4), OK);
    assert_eq!(unmap(&mut rig, 5, 9), OK);
    assert_eq!(map(&mut rig, 0, 4, 0xe2000), OK, "example 6");
    assert_eq!(unmap(&mut rig, 0, 9), OK);
    assert_eq!(map(&mut rig, 0, 4, 0xf2000), OK, "example 7");
    assert_eq!(map(&mut rig, 10, 14, 0xf3000), OK);
    assert_eq!(unmap(&mut rig, 0, 14), OK);
    assert_eq!(map(&mut rig, 10, 14, 0xf3000), OK, "descending order");
    assert_eq!(map(&mut rig, 0, 4, 0xf2000), OK);
    assert_eq!(unmap(&mut rig, 0, 4), OK);
    assert_eq!(map(&mut rig, 10, 14, 0xf3000), INVAL);
}

fn properties(machine: &Machine) {
    let mut rig = Rig::new(machine);
    for endpoint in [EDU.get(), EDU2.get(), EP] {
        let Answer::Used { len, written } = rig.send(&Request::Probe { endpoint }) else {
            panic!("no answer")
        };
        let mut window = vec![1, 0, 20, 0, 1, 0, 0, 0];
        window.extend(0xfee0_0000u64.to_le_bytes());
        window.extend(0xfeef_ffffu64.to_le_bytes());
        assert_eq!((len, &written[..24]), (516, &window[..]));
        assert!(written[24..].iter().all(|byte| *byte == 0), "the rest, and status OK");
    }
    let unknown = rig.send(&Request::Probe { endpoint: ABSENT });
    assert_eq!(unknown.status(), NOENT);
    let Answer::Used { len: 516, written } = unknown else { panic!("{unknown:?}") };
    assert!(written[..512].iter().all(|byte| *byte == 0));
    let probe = Request::Probe { endpoint: EP }.readable();
    // A longer writable part has its tail behind the properties, not at its end.
    let longer = rig.raw(&probe, 1024);
    assert!(matches!(&longer, Answer::Used { len: 516, .. }));
    assert_eq!(longer.status(), OK);
    assert_eq!(rig.raw(&probe[..8], 516).status(), INVAL);
    // QEMU 7.2 would abort.
    if machine.version().major > 7 {
        assert_eq!(rig.raw(&probe, 4).status(), DEVERR);
        assert_eq!(rig.raw(&probe, 100).status(), DEVERR);
    }
}

fn reserved_bits_and_flags(machine: &Machine) {
    let mut rig = Rig::new(machine);
    let attach = |flags, reserved| Request::Attach { domain: 1, endpoint: EP, flags, reserved };
    assert_eq!(rig.status(&attach(2, 0)), INVAL);
    assert_eq!(rig.status(&attach(0, 7)), OK, "R-13 wants INVAL");
    // Garbage in the head is ignored.
    let mut head = Request::map(1, (0, 0xfff), 0xa1000, READ).readable();
    head[1..4].copy_from_slice(&[0x11, 0x22, 0x33]);
    assert_eq!(rig.raw(&head, 4).status(), OK);
    let flags = |flags| Request::map(1, (0x1000, 0x1fff), 0xa1000, flags);
    assert_eq!(rig.status(&flags(8)), INVAL);
    assert_eq!(rig.status(&flags(1 << 31 | READ)), INVAL);
    assert_eq!(rig.status(&flags(4 | READ)), OK);
    assert_eq!(rig.status(&Request::Unmap { domain: 1, first: 0, last: 0x1fff, reserved: 7 }), OK);
    assert_eq!(rig.status(&Request::Detach { domain: 1, endpoint: EP, reserved: 7 }), OK);

    // A domain that bypasses cannot be mapped, and takes no endpoint that does not want to.
    assert_eq!(rig.status(&attach(1, 0)), OK);
    assert_eq!(rig.map(1, 0, 0xfff, 0xa1000), INVAL);
    assert_eq!(rig.unmap(1, 0, 0xfff), INVAL);
    assert_eq!(rig.attach(2, EDU.get()), OK);
    assert_eq!(rig.attach(1, EDU.get()), INVAL);
    // It is not where it was, though: the refused ATTACH took it out.
    assert_eq!(rig.map(2, 0, 0xfff, 0xa1000), NOENT);
}

fn short_and_unknown_requests(machine: &Machine) {
    let mut rig = Rig::new(machine);
    assert_eq!(rig.attach(1, EP), OK);
    for request in [
        Request::attach(1, EP),
        Request::detach(1, EP),
        Request::map(1, (0, 0xfff), 0xa1000, READ),
        Request::unmap(1, (0, 0xfff)),
    ] {
        let readable = request.readable();
        for len in [4, 8, readable.len() - 1] {
            assert_eq!(rig.raw(&readable[..len], 4).status(), INVAL, "{len} bytes of {request:?}");
        }
        // More than enough is fine, and the tail follows at once.
        let mut long = readable.clone();
        long.extend([0xee; 20]);
        let answer = rig.raw(&long, 64);
        assert!(matches!(&answer, Answer::Used { len: 4, .. }), "{answer:?}");
    }
    for kind in [0, 6, 0x42, 0xff] {
        let answer = rig.raw(&[kind; 40], 4);
        assert_eq!(answer.status(), UNSUPP, "type {kind}");
    }
}

fn malformed_chains_stop_the_device(machine: &Machine) {
    let good = Request::attach(1, EP).readable();
    for (readable, writable) in [(&good[..3], 4), (&[], 4), (&good, 3), (&good, 0)] {
        let mut rig = Rig::new(machine);
        let answer = rig.raw(readable, writable);
        assert_eq!(answer, Answer::Unanswered { status: STOPPED }, "{} and {writable}", readable.len());
        // Only a reset helps.
        assert_eq!(rig.send(&Request::attach(1, EP)), Answer::Unanswered { status: STOPPED });
        let mut rig = Rig::new(machine);
        assert_eq!(rig.attach(1, EP), OK);
    }
}

fn bad_bypass_writes_stop_the_device(machine: &Machine) {
    let mut rig = Rig::new(machine);
    rig.peer.write_bypass(0);
    assert_eq!((rig.peer.config()[36], rig.peer.status()), (0, 0x0f));
    rig.peer.write_bypass(2);
    assert_eq!((rig.peer.config()[36], rig.peer.status()), (0, STOPPED));
    // The value outlives the reset.
    let mut rig = Rig::new(machine);
    assert_eq!((rig.peer.config()[36], rig.peer.status()), (0, 0x0f));
    rig.peer.write_bypass(1);
    assert_eq!(rig.peer.config()[36], 1);
}
