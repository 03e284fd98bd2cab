//! The rows of the draft's contexts and of nesting: the scenario `bench-contexts`.
//!
//! The device is software that runs on the same CPU, so that a stretch holds its work too. What lies within is stated with
//! each row, layer by layer, and taken off by whoever reads it:
//!
//! ```text
//! NAME.instructions   the whole stretch: the driver of the innermost guest, and all below
//!   NAME.within.1     what its doorbells took: the model of the device, and all below
//!   NAME.within.2     what carried the requests out for the model: a nest, the driver around it, and all below
//!   NAME.within.3     that driver's doorbells, and so on; those of the machine's IOMMU take nothing
//! NAME.requests, NAME.kicks   what the model was asked, where QEMU's device is not asked at all
//! ```

mod below;
mod contexts;
mod nested;

use super::rows::{Rig, Row};

/// Every row, in order.
pub(super) const ROWS: [Row<Rig>; 5] = [
    Row { name: "context_map_unmap", run: contexts::mapped },
    Row { name: "context_invalidate_page", run: contexts::owned },
    Row { name: "nested_map_unmap_depth1", run: nested::one },
    Row { name: "nested_map_unmap_depth2", run: nested::two },
    Row { name: "nested_map_unmap_depth3", run: nested::three },
];
