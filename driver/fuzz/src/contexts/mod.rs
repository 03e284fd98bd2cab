//! Contexts and nested spaces over the model, which executes what it says it executes, and answers late, badly, or not at
//! all.
//!
//! After each step every endpoint tries each PASID at a few addresses, and reaches what the driver's answers say: not more,
//! ever, and not less where nothing failed. What the device has cached counts, and so do tables that went back.

pub mod nest;
pub mod op;
pub mod reach;
pub mod session;

use std::sync::Arc;

use arbitrary::{Arbitrary, Result, Unstructured};
use virtio_iommu::{Options, Viommu};
use virtio_iommu_model::{Config, feature};

use crate::kernel::Kernel;
use crate::session::ENDPOINTS;
use crate::trace;
use crate::truthful::world::{Misbehaviour, ModelTransport, Truthful};
use op::Op;
use session::Session;

/// The most steps of one input: after each everything is tried.
const MAX_STEPS: usize = 100;
/// Polls that a wait takes at most.
const MAX_POLLS: u64 = 6;
/// Blocks of memory for the driver and its tables.
const BLOCKS: usize = 4096;
const FEW_BLOCKS: usize = 12;

/// One step of an input.
#[derive(Clone, Debug, Arbitrary)]
enum Step {
    Op(Op),
    Device(Misbehaviour),
}

/// Which device it is.
#[derive(Clone, Copy, Debug, Arbitrary)]
enum Kind {
    Plenty,
    FewDescriptors,
    FewGroups,
    WithoutEventIndex,
}

impl Kind {
    fn config(self) -> Config {
        let contexts = Config { log_limit: 0, ..Config::contexts() };
        match self {
            Self::Plenty => contexts,
            Self::FewDescriptors => Config { queue_sizes: [8, 4], ..contexts },
            Self::FewGroups => Config { page_groups: 2, max_mappings: 3, ..contexts },
            Self::WithoutEventIndex => {
                Config { features: contexts.features & !feature::RING_EVENT_IDX, ..contexts }
            }
        }
    }
}

/// Runs an input.
///
/// # Errors
/// When the bytes are too few for a set-up.
///
/// # Panics
/// When the driver does not keep its promises.
pub fn run(data: &[u8]) -> Result<()> {
    let mut input = Unstructured::new(data);
    let kind = Kind::arbitrary(&mut input)?;
    let few_blocks = bool::arbitrary(&mut input)?;
    trace("device", &kind);
    let world = Arc::new(Truthful::new(kind.config()));
    let kernel = Kernel::new(Arc::clone(&world), if few_blocks { FEW_BLOCKS } else { BLOCKS });
    if let Some(mut session) = start(&world, &kernel) {
        for _ in 0..MAX_STEPS {
            let Ok(step) = Step::arbitrary(&mut input) else { break };
            trace("step", &step);
            match step {
                Step::Op(op) => session.run(op),
                Step::Device(misbehaviour) => world.misbehave(misbehaviour),
            }
            // What is about to go wrong has not gone wrong yet.
            if matches!(step, Step::Op(_) | Step::Device(Misbehaviour::Release(_))) {
                session.check();
            }
            if input.is_empty() {
                break;
            }
        }
        world.behave();
        for _ in 0..3 {
            world.release_all();
            session.run(Op::Poll);
            session.run(Op::Reclaim);
            session.check();
        }
    }
    Kernel::<Truthful>::end();
    Ok(())
}

fn start(world: &Arc<Truthful>, kernel: &Kernel<Truthful>) -> Option<Session> {
    let options = Options {
        queue_size: 16,
        max_polls: MAX_POLLS,
        max_endpoints: 8,
        max_domains: 8,
        accept_contexts: true,
        ..Options::default()
    };
    let staged = Viommu::start(ModelTransport(Arc::clone(world)), kernel.clone(), options).ok()?;
    for endpoint in ENDPOINTS {
        staged.introduce(endpoint).ok()?;
    }
    Session::new(kernel.clone(), staged.go_live().ok()?)
}
