//! What the fuzz targets in `driver/fuzz` need and nobody else: parsers that are not public.

use crate::wire::fault;
use crate::wire::property::{Properties, Property, ReservedRegion};

pub use crate::wire::fault::Fault;

/// The bytes of a fault record.
pub const RECORD_LEN: usize = fault::RECORD_LEN;

/// One entry of a properties area, read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// A reserved region.
    Reserved(ReservedRegion),
    /// Of a type that is to be ignored.
    Ignored,
    /// Not what the standard says.
    Malformed,
}

/// Walks a properties area.
pub fn properties(area: &[u8]) -> impl Iterator<Item = Read> {
    Properties::new(area).map(|property| match property {
        Property::Reserved(region) => Read::Reserved(region),
        Property::Ignored => Read::Ignored,
        Property::Malformed => Read::Malformed,
    })
}

/// Reads a fault record.
pub fn fault(record: &[u8; RECORD_LEN]) -> Option<Fault> {
    Fault::decode(record)
}
