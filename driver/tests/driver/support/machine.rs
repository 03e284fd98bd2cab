//! One machine: a model device, memory, a clock, and what a test does with them.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;

use virtio_iommu::{
    DmaMemory, Domain, DomainOptions, EndpointId, FaultLimit, HeldMemory, Options, PhysAddr, Staged,
    StartError, Viommu,
};
use virtio_iommu_model::{
    Access, AccessError, Config, Device, Endpoint, Inject, LogEntry, Release, Request, Violation,
};

use super::platform::{ModelTransport, POLL_NS, TestPlatform};
use super::ram::Ram;
use super::watch::{self, Broken};

/// The endpoints that every machine has, with the MSI window of x86.
pub(crate) const EP: EndpointId = EndpointId::new(8);
pub(crate) const EP2: EndpointId = EndpointId::new(9);
pub(crate) const PAGE: u64 = 0x1000;

/// Waits end after this many polls, by the clock as well as without one.
pub(crate) const POLLS: u64 = 200;

type OnRelax = Box<dyn FnMut(&mut Device, &mut Ram) + Send>;
type AtDriverOk = Box<dyn FnOnce(&mut Device) + Send>;

pub(crate) struct Inner {
    device: Mutex<Device>,
    pub(super) ram: Ram,
    pub(super) clock: Option<AtomicU64>,
    pub(super) relaxed: AtomicU64,
    pub(super) outstanding: AtomicUsize,
    pub(super) allocations_left: AtomicUsize,
    pub(super) refused_queue: AtomicU32,
    on_relax: Mutex<Option<OnRelax>>,
    at_driver_ok: Mutex<Option<AtDriverOk>>,
    /// Endpoints that the driver wanted quiet, in order.
    pub(super) quiesced: Mutex<Vec<EndpointId>>,
    /// Memory that was lent by [`Machine::lend`] and came back.
    lent_back: Mutex<Vec<PhysAddr>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    pub(super) fn run_at_driver_ok(&self, device: &mut Device) {
        if let Some(work) = lock(&self.at_driver_ok).take() {
            work(device);
        }
    }

    pub(super) fn device(&self) -> MutexGuard<'_, Device> {
        lock(&self.device)
    }

    pub(super) fn run_on_relax(&self) {
        if let Some(work) = &mut *lock(&self.on_relax) {
            work(&mut self.device(), &mut self.ram.clone());
        }
    }
}

/// The test's hand on everything but the driver.
///
/// When it is dropped, which should be at the end of the test, the driver must have broken no rule that the model knows,
/// the device must not have met memory outside of what was handed out, and nothing forbidden happened under the lock.
pub(crate) struct Machine(Arc<Inner>);

impl Machine {
    /// A machine with a clock that moves with each poll.
    pub(crate) fn new(config: Config) -> Self {
        Self::with_clock(config, Some(AtomicU64::new(0)))
    }

    /// A machine whose platform has no clock.
    pub(crate) fn clockless(config: Config) -> Self {
        Self::with_clock(config, None)
    }

    fn with_clock(config: Config, clock: Option<AtomicU64>) -> Self {
        let mut device = Device::new(config);
        for endpoint in [EP, EP2] {
            device.add_endpoint(Endpoint::x86(endpoint.get()));
        }
        Self(Arc::new(Inner {
            device: Mutex::new(device),
            ram: Ram::default(),
            clock,
            relaxed: AtomicU64::new(0),
            outstanding: AtomicUsize::new(0),
            allocations_left: AtomicUsize::new(usize::MAX),
            refused_queue: AtomicU32::new(u32::MAX),
            on_relax: Mutex::new(None),
            at_driver_ok: Mutex::new(None),
            quiesced: Mutex::new(Vec::new()),
            lent_back: Mutex::new(Vec::new()),
        }))
    }

    /// A machine whose driver is up, its bypass closed, both endpoints introduced.
    pub(crate) fn live(config: Config) -> (Self, Viommu<TestPlatform>) {
        let machine = Self::new(config);
        let viommu = machine.bring_up();
        (machine, viommu)
    }

    /// The same, with [`EP`] in a domain, and the log empty.
    pub(crate) fn attached(config: Config) -> (Self, Viommu<TestPlatform>, Domain<TestPlatform>) {
        Self::new(config).attach_one()
    }

    /// Brings the driver up and attaches [`EP`].
    pub(crate) fn attach_one(self) -> (Self, Viommu<TestPlatform>, Domain<TestPlatform>) {
        let viommu = self.bring_up();
        let domain = viommu.create_domain(DomainOptions::default()).unwrap();
        viommu.attach(EP, &domain).unwrap();
        self.device().clear_log();
        (self, viommu, domain)
    }

    pub(crate) fn options() -> Options {
        Options {
            timeout_ns: POLLS * POLL_NS,
            max_polls: POLLS,
            // The clock moves only while the driver waits.
            fault_limit: FaultLimit { records: u32::MAX, window_ns: 1 },
            ..Options::default()
        }
    }

    pub(crate) fn start_with(&self, options: Options) -> Result<Staged<TestPlatform>, StartError> {
        Viommu::start(self.transport(), self.platform(), options)
    }

    pub(crate) fn start(&self) -> Result<Staged<TestPlatform>, StartError> {
        self.start_with(Self::options())
    }

    pub(crate) fn bring_up(&self) -> Viommu<TestPlatform> {
        let staged = self.start().unwrap();
        for endpoint in [EP, EP2] {
            staged.introduce(endpoint).unwrap();
        }
        staged.go_live().unwrap()
    }

    pub(crate) fn transport(&self) -> ModelTransport {
        ModelTransport(Arc::clone(&self.0))
    }

    /// The machine's device, for other code that runs somewhere within the driver.
    pub(crate) fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.0))
    }

    pub(crate) fn platform(&self) -> TestPlatform {
        TestPlatform(Arc::clone(&self.0))
    }

    /// The device. Not to be held across a call into the driver.
    pub(crate) fn device(&self) -> MutexGuard<'_, Device> {
        self.0.device()
    }

    /// Misbehaviour for the next requests, one each.
    pub(crate) fn inject(&self, script: impl IntoIterator<Item = Inject>) {
        self.device().inject.script.extend(script);
    }

    /// Answers requests that are held back.
    pub(crate) fn release(&self, which: Release) -> usize {
        self.device().release(which, &mut self.0.ram.clone())
    }

    /// Answers requests that are held back, and were not executed, with this status.
    pub(crate) fn refuse_held(&self, status: u8) -> usize {
        self.device().refuse_held(status, &mut self.0.ram.clone())
    }

    /// Sends raw bytes on the event queue.
    pub(crate) fn push_event(&self, record: &[u8]) {
        self.device().push_event(&mut self.0.ram.clone(), record);
    }

    /// Runs at each poll of a wait from now on.
    pub(crate) fn on_relax(&self, work: impl FnMut(&mut Device, &mut Ram) + Send + 'static) {
        *lock(&self.0.on_relax) = Some(Box::new(work));
    }

    /// The requests in the log.
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.entries().iter().map(|entry| entry.request).collect()
    }

    pub(crate) fn entries(&self) -> Vec<LogEntry> {
        self.device().log().copied().collect()
    }

    /// Requests and request doorbells that the device saw while `work` ran.
    pub(crate) fn traffic<R>(&self, work: impl FnOnce() -> R) -> (R, usize, u64) {
        let count = || {
            let device = self.device();
            (device.log().len(), device.counters().kicks[0])
        };
        let before = count();
        let result = work();
        let after = count();
        (result, after.0 - before.0, after.1 - before.1)
    }

    /// Moves the clock on.
    pub(crate) fn pass_time(&self, ns: u64) {
        if let Some(clock) = &self.0.clock {
            clock.fetch_add(ns, Ordering::Relaxed);
        }
    }

    /// Polls that waits took so far.
    pub(crate) fn relaxed(&self) -> u64 {
        self.0.relaxed.load(Ordering::Relaxed)
    }

    /// Blocks of DMA memory that the driver has.
    pub(crate) fn outstanding(&self) -> usize {
        self.0.outstanding.load(Ordering::Relaxed)
    }

    /// How many more blocks of DMA memory there are.
    pub(crate) fn limit_allocations(&self, left: usize) {
        self.0.allocations_left.store(left, Ordering::Relaxed);
    }

    /// Runs once, when the driver sets DRIVER_OK.
    pub(crate) fn at_driver_ok(&self, work: impl FnOnce(&mut Device) + Send + 'static) {
        *lock(&self.0.at_driver_ok) = Some(Box::new(work));
    }

    pub(crate) fn refuse_queue(&self, queue: u16) {
        self.0.refused_queue.store(queue.into(), Ordering::Relaxed);
    }

    /// The test's own memory, page-aligned, to be mapped.
    pub(crate) fn memory(&self, len: u64) -> DmaMemory {
        self.0.ram.alloc(len as usize, 0x1_0000)
    }

    /// Ends the life of a block from [`memory`](Self::memory).
    pub(crate) fn give_back(&self, memory: DmaMemory) {
        self.0.ram.free(memory, 0x1_0000);
    }

    /// Memory that the driver takes over and gives back through [`is_lent_back`](Self::is_lent_back).
    pub(crate) fn lend(&self, len: u64) -> (HeldMemory, PhysAddr) {
        let memory = self.memory(len);
        lock(&LENDERS).push((memory.phys, Arc::downgrade(&self.0)));
        // SAFETY: the memory is nobody else's, and `take_back` accepts it once.
        (unsafe { HeldMemory::new(memory, take_back) }, memory.phys)
    }

    /// Endpoints that the driver wanted quiet, in order.
    pub(crate) fn quiesced(&self) -> Vec<EndpointId> {
        lock(&self.0.quiesced).clone()
    }

    /// Takes memory back that the driver returned instead of mapping it.
    pub(crate) fn take_returned(&self, held: HeldMemory) {
        // SAFETY: it was lent, and nobody uses it.
        unsafe { take_back(held.into_memory()) };
    }

    /// Whether lent memory came back.
    pub(crate) fn is_lent_back(&self, phys: PhysAddr) -> bool {
        lock(&self.0.lent_back).contains(&phys)
    }

    pub(crate) fn is_live(&self, phys: PhysAddr) -> bool {
        self.0.ram.is_live(phys)
    }

    /// DMA by an endpoint.
    pub(crate) fn dma_read(
        &self,
        endpoint: EndpointId,
        iova: u64,
        len: usize,
    ) -> Result<Vec<u8>, AccessError> {
        let mut bytes = vec![0; len];
        let access = Access::Read(&mut bytes);
        self.device().access(&mut self.0.ram.clone(), endpoint.get(), iova, access)?;
        Ok(bytes)
    }

    /// DMA by an endpoint.
    pub(crate) fn dma_write(&self, endpoint: EndpointId, iova: u64, bytes: &[u8]) -> Result<(), AccessError> {
        self.device().access(&mut self.0.ram.clone(), endpoint.get(), iova, Access::Write(bytes))
    }

    /// What endpoints do by themselves: the device, with memory.
    #[cfg(feature = "contexts")]
    pub(crate) fn with_device<R>(&self, work: impl FnOnce(&mut Device, &mut Ram) -> R) -> R {
        work(&mut self.device(), &mut self.0.ram.clone())
    }

    /// Whether an endpoint can read a byte.
    pub(crate) fn reaches(&self, endpoint: EndpointId, iova: u64) -> bool {
        self.dma_read(endpoint, iova, 1).is_ok()
    }

    /// Takes note that the driver broke rules, which the test wanted, and returns them.
    pub(crate) fn take_violations(&self) -> Vec<Violation> {
        let mut device = self.device();
        let violations = device.violations().copied().collect();
        device.clear_violations();
        violations
    }

    /// Checks what [`Machine`] says.
    pub(crate) fn check(&self) {
        assert_eq!(self.take_violations(), [], "the driver broke a rule");
        assert_eq!(self.device().crash(), None, "the driver crashed the device");
        assert_eq!(self.0.ram.take_strays(), [], "an access outside of memory");
        assert_eq!(watch::take_broken(), Broken::NONE, "under the driver's lock");
    }
}

/// A machine for code that outlives the borrow of a test.
pub(crate) struct Handle(Arc<Inner>);

impl Handle {
    /// As [`Machine::release`].
    pub(crate) fn release(&self, which: Release) -> usize {
        watch::outside(|| self.0.device().release(which, &mut self.0.ram.clone()))
    }

    /// Lets the device ask for a reset.
    pub(crate) fn fail(&self) {
        watch::outside(|| self.0.device().fail());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.check();
        }
    }
}

/// Whose the lent blocks are: a release hook is a plain function.
static LENDERS: Mutex<Vec<(PhysAddr, Weak<Inner>)>> = Mutex::new(Vec::new());

impl Drop for Inner {
    /// What never came back goes with the machine, before its addresses become another's.
    fn drop(&mut self) {
        let gone: *const Self = self;
        watch::outside(|| lock(&LENDERS).retain(|(_, lender)| !std::ptr::eq(lender.as_ptr(), gone)));
    }
}

/// # Safety
/// The memory came from [`Machine::lend`], and nobody uses it any more.
unsafe fn take_back(memory: DmaMemory) {
    watch::call_out();
    watch::outside(|| {
        let mut lenders = lock(&LENDERS);
        let at =
            lenders.iter().position(|(phys, _)| *phys == memory.phys).expect("lent memory came back twice");
        let (phys, machine) = lenders.swap_remove(at);
        drop(lenders);
        let machine = machine.upgrade().expect("the driver keeps its machine");
        lock(&machine.lent_back).push(phys);
        machine.ram.free(memory, 0x1_0000);
    });
}

/// All bytes of a block.
pub(crate) fn bytes_of(memory: &DmaMemory) -> Vec<u8> {
    // SAFETY: a block of a machine that is still there; the model writes only while it is called.
    unsafe { std::slice::from_raw_parts(memory.ptr.as_ptr(), memory.len) }.to_vec()
}

/// Fills a block.
pub(crate) fn fill(memory: &DmaMemory, byte: u8) {
    // SAFETY: as in `bytes_of`.
    unsafe { memory.ptr.as_ptr().write_bytes(byte, memory.len) };
}
