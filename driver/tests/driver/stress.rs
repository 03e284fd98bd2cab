//! Threads that block and threads that run futures, over one device: what each maps is its own, and at the end nothing is
//! lost.
//!
//! ```text
//!   3 threads block    3 threads run futures    1 moves an endpoint,     1 answers late, makes faults,
//!                                                  reclaims                 serves interrupts, watches
//! ```
//! Nobody polls futures that were not woken, so that a lost wake-up is a standstill, which the last thread ends.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread;
use std::time::{Duration, Instant};

use virtio_iommu::{
    CoherentMemory, Direction, DmaDevice, DmaError, DmaMapping, Domain, DomainOptions, Endpoint, EndpointId,
    EndpointOptions, Interrupt, Iova, MapError, Options, PhysAddr, PhysSegment, Unmapped, Viommu,
};
use virtio_iommu_model::{Config, Endpoint as ModelEndpoint, Execute, Inject, Random, Release};

use crate::support::{ANYWHERE, Broken, EP, EP2, Machine, PAGE, RW, Rng, Task, TestPlatform, take_broken};

/// Endpoints that have mappings, two of them in one domain, and one that goes from domain to domain.
const WORKING: [EndpointId; 4] = [EP, EP2, EndpointId::new(10), EndpointId::new(11)];
const WANDERING: EndpointId = EndpointId::new(12);
const DOMAIN_OF: [usize; 4] = [0, 0, 1, 2];

const BLOCKING_THREADS: u64 = 3;
const EXECUTORS: u64 = 3;
const TASKS: u64 = 12;
/// How long nothing may happen, far more than a slow host takes.
const STANDSTILL: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Weather {
    /// Answers are late and may be refusals, but each comes before any deadline.
    Calm,
    /// Some come after it, say nothing, or find that the future was dropped.
    Rough,
}

struct World {
    endpoints: Vec<Endpoint<TestPlatform>>,
    domains: Vec<Domain<TestPlatform>>,
    viommu: Viommu<TestPlatform>,
    weather: Weather,
    /// Everything that was ever lent.
    lent: Mutex<Vec<PhysAddr>>,
    progress: AtomicU64,
    /// Futures that were dropped half-way.
    given_up: AtomicU64,
    /// When whoever blocks stops. From then on nobody wakes futures but for their own answers.
    blocking_ends: Instant,
    ends: Instant,
    machine: Machine,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    fn new(weather: Weather, run_time: Duration) -> Self {
        let machine = Machine::new(Config { held_events: 64, ..Config::default() });
        for endpoint in &WORKING[2..] {
            machine.device().add_endpoint(ModelEndpoint::x86(endpoint.get()));
        }
        machine.device().add_endpoint(ModelEndpoint::x86(WANDERING.get()));
        // By the clock, which the waits and the last thread move.
        let timeout_ns = if weather == Weather::Calm { u64::MAX } else { 3_000_000 };
        let options = Options { timeout_ns, max_polls: u64::MAX, queue_size: 32, ..Options::default() };
        let staged = machine.start_with(options).unwrap();
        for endpoint in WORKING.into_iter().chain([WANDERING]) {
            staged.introduce(endpoint).unwrap();
        }
        let viommu = staged.go_live().unwrap();
        let domain = || viommu.create_domain(DomainOptions { mappings: 4096, ..Default::default() }).unwrap();
        let domains: Vec<_> = (0..3).map(|_| domain()).collect();
        let open = |index: usize| {
            viommu.open(WORKING[index], &domains[DOMAIN_OF[index]], EndpointOptions::default()).unwrap()
        };
        let endpoints = (0..WORKING.len()).map(open).collect();
        let (lent, progress, given_up) = Default::default();
        let blocking_ends = Instant::now() + run_time / 2;
        let ends = blocking_ends + run_time / 2;
        Self { endpoints, domains, viommu, weather, lent, progress, given_up, blocking_ends, ends, machine }
    }

    fn is_over(&self) -> bool {
        Instant::now() >= self.ends
    }

    fn went_on(&self) {
        self.progress.fetch_add(1, Ordering::Relaxed);
    }
}

/// Gives a future up when it was polled a few times.
struct GivenUp<F> {
    future: F,
    polls_left: Option<u64>,
}

impl<F: Future + Unpin> Future for GivenUp<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let ready = Pin::new(&mut self.future).poll(context).map(Some);
        match &mut self.polls_left {
            Some(0) if ready.is_pending() => return Poll::Ready(None),
            Some(left) => *left = left.saturating_sub(1),
            None => {}
        }
        ready
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Blocking,
    Futures,
}

enum Mine {
    Lent(DmaMapping, PhysAddr),
    Coherent(CoherentMemory),
    List(DmaMapping, Vec<Iova>, Vec<PhysSegment>),
    Raw(Iova, PhysAddr),
}

/// Someone with mappings of his own, through one endpoint.
struct Worker<'a> {
    world: &'a World,
    index: usize,
    way: Way,
    rng: Rng,
    /// Memory that he maps in place. A part of it goes out of use when it is in quarantine.
    pages: Vec<PhysAddr>,
    mine: Vec<Mine>,
    tag: u64,
}

/// Blocks, or awaits and perhaps gives up: then `None`.
macro_rules! run {
    ($worker:expr, $blocking:expr, $future:expr) => {
        match $worker.way {
            Way::Blocking => Some($blocking),
            Way::Futures => {
                let polls_left = $worker.patience();
                let future = pin!($future);
                let result = GivenUp { future, polls_left }.await;
                $worker.world.given_up.fetch_add(result.is_none().into(), Ordering::Relaxed);
                result
            }
        }
    };
}

impl<'a> Worker<'a> {
    fn new(world: &'a World, index: usize, way: Way, seed: u64) -> Self {
        let block = world.machine.memory(32 * PAGE).phys.get();
        let pages = (0..32).map(|page| PhysAddr::new(block + page * PAGE)).collect();
        Self { world, index, way, rng: Rng::new(seed), pages, mine: Vec::new(), tag: seed << 32 }
    }

    fn endpoint(&self) -> &'a Endpoint<TestPlatform> {
        &self.world.endpoints[self.index]
    }

    fn domain(&self) -> &'a Domain<TestPlatform> {
        &self.world.domains[DOMAIN_OF[self.index]]
    }

    fn patience(&mut self) -> Option<u64> {
        let short = self.world.weather == Weather::Rough && self.rng.below(8) == 0;
        short.then(|| self.rng.below(3))
    }

    async fn run(mut self) {
        let ends = if self.way == Way::Blocking { self.world.blocking_ends } else { self.world.ends };
        while Instant::now() < ends {
            match self.rng.below(10) {
                0..=4 if self.mine.len() < 6 => self.map_something().await,
                0..=8 if !self.mine.is_empty() => {
                    let index = self.rng.below(self.mine.len() as u64) as usize;
                    let mine = self.mine.swap_remove(index);
                    self.unmap(mine).await;
                }
                _ => {
                    if let Some(mine) = self.mine.pop() {
                        self.check(&mine);
                        self.mine.push(mine);
                    }
                }
            }
            self.world.went_on();
        }
        while let Some(mine) = self.mine.pop() {
            self.unmap(mine).await;
        }
    }

    async fn map_something(&mut self) {
        let both = Direction::Both;
        let endpoint = self.endpoint();
        match self.rng.below(4) {
            0 => {
                let (held, phys) = self.world.machine.lend(PAGE);
                lock(&self.world.lent).push(phys);
                match run!(self, endpoint.adopt(held, both), endpoint.adopt_async(held, both)) {
                    Some(Ok(mapping)) => self.mine.push(Mine::Lent(mapping, phys)),
                    Some(Err((_, Some(held)))) => {
                        self.world.machine.give_back(held.into_memory());
                    }
                    Some(Err((error, None))) => assert!(is_in_doubt(&error), "the memory is lost: {error}"),
                    None => {}
                }
            }
            1 => {
                let memory = run!(self, endpoint.alloc_coherent(100), endpoint.alloc_coherent_async(100));
                if let Some(Ok(memory)) = memory {
                    self.mine.push(Mine::Coherent(memory));
                }
            }
            2 if self.pages.len() >= 8 => {
                // Pages that do not touch take a request each.
                let list: Vec<PhysAddr> = (0..4).map(|_| self.take_page()).collect();
                let segments: Vec<_> =
                    list.iter().map(|phys| PhysSegment { phys: *phys, len: PAGE as usize }).collect();
                let mut iovas = vec![Iova::new(0); 4];
                // SAFETY: the worker's pages, which nobody uses until they are unmapped.
                let mapped =
                    // SAFETY: the test's own memory, which is never reused, and its own mappings.
                    run!(self, unsafe { endpoint.map_scatter(&segments, both, &mut iovas) }, unsafe {
                        endpoint.map_scatter_async(&segments, both, &mut iovas)
                    });
                match mapped {
                    Some(Ok(mapping)) => self.mine.push(Mine::List(mapping, iovas, segments)),
                    Some(Err(error)) if !is_in_doubt(&error) => self.pages.extend(list),
                    _ => {}
                }
            }
            _ if !self.pages.is_empty() => {
                let phys = self.take_page();
                let domain = self.domain();
                // SAFETY: as above.
                let mapped = run!(self, unsafe { domain.map(phys, PAGE, RW, ANYWHERE) }, unsafe {
                    domain.map_async(phys, PAGE, RW, ANYWHERE)
                });
                match mapped {
                    Some(Ok(iova)) => self.mine.push(Mine::Raw(iova, phys)),
                    Some(Err(error)) if !matches!(error, MapError::Quarantined { .. }) => {
                        self.pages.push(phys)
                    }
                    _ => {}
                }
            }
            _ => {}
        }
        if let Some(mine) = self.mine.pop() {
            self.check(&mine);
            self.mine.push(mine);
        }
    }

    fn take_page(&mut self) -> PhysAddr {
        let index = self.rng.below(self.pages.len() as u64) as usize;
        self.pages.swap_remove(index)
    }

    /// Has the endpoint write through each address, and looks where that ended up.
    fn check(&mut self, mine: &Mine) {
        let places: Vec<(Iova, PhysAddr)> = match mine {
            Mine::Lent(mapping, phys) => vec![(mapping.iova(), *phys)],
            Mine::Coherent(memory) => {
                vec![(memory.iova(), PhysAddr::new(memory.ptr().addr().get() as u64))]
            }
            Mine::List(_, iovas, segments) => {
                iovas.iter().copied().zip(segments.iter().map(|segment| segment.phys)).collect()
            }
            Mine::Raw(iova, phys) => vec![(*iova, *phys)],
        };
        for (iova, phys) in places {
            self.tag += 1;
            let offset = 8 * self.rng.below(PAGE / 8);
            let at = iova.get() + offset;
            let endpoint = WORKING[self.index];
            self.world.machine.dma_write(endpoint, at, &self.tag.to_le_bytes()).unwrap();
            assert_eq!(self.world.machine.dma_read(endpoint, at, 8).unwrap(), self.tag.to_le_bytes());
            let host = std::ptr::with_exposed_provenance::<u64>((phys.get() + offset) as usize);
            // SAFETY: memory of the test's that is not freed while it is mapped; the device writes only when asked.
            assert_eq!(unsafe { host.read_volatile() }, self.tag, "it went elsewhere");
            let known = self.domain().translate(Iova::new(at)).unwrap();
            assert_eq!(known.phys.get() + (at - known.range.start().get()), phys.get() + offset);
        }
    }

    async fn unmap(&mut self, mine: Mine) {
        self.check(&mine);
        let (endpoint, domain) = (self.endpoint(), self.domain());
        match mine {
            Mine::Lent(mapping, phys) => {
                let unmapped = run!(self, endpoint.unmap(mapping), endpoint.unmap_async(mapping));
                if let Some(Ok(Unmapped::Now)) = unmapped {
                    // Another thread's `poll` may be giving it back at this moment.
                    let since = Instant::now();
                    while self.world.machine.is_live(phys) {
                        assert!(since.elapsed() < STANDSTILL, "unmapped, and not back");
                        thread::yield_now();
                    }
                }
            }
            Mine::Coherent(memory) => {
                let _ = run!(self, endpoint.free_coherent(memory), endpoint.free_coherent_async(memory));
            }
            Mine::List(mapping, _, segments) => {
                if let Some(Ok(Unmapped::Now)) =
                    run!(self, endpoint.unmap(mapping), endpoint.unmap_async(mapping))
                {
                    self.pages.extend(segments.iter().map(|segment| segment.phys));
                }
            }
            Mine::Raw(iova, phys) => {
                // SAFETY: mapped by this worker.
                let unmapped = run!(self, unsafe { domain.unmap(iova, PAGE) }, unsafe {
                    domain.unmap_async(iova, PAGE)
                });
                if let Some(Ok(())) = unmapped {
                    self.pages.push(phys);
                }
            }
        }
    }
}

fn is_in_doubt(error: &DmaError) -> bool {
    matches!(error, DmaError::Map(MapError::Quarantined { .. }))
}

/// Polls what was woken, until all is done.
fn execute(mut tasks: Vec<Task<'_, ()>>) {
    let mut seen: Vec<Option<u32>> = vec![None; tasks.len()];
    while !tasks.is_empty() {
        let mut idle = true;
        for index in (0..tasks.len()).rev() {
            let wakes = Some(tasks[index].wakes());
            if wakes == seen[index] {
                continue;
            }
            (seen[index], idle) = (wakes, false);
            if tasks[index].poll().is_ready() {
                drop(tasks.swap_remove(index));
                seen.swap_remove(index);
            }
        }
        if idle {
            thread::sleep(Duration::from_micros(20));
        }
    }
}

/// An endpoint on the move, and what kernels do now and then. Blocks like others.
fn disturb(world: &World, seed: u64) {
    let World { viommu, domains, .. } = world;
    let mut rng = Rng::new(seed);
    while Instant::now() < world.blocking_ends {
        match rng.below(8) {
            // Refused, and of unknown outcome, at times.
            0..=1 => {
                let _ = viommu.move_endpoint(WANDERING, &domains[rng.below(3) as usize]);
                let _ = viommu.attach(WANDERING, &domains[rng.below(3) as usize]);
            }
            2 => {
                viommu.stats();
                viommu.reclaim();
            }
            _ => thread::yield_now(),
        }
    }
}

/// Ends all waits when it is dropped, so that a test whose device is not served any more ends too.
struct LastAct<'a>(&'a World);

impl Drop for LastAct<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.machine.device().fail();
            self.0.viommu.on_interrupt();
            self.0.viommu.poll();
        }
    }
}

/// The device's late answers and faults, the handler of its interrupts and what that wakes, and the watch. Never blocks.
fn serve(world: &World, seed: u64, done: &AtomicBool) {
    let World { machine, viommu, .. } = world;
    let _last_act = LastAct(world);
    let mut rng = Rng::new(seed);
    let (mut turns, mut faults) = (0, 0);
    let mut all_late = false;
    let (mut last, mut since) = (0, Instant::now());
    while !done.load(Ordering::Acquire) {
        if !all_late && world.weather == Weather::Calm && Instant::now() >= world.blocking_ends {
            // Everybody sleeps now and then.
            all_late = true;
            let choices = vec![Inject::Hold(Execute::Now), Inject::Hold(Execute::AtRelease)];
            machine.device().inject.random = Some(Random::new(seed, 1, choices));
        }
        if world.is_over() && world.weather == Weather::Rough {
            // What is left ends without disturbance.
            machine.device().inject.random = None;
        }
        let which = match rng.below(4) {
            0 => Release::Newest,
            1 => Release::AllReversed,
            2 => Release::Nth(rng.below(8) as usize),
            _ => Release::Oldest,
        };
        machine.release(which);
        machine.pass_time(1_000);
        turns += 1;
        if turns % 4 == 1 {
            assert!(!machine.reaches(WORKING[rng.below(4) as usize], 0), "nothing is ever mapped there");
        }
        // In rough weather deadlines pass, which nobody interrupts for.
        if viommu.on_interrupt() == Interrupt::Wake || world.weather == Weather::Rough {
            faults += viommu.poll();
            while viommu.next_fault().is_some() {}
        }
        let now = world.progress.load(Ordering::Relaxed);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        assert!(since.elapsed() < STANDSTILL, "standstill after {now} steps");
        thread::yield_now();
    }
    assert!(faults > 0);
}

fn storm(weather: Weather, seed: u64, run_time: Duration) {
    let world = World::new(weather, run_time);
    let (refuse, range, defer) = (Inject::Refuse(8), Inject::Refuse(5), Inject::Defer);
    let (now, at_release) = (Inject::Hold(Execute::Now), Inject::Hold(Execute::AtRelease));
    let mut choices = vec![refuse, range, defer, now, now, at_release, at_release];
    if weather == Weather::Rough {
        choices.extend([Inject::Status(3), Inject::UsedLen(0), Inject::Unwritten]);
    }
    world.machine.device().inject.random = Some(Random::new(seed, 3, choices));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let (world, done) = (&world, &done);
        // All whose requests the device has to answer, which it does until each of them is done.
        let mut workers = Vec::new();
        for number in 0..BLOCKING_THREADS {
            let run = move || {
                let worker = Worker::new(world, number as usize, Way::Blocking, seed + number);
                Task::new(worker.run()).finish();
                assert_eq!(take_broken(), Broken::NONE);
            };
            workers.push(scope.spawn(run));
        }
        for number in 0..EXECUTORS {
            let run = move || {
                let task = |task| {
                    let seed = seed + 100 * (number + 1) + task;
                    Task::new(Worker::new(world, (number + task) as usize % 4, Way::Futures, seed).run())
                };
                execute((0..TASKS).map(task).collect());
                assert_eq!(take_broken(), Broken::NONE);
            };
            workers.push(scope.spawn(run));
        }
        workers.push(scope.spawn(move || {
            disturb(world, seed + 1000);
            assert_eq!(take_broken(), Broken::NONE);
        }));
        scope.spawn(move || {
            serve(world, seed + 2000, done);
            assert_eq!(take_broken(), Broken::NONE);
        });
        let results: Vec<_> = workers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        done.store(true, Ordering::Release);
        for result in results {
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
    check_end(world);
}

/// After the storm: all answers are there, and nothing is lost.
fn check_end(world: World) {
    let World { machine, viommu, domains, endpoints, lent, progress, given_up, weather, .. } = world;
    assert_eq!(given_up.into_inner() > 0, weather == Weather::Rough);
    machine.device().inject.random = None;
    machine.release(Release::All);
    viommu.poll();
    viommu.reclaim();
    let stats = viommu.stats();
    println!("{} steps, {stats:?}", progress.into_inner());
    let doubt = (stats.abandoned_requests, stats.quarantined_mappings, stats.quarantined_bytes);
    assert_eq!((doubt, stats.stray_answers), ((0, 0, 0), 0));
    for phys in lock(&lent).iter() {
        assert!(!machine.is_live(*phys), "lent memory is kept");
    }
    // The queues'.
    assert_eq!(machine.outstanding(), 2, "memory of the platform is kept");
    // Up to the MSI window, above which the addresses of the views that always fault lie.
    let len = 0xfee0_0000;
    for domain in &domains {
        assert_eq!((domain.mapping_count(), domain.stats().mapped_bytes), (0, 0));
        assert_eq!(machine.device().mappings(domain.id().get()).count(), 0);
        // SAFETY: no endpoint does anything meanwhile.
        unsafe { domain.map_at(Iova::new(0), PhysAddr::new(0), len, RW) }.unwrap();
        // SAFETY: mapped just above.
        unsafe { domain.unmap(Iova::new(0), len) }.unwrap();
    }
    drop(endpoints);
}

/// Fails when `Viommu::poll` wakes nobody: whoever blocks makes up for that, as long as somebody does.
#[test]
fn late_answers_and_refusals() {
    storm(Weather::Calm, 0x5eed_0001, Duration::from_millis(1200));
}

/// Fails when `InFlight` or `Owned` does nothing when it is dropped.
#[test]
fn deadlines_dropped_futures_and_answers_that_say_nothing() {
    storm(Weather::Rough, 0x5eed_0002, Duration::from_millis(1200));
}
