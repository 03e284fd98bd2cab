#![doc = include_str!("README.md")]

mod anonymous;
mod claim;
mod descriptors;
mod error;
mod handle;
mod invalidate;
mod mapped;
pub mod nested;
mod owned;
mod pages;
mod pasid;
mod replay;
mod send;
mod support;
pub mod table;
mod wire;

pub use anonymous::Anonymous;
pub use descriptors::{DescribedContext, DescriptorContexts, NotAttached};
pub use error::{ContextError, ContextMapError, ContextUnmapError, OwnedMapError, OwnedUnmapError};
pub use handle::{Contexts, ContextsOptions};
pub use mapped::MappedContext;
pub use owned::{NotAdded, OwnedContext};
pub use pages::{PageAnswer, PageGroup, PageGroups, PageWanted, Taken};
pub use pasid::{PageGroupId, Pasid};
pub use support::{ContextSupport, SupportError};
pub(crate) use wire::{ContextRequest, Encoded, TableDescription};
