use std::sync::{Arc, Mutex};
use std::vec::Vec;

use super::controller::Controller;
use super::*;

/// What a controller does when it is switched on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nature {
    /// It is ready at once, and off at once.
    Sound,
    /// It stays as it is.
    Stuck,
    /// It fails.
    Failing,
}

/// Registers of a controller without any queue behind them.
#[derive(Clone)]
struct Fake {
    cap: u64,
    nature: Nature,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    cc: u32,
    csts: u32,
    written: Vec<(usize, u64)>,
}

/// 64 entries, half a second, NVM commands.
const CAP: u64 = 63 | 1 << 24 | 1 << 37;
const LEN: u64 = 0x2000;

impl Fake {
    fn new(nature: Nature) -> Self {
        Self { cap: CAP, nature, state: Arc::default() }
    }

    fn with_status(self, cc: u32, csts: u32) -> Self {
        *self.state.lock().unwrap() = State { cc, csts, written: Vec::new() };
        self
    }

    fn controller(&self) -> Result<Controller, NvmeError> {
        Controller::new(Box::new(self.clone()), LEN)
    }

    fn written(&self) -> Vec<(usize, u64)> {
        self.state.lock().unwrap().written.clone()
    }
}

impl Registers for Fake {
    fn read32(&self, offset: usize) -> u32 {
        let state = self.state.lock().unwrap();
        match offset {
            0x14 => state.cc,
            0x1c => state.csts,
            _ => u32::MAX,
        }
    }

    fn write32(&self, offset: usize, value: u32) {
        let mut state = self.state.lock().unwrap();
        state.written.push((offset, value.into()));
        if offset != 0x14 {
            return;
        }
        state.cc = value;
        state.csts = match (self.nature, value & 1) {
            (Nature::Stuck, _) => state.csts,
            (Nature::Failing, 1) => 2,
            (_, on) => on | if value >> 14 & 3 != 0 { 2 << 2 } else { 0 },
        };
    }

    fn read64(&self, offset: usize) -> u64 {
        if offset == 0 { self.cap } else { u64::MAX }
    }

    fn write64(&self, offset: usize, value: u64) {
        self.state.lock().unwrap().written.push((offset, value));
    }
}

#[test]
fn a_controller_is_switched_on_with_its_queues_and_off() {
    let fake = Fake::new(Nature::Sound);
    let controller = fake.controller().unwrap();
    controller.disable().unwrap();
    controller.enable(8, Iova::new(0x1_0000_1000), Iova::new(0x2000)).unwrap();
    let on = 1 | 6 << 16 | 4 << 20;
    assert_eq!(
        fake.written(),
        [(0x14, 0), (0x24, 7 | 7 << 16), (0x28, 0x1_0000_1000), (0x30, 0x2000), (0x14, on)]
    );
    assert_eq!(controller.check(), Ok(()));
    controller.shut_down().unwrap();
    assert_eq!(fake.written()[5..], [(0x14, on | 1 << 14), (0x14, (on | 1 << 14) & !1)]);
    assert_eq!(controller.check(), Err(NvmeError::Fatal { csts: 2 << 2 }));
}

#[test]
fn a_controller_that_stays_as_it_is_is_given_up() {
    // Off for good, on for good, and never getting anywhere.
    for (cc, csts, what) in [(0, 0, "being ready"), (1, 1, "being off")] {
        let controller = Fake::new(Nature::Stuck).with_status(cc, csts).controller().unwrap();
        let result = match csts {
            0 => controller.enable(8, Iova::new(0), Iova::new(0)),
            _ => controller.disable(),
        };
        assert_eq!(result, Err(NvmeError::Timeout { what, timeout_ns: 500_000_000, csts }));
    }
}

#[test]
fn a_controller_that_fails_is_not_waited_for() {
    let started = std::time::Instant::now();
    let controller = Fake::new(Nature::Failing).controller().unwrap();
    let failed = controller.enable(8, Iova::new(0), Iova::new(0));
    assert_eq!(failed, Err(NvmeError::Fatal { csts: 2 }));
    assert!(started.elapsed().as_millis() < 400, "half a second is its time-out");
    // A reset mends that.
    assert_eq!(controller.disable(), Ok(()));
    let gone = Fake::new(Nature::Stuck).with_status(u32::MAX, u32::MAX).controller().unwrap();
    assert_eq!(gone.check(), Err(NvmeError::Fatal { csts: u32::MAX }));
}

#[test]
fn capabilities_that_cannot_be_used_are_refused() {
    let no_commands = CAP & !(1 << 37);
    let large_pages = CAP | 1 << 48;
    let one_entry = CAP & !0xffff;
    for cap in [u64::MAX, 0, no_commands, large_pages, one_entry] {
        let fake = Fake { cap, ..Fake::new(Nature::Sound) };
        assert!(matches!(fake.controller().err(), Some(NvmeError::Unsupported { .. })), "{cap:#x}");
        assert_eq!(fake.written(), [], "{cap:#x}");
    }
    let short = Controller::new(Box::new(Fake::new(Nature::Sound)), 0x1000);
    assert_eq!(
        short.err(),
        Some(NvmeError::Unsupported { what: "the length of its registers", value: 0x1000 })
    );
    let most = Fake { cap: CAP | 0xffff, ..Fake::new(Nature::Sound) };
    assert_eq!(most.controller().unwrap().max_entries(), u16::MAX);
}

#[test]
fn doorbells_lie_where_the_stride_says_and_inside() {
    let fake = Fake { cap: CAP | 2 << 32, ..Fake::new(Nature::Sound) };
    let controller = fake.controller().unwrap();
    let doorbells = controller.doorbells(3, LEN).unwrap();
    controller.ring_tail(doorbells, 5);
    controller.ring_head(doorbells, 6);
    assert_eq!(fake.written(), [(0x1000 + 6 * 16, 5), (0x1000 + 7 * 16, 6)]);
    // The last one that fits, and the first that does not.
    assert!(controller.doorbells(127, LEN).is_ok());
    assert!(controller.doorbells(128, LEN).is_err());
    let widest = Fake { cap: CAP | 0xf << 32, ..Fake::new(Nature::Sound) };
    assert!(widest.controller().unwrap().doorbells(0, LEN).is_err());
}
