//! Contexts: address spaces of a domain, told apart by PASID. A draft extension, behind the feature `contexts`.
//!
//! None of this is in virtio 1.4. `README.md` beside this file says which draft each number comes from, and what is this
//! project's own. Nothing here is used unless the embedder asks for it and the device offers the draft's feature bit.
//!
//! ```text
//!  endpoint ---.                     .- no PASID ---- MAP/UNMAP
//!  endpoint ---+---- domain ----+----+- PASID 1 ----- MAP/UNMAP with a context field
//!  endpoint ---'                     '- PASID 2 ----- page directory + INVALIDATE
//! ```
//! [`table`] builds the page directories.

pub mod table;
