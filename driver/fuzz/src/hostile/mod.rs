//! The driver against a device that may write anything.
//!
//! What the device *says* counts, in the order in which it says it: memory may go back once the device confirmed that
//! nothing reaches it, be that true or not. [`account`] keeps what it said, from the bytes in the rings alone. Where
//! the device scribbles over shared memory that says what it said, only panics, hangs, and memory of the queues count.

pub mod account;
pub mod device;
pub mod rings;

use std::sync::Arc;

use arbitrary::{Arbitrary, Result, Unstructured};
use virtio_iommu::{Options, Viommu};

use crate::kernel::{Kernel, call_out};
use crate::session::{ENDPOINTS, Session};
use crate::{MAX_STEPS, Step, trace};
use device::{Action, Hostile, HostileTransport, Setup};

/// Polls that a wait takes at most.
const MAX_POLLS: u64 = 6;

/// Runs an input.
///
/// # Errors
/// When the bytes are too few for a set-up.
///
/// # Panics
/// When the driver does not keep its promises.
pub fn run(data: &[u8]) -> Result<()> {
    let mut input = Unstructured::new(data);
    let setup = Setup::arbitrary(&mut input)?;
    trace("device", &setup);
    let blocks = if setup.few_blocks { 3 } else { 64 };
    let early = setup.early.clone();
    let world = Arc::new(Hostile::new(setup));
    let kernel = Kernel::new(Arc::clone(&world), blocks);
    early.iter().for_each(|action| world.push(*action));
    session(&mut input, &world, kernel);
    Kernel::<Hostile>::end();
    Ok(())
}

fn session(input: &mut Unstructured<'_>, world: &Arc<Hostile>, kernel: Kernel<Hostile>) {
    let options = Options {
        queue_size: 16,
        max_polls: MAX_POLLS,
        max_endpoints: 8,
        max_domains: 8,
        fault_backlog: 4,
        own_endpoint: None,
        ..Options::default()
    };
    let Ok(staged) = Viommu::start(HostileTransport(Arc::clone(world)), kernel.clone(), options) else {
        return;
    };
    for endpoint in ENDPOINTS {
        let _ = staged.introduce(endpoint);
    }
    let Ok(viommu) = staged.go_live() else { return };
    let _ = kernel.take_relaxed();
    let mut session = Session::new(kernel, viommu);
    for _ in 0..MAX_STEPS {
        let Ok(step) = Step::<Action>::arbitrary(input) else { break };
        trace("step", &step);
        match step {
            Step::Op(op) => session.run(op),
            Step::Device(action) => world.push(action),
        }
        if input.is_empty() {
            break;
        }
    }
    session.end();
    call_out("the end of a session");
}
