//! The driver against the model, which executes what it says it executes, and answers late, badly, or not at all.
//!
//! What the device really has mapped counts: after each step the driver must have broken no rule that the model knows,
//! and whatever is mapped is memory that nobody got back. What the driver says is mapped is read by the endpoint.

pub mod world;

use std::sync::Arc;

use arbitrary::{Arbitrary, Result, Unstructured};
use virtio_iommu::{DetachError, Options, Viommu};
use virtio_iommu_model::{Config, feature};

use crate::kernel::Kernel;
use crate::session::{ENDPOINTS, Session};
use crate::{MAX_STEPS, Step, trace};
use world::{Misbehaviour, ModelTransport, Truthful};

/// Polls that a wait takes at most.
const MAX_POLLS: u64 = 6;

/// Which device it is.
#[derive(Clone, Copy, Debug, Arbitrary)]
enum Kind {
    Strict,
    WithoutEventIndex,
    TwoDescriptors,
    EightDescriptors,
    LargeGranule,
    OneDomain,
    Qemu7,
    Qemu10,
    Qemu11,
    CloudHypervisor,
    Crosvm,
}

impl Kind {
    fn config(self) -> Config {
        let strict = Config { log_limit: 0, ..Config::default() };
        let preset = match self {
            Self::Strict => strict,
            Self::WithoutEventIndex => {
                Config { features: strict.features & !feature::RING_EVENT_IDX, ..strict }
            }
            Self::TwoDescriptors => Config { queue_sizes: [2, 2], ..strict },
            Self::EightDescriptors => Config { queue_sizes: [8, 4], ..strict },
            Self::LargeGranule => Config { page_size_mask: !0xffff, ..strict },
            Self::OneDomain => {
                Config { input_range: 0x10_0000..=0x1ff_ffff_ffff, domain_range: 7..=7, ..strict }
            }
            Self::Qemu7 => Config::qemu_7_2(),
            Self::Qemu10 => Config::qemu_10(),
            Self::Qemu11 => Config::qemu_11_1(),
            Self::CloudHypervisor => Config::cloud_hypervisor(),
            Self::Crosvm => Config::crosvm(),
        };
        Config { log_limit: 0, ..preset }
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
    let kernel = Kernel::new(Arc::clone(&world), if few_blocks { 4 } else { 256 });
    // Each round is a life of the driver; the device lives on.
    for _ in 0..4 {
        let again = live(&mut input, &world, &kernel);
        world.check();
        if !again || input.is_empty() {
            break;
        }
    }
    Kernel::<Truthful>::end();
    Ok(())
}

/// One life of the driver. Whether there may be another.
fn live(input: &mut Unstructured<'_>, world: &Arc<Truthful>, kernel: &Kernel<Truthful>) -> bool {
    let options = Options {
        queue_size: 16,
        max_polls: MAX_POLLS,
        max_endpoints: 8,
        max_domains: 8,
        ..Options::default()
    };
    let transport = ModelTransport(Arc::clone(world));
    let Ok(staged) = Viommu::start(transport, kernel.clone(), options) else { return true };
    for endpoint in ENDPOINTS {
        let _ = staged.introduce(endpoint);
    }
    let Ok(viommu) = staged.go_live() else { return true };
    let _ = kernel.take_relaxed();
    let mut session = Session::new(kernel.clone(), viommu);
    for _ in 0..MAX_STEPS {
        let Ok(step) = Step::<Misbehaviour>::arbitrary(input) else { break };
        trace("step", &step);
        match step {
            Step::Op(op) => session.run(op),
            Step::Device(Misbehaviour::Restart { system_reset }) => {
                drop(session);
                world.behave();
                if system_reset {
                    world.system_reset();
                }
                return true;
            }
            Step::Device(misbehaviour) => world.misbehave(misbehaviour),
        }
        world.check();
        if input.is_empty() {
            break;
        }
    }
    end(session, world);
    false
}

/// Lets everything come back, as far as the device lets it.
fn end(session: Session<Truthful>, world: &Arc<Truthful>) {
    let viommu = session.viommu().clone();
    let shut_down = session.is_shut_down();
    world.behave();
    session.end();
    for _ in 0..3 {
        world.release_all();
        viommu.poll();
        viommu.reclaim();
        world.check();
    }
    // One whose DETACH was answered unclearly may be in its domain still, by all that the driver can know.
    let refused = |endpoint| matches!(viommu.detach(endpoint), Err(DetachError::Request { .. }));
    let in_doubt = ENDPOINTS.into_iter().filter(|endpoint| refused(*endpoint)).count();
    viommu.reclaim();
    if world.answered_all() && !shut_down && in_doubt == 0 {
        let stats = viommu.stats();
        assert_eq!((stats.quarantined_mappings, stats.abandoned_requests), (0, 0), "left: {stats:?}");
    }
}
