//! Waiting for slots and answers: again and again, or asleep until a waker is called.
//!
//! ```text
//!   block_on: poll, relax, poll, relax ...        an executor: poll -> asleep -> woken -> poll
//!                                                                       |         ^
//!                        registered under the lock, interrupts asked for'         '- whoever drains the ring:
//!                        and the ring looked at once more                            Viommu::poll, another waiter
//! ```
//! Wakers are cloned, called and dropped without the lock (I11). A sleeper is woken when its answer is there, when a
//! slot came free, when its deadline passed, or when no answer comes any more; to be woken twice does no harm.

use super::{Access, Need, Shared, State, Wake};
use crate::error::RequestError;
use crate::options::Options;
use crate::platform::Platform;
use crate::queue::{Answer, Batch, Outcome};
use crate::ring::Interrupts;
use crate::transport::DeviceStatus;
use core::future::{Future, poll_fn};
use core::pin::pin;
use core::sync::atomic::Ordering;
use core::task::{Context, Poll, Waker};

/// Polls without an answer after which the doorbell is rung once more: whoever took it upon himself may have been
/// interrupted, by the very code that waits, just before he rang.
const IMPATIENT_POLLS: u64 = 4096;

/// When a wait ends. The clock is first read after a poll found nothing.
pub(crate) struct Deadline {
    ends_ns: Option<u64>,
    polls: u64,
}

impl Deadline {
    pub(crate) fn new() -> Self {
        Self { ends_ns: None, polls: 0 }
    }

    /// Whether it passed, after one more poll that found nothing.
    pub(crate) fn passed<P: Platform>(&mut self, platform: &P, options: &Options) -> bool {
        self.polls += 1;
        match platform.now_ns() {
            // The polls count even so: a clock may stand still.
            Some(now) => {
                let ends = *self.ends_ns.get_or_insert(now.saturating_add(options.timeout_ns));
                now >= ends || self.polls >= options.max_polls
            }
            None => self.polls >= options.max_polls,
        }
    }
}

fn is_asleep(waker: &Waker) -> bool {
    !waker.will_wake(Waker::noop())
}

/// Requests that were sent together, and whoever waits for them.
pub(crate) struct InFlight<'a, P: Platform> {
    shared: &'a Shared<P>,
    batch: Batch,
    deadline: Deadline,
}

/// What a look at the ring found.
enum Look {
    Done,
    Waiting,
    /// No answer comes any more.
    Hopeless,
}

impl<'a, P: Platform> InFlight<'a, P> {
    /// Requests whose doorbell was rung.
    pub(super) fn new(shared: &'a Shared<P>, batch: Batch) -> Self {
        Self { shared, batch, deadline: Deadline::new() }
    }

    /// Waits for every request, and hands over each outcome. Requests that the deadline catches in flight are given up on.
    pub(crate) async fn wait(mut self, mut each: impl FnMut(&mut State, Answer)) {
        poll_fn(|context| self.poll(context.waker(), &mut each)).await;
    }

    /// The same for one request.
    pub(crate) async fn outcome(self) -> Outcome {
        let mut result = Ok(());
        self.wait(|_, answer| result = answer.map_err(|(_, error)| error)).await;
        result
    }

    #[inline]
    fn poll(&mut self, waker: &Waker, each: &mut impl FnMut(&mut State, Answer)) -> Poll<()> {
        match self.look(each) {
            Look::Done => Poll::Ready(()),
            look => self.poll_again(look, waker, each),
        }
    }

    #[cold]
    fn poll_again(
        &mut self,
        mut look: Look,
        waker: &Waker,
        each: &mut impl FnMut(&mut State, Answer),
    ) -> Poll<()> {
        let shared = self.shared;
        // Bounded: falling asleep fails only when there is something to take, or no hope.
        loop {
            match look {
                Look::Done => return Poll::Ready(()),
                Look::Waiting if !self.deadline.passed(&shared.platform, &shared.options) => {}
                Look::Waiting | Look::Hopeless => {
                    self.give_up(shared.needs_reset(), each);
                    return Poll::Ready(());
                }
            }
            if self.deadline.polls == IMPATIENT_POLLS.min(shared.options.max_polls / 2) {
                if shared.needs_reset() {
                    self.give_up(true, each);
                    return Poll::Ready(());
                }
                // A queue that is being reset has no doorbell.
                if !{ shared.state.lock().paused } {
                    shared.doorbell.store(true, Ordering::Release);
                }
                shared.ring();
            }
            if !is_asleep(waker) || self.sleep(waker) {
                return Poll::Pending;
            }
            look = self.look(each);
        }
    }

    #[inline]
    fn look(&mut self, each: &mut impl FnMut(&mut State, Answer)) -> Look {
        let (found, waker, wake) = {
            let mut state = self.shared.state.lock();
            state.drain();
            let waker = state.requests.unregister(&self.batch);
            state.rest_if_nobody_sleeps();
            while let Some(answer) = state.requests.take(&mut self.batch) {
                each(&mut state, answer);
            }
            let found = match self.batch.is_empty() {
                true => Look::Done,
                false if state.is_hopeless() => Look::Hopeless,
                false => Look::Waiting,
            };
            (found, waker, state.wake_due())
        };
        drop(waker);
        self.shared.wake(wake);
        found
    }

    /// Leaves the waker with the batch's first request. False if the device is done with that meanwhile, or with
    /// everything.
    fn sleep(&mut self, waker: &Waker) -> bool {
        let waker = waker.clone();
        let (old, asleep, wake) = {
            let mut state = self.shared.state.lock();
            let old = state.requests.register(&self.batch, waker);
            state.sleepers.set_alarm(self.deadline.ends_ns);
            state.requests.want_interrupts(Interrupts::Wanted);
            // What the device did before it saw that we want to be interrupted.
            state.drain();
            let wake = state.wake_due();
            (old, !state.is_hopeless() && !state.requests.is_done(&self.batch), wake)
        };
        drop(old);
        self.shared.wake(wake);
        asleep
    }

    /// Hands over what was answered, and gives up on the rest: it and what it touches stay with the device.
    #[cold]
    fn give_up(&mut self, needs_reset: bool, each: &mut impl FnMut(&mut State, Answer)) {
        let (waker, wake) = {
            let mut state = self.shared.state.lock();
            // An answer may have come between the last look and now.
            state.drain();
            let needs_reset = needs_reset.then_some(RequestError::NeedsReset);
            let dead = state.requests.broken().or(needs_reset);
            let news = state.dead.is_none() && dead.is_some();
            // What a recovery sees counts more than what was read before it.
            if !state.paused {
                state.dead = state.dead.or(dead);
            }
            // Not that the driver was shut down meanwhile: these requests were sent, and their outcome is unknown.
            let why = dead.or(state.dead).filter(RequestError::outcome_unknown);
            let why = why.unwrap_or(RequestError::TimedOut);
            let waker = state.requests.unregister(&self.batch);
            state.rest_if_nobody_sleeps();
            for _ in 0..self.batch.len() {
                if let Some(answer) = state.requests.take(&mut self.batch) {
                    each(&mut state, answer);
                } else if let Some(op) = state.requests.abandon(&mut self.batch) {
                    state.engine.lose(op);
                    each(&mut state, Err((op, why)));
                }
            }
            (waker, if news { Wake::All } else { state.wake_due() })
        };
        drop(waker);
        self.shared.wake(wake);
    }
}

impl<P: Platform> Drop for InFlight<'_, P> {
    #[inline]
    /// The operation was dropped before its answers were there.
    fn drop(&mut self) {
        if !self.batch.is_empty() {
            self.give_up(false, &mut |state, answer| {
                if let Err((op, error)) = answer {
                    state.engine.disown_op(op, error);
                }
            });
        }
    }
}

impl<P: Platform> Shared<P> {
    pub(crate) fn needs_reset(&self) -> bool {
        self.transport.status().contains(DeviceStatus::NEEDS_RESET)
    }

    /// Takes note of a device that asks for a reset: nothing that was sent is answered any more, and nothing is sent.
    pub(crate) fn look_at_status(&self) {
        if !self.needs_reset() {
            return;
        }
        self.end(RequestError::NeedsReset);
    }

    /// Nothing is sent from now on, and nobody waits any more.
    pub(crate) fn end(&self, why: RequestError) {
        {
            let mut state = self.state.lock();
            // The driver's own end is final, and a recovery knows best.
            let ours = why == RequestError::ShutDown || !state.paused;
            if ours && state.dead != Some(RequestError::ShutDown) {
                state.dead = Some(why);
            }
        }
        self.wake(Wake::All);
    }

    /// Polls an operation until it is done. Bounded, since its deadlines count polls too.
    #[inline]
    pub(crate) fn block_on<T>(&self, operation: impl Future<Output = T>) -> T {
        let mut operation = pin!(operation);
        let mut context = Context::from_waker(Waker::noop());
        loop {
            if let Poll::Ready(result) = operation.as_mut().poll(&mut context) {
                return result;
            }
            self.platform.relax();
        }
    }

    /// Runs `work` under the lock once a request can be submitted.
    pub(crate) async fn with_slot<R>(
        &self,
        need: Need,
        work: impl FnOnce(&mut State) -> R,
    ) -> Result<R, RequestError> {
        let mut work = Some(work);
        let mut deadline = Deadline::new();
        poll_fn(|context| {
            // Bounded: falling asleep fails only when there is a slot, or no hope.
            loop {
                if let Some(result) = self.try_with_slot(need, &mut work) {
                    return Poll::Ready(result);
                }
                if deadline.passed(&self.platform, &self.options) {
                    return Poll::Ready(Err(RequestError::NoSlot));
                }
                let waker = context.waker();
                if !is_asleep(waker) || self.sleep_for_slot(need, waker, &deadline) {
                    return Poll::Pending;
                }
            }
        })
        .await
    }

    fn try_with_slot<R, F: FnOnce(&mut State) -> R>(
        &self,
        need: Need,
        work: &mut Option<F>,
    ) -> Option<Result<R, RequestError>> {
        let (result, wake) = {
            let mut state = self.state.lock();
            let mut wake = Wake::Nobody;
            if state.dead.is_none() && !state.can_send(need) {
                state.drain();
                wake = state.wake_due();
            }
            let result = match (state.dead, state.requests.broken()) {
                _ if state.has_to_wait(need) => None,
                (Some(dead), _) => Some(Err(dead)),
                (None, Some(broken)) => {
                    state.dead = Some(broken);
                    wake = Wake::All;
                    Some(Err(broken))
                }
                (None, None) if state.can_send(need) => work.take().map(|work| Ok(work(&mut state))),
                (None, None) => None,
            };
            (result, wake)
        };
        self.wake(wake);
        result
    }

    /// False where a slot came free meanwhile, or none will.
    fn sleep_for_slot(&self, need: Need, waker: &Waker, deadline: &Deadline) -> bool {
        let clone = waker.clone();
        let (pushed, asleep, wake) = {
            let mut state = self.state.lock();
            let pushed = state.sleepers.push(clone, need);
            state.sleepers.set_alarm(deadline.ends_ns);
            state.requests.want_interrupts(Interrupts::Wanted);
            state.drain();
            let wake = state.wake_due();
            // A recovery may bring hope.
            let hopeless = state.is_hopeless() && !state.has_to_wait(need);
            (pushed, !hopeless && !state.can_send(need), wake)
        };
        if let Err((spare, known)) = pushed {
            drop(spare);
            if !known {
                waker.wake_by_ref();
            }
        }
        self.wake(wake);
        asleep
    }

    /// Rings for the batch, and looks once. Returns it where not all of it succeeded yet.
    #[inline]
    pub(crate) fn begin(&self, batch: Batch) -> Option<InFlight<'_, P>> {
        self.begin_with(batch, State::take_successes)
    }

    /// The same, where `take` is the way to [`take_successes`](State::take_successes) of such a batch.
    #[inline(always)]
    pub(super) fn begin_with(
        &self,
        mut batch: Batch,
        take: impl FnOnce(&mut State, &mut Batch),
    ) -> Option<InFlight<'_, P>> {
        self.ring();
        if let Some(mut state) = self.state.usual() {
            take(&mut state, &mut batch);
            if state.requests.has_left_any() {
                Access::go_on(state).drain();
            }
        }
        self.in_flight(batch)
    }

    /// What is still to be waited for, if anything is.
    #[inline]
    pub(super) fn in_flight(&self, batch: Batch) -> Option<InFlight<'_, P>> {
        if batch.is_empty() { None } else { Some(InFlight::new(self, batch)) }
    }

    /// Rings for the batch, waits for every request of it, and hands over each outcome. Requests that the deadline
    /// catches in flight are given up on.
    pub(crate) async fn wait(&self, batch: Batch, each: impl FnMut(&mut State, Answer)) {
        self.ring();
        InFlight::new(self, batch).wait(each).await;
    }

    /// The same for a batch of one.
    pub(crate) async fn finish(&self, batch: Batch) -> Outcome {
        match self.begin(batch) {
            None => Ok(()),
            Some(in_flight) => in_flight.outcome().await,
        }
    }

    /// Calls wakers, without the lock.
    #[inline]
    pub(crate) fn wake(&self, whom: Wake) {
        if whom != Wake::Nobody {
            self.wake_some(whom);
        }
    }

    /// Bounded by those who slept when it was called.
    #[cold]
    fn wake_some(&self, whom: Wake) {
        let all = whom == Wake::All;
        let fault_waker = { self.state.lock().faults.waker.take_if(|_| all) };
        if let Some(waker) = fault_waker {
            waker.wake();
        }
        let mut from = 0;
        // Two statements, here and below, so that no waker is called under the lock.
        while let Some((index, waker)) = { self.state.lock().requests.take_waker(from, all) } {
            waker.wake();
            from = index + 1;
        }
        let waiting = self.state.lock().sleepers.waiting.len();
        for _ in 0..waiting {
            let Some(waker) = ({ self.state.lock().take_waiting(all) }) else { break };
            waker.wake();
        }
    }
}
