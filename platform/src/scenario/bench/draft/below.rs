//! What lies below a driver within a stretch.

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::hint::black_box;

use virtio_iommu::transport::Transport;

use super::super::meter::Meter;
use crate::arch::clock;
use crate::guest::{VirtualIommu, Work};

const REQUEST_QUEUE: u16 = 0;
/// How often a doorbell is tried out.
const RINGS: usize = 8;

/// The layers below a driver, the outermost call first, and what they did in the stretches that count.
pub(super) struct Below<'l> {
    layers: Vec<Layer<'l>>,
    /// The model that the innermost driver drives.
    device: Option<&'l VirtualIommu>,
    /// Stretches that only warm up.
    warm_up: u64,
    /// Requests and kicks of the device.
    asked: [u64; 2],
}

struct Layer<'l> {
    work: &'l Work,
    /// Ticks that each call takes outside of what is counted, and that are not the caller's.
    outside: u64,
    /// Ticks that each call takes inside of it, by the counting.
    inside: u64,
    ticks: u64,
}

impl<'l> Below<'l> {
    /// Nothing that runs on this CPU.
    pub(super) fn nothing() -> Self {
        Self { layers: Vec::new(), device: None, warm_up: 0, asked: [0; 2] }
    }

    /// The model of a device, and what it calls: nests and models by turns.
    pub(super) fn device(meter: &Meter, device: &'l VirtualIommu, inner: &[&'l Work]) -> Self {
        // A doorbell's call counts as the device's; on hardware it is a store.
        let outside = around_a_doorbell(meter, device);
        let layer = |work, outside| Layer { work, outside, inside: meter.overhead(), ticks: 0 };
        let mut layers = vec![layer(device.doorbells(), outside)];
        for (at, work) in inner.iter().enumerate() {
            layers.push(layer(work, if at % 2 == 0 { 0 } else { outside }));
        }
        Self { layers, device: Some(device), warm_up: meter.warm_up(), asked: [0; 2] }
    }

    /// Runs a stretch, and counts what the layers do in it.
    pub(super) fn during<R>(&mut self, stretch: impl FnOnce() -> R) -> R {
        let read = |layer: &Layer<'_>| (layer.work.ticks(), layer.work.calls());
        let before: Vec<_> = self.layers.iter().map(read).collect();
        let asked = self.asked_so_far();
        let result = stretch();
        if self.warm_up > 0 {
            self.warm_up -= 1;
            return result;
        }
        for (layer, (ticks, calls)) in self.layers.iter_mut().zip(before) {
            let calls = layer.work.calls() - calls;
            let counted = layer.work.ticks() - ticks + calls * layer.outside;
            layer.ticks += counted.saturating_sub(calls * layer.inside);
        }
        let [requests, kicks] = self.asked_so_far();
        self.asked = [self.asked[0] + requests - asked[0], self.asked[1] + kicks - asked[1]];
        result
    }

    fn asked_so_far(&self) -> [u64; 2] {
        self.device.map_or([0; 2], |device| {
            let counters = device.with(|device, _| device.counters());
            [counters.ok + counters.failed + counters.unwritten, counters.kicks[usize::from(REQUEST_QUEUE)]]
        })
    }

    /// States what lies within the stretches of a row.
    pub(super) fn state(&self, meter: &mut Meter, name: &str) {
        for (at, layer) in self.layers.iter().enumerate() {
            meter.report.value(&format!("{name}.within.{}", at + 1), layer.ticks, "instructions");
        }
    }

    /// States what the model was asked in them.
    pub(super) fn state_asked(&self, meter: &mut Meter, name: &str) {
        let [requests, kicks] = self.asked;
        meter.report.value(&format!("{name}.requests"), requests, "requests");
        meter.report.value(&format!("{name}.kicks"), kicks, "kicks");
    }
}

/// The ticks of a doorbell before and after those that [`Work`] counts, as the driver rings: by a call through a table.
fn around_a_doorbell(meter: &Meter, device: &VirtualIommu) -> u64 {
    let transport: &dyn Transport = black_box(device);
    let ring = |_| {
        let counted = device.doorbells().ticks();
        let start = clock::ticks();
        transport.notify(REQUEST_QUEUE);
        let ticks = clock::ticks().wrapping_sub(start);
        ticks.saturating_sub(meter.overhead() + device.doorbells().ticks() - counted)
    };
    // There is nothing for the device to do, so that all are alike.
    (0..RINGS).map(ring).min().unwrap_or(0)
}
