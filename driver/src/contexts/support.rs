//! What an endpoint can do with contexts, as its PROBE says it.

use crate::engine::Op;
use crate::error::RequestError;
use crate::exchange::{Need, State};
use crate::id::EndpointId;
use crate::platform::Platform;
use crate::queue::Answer;
use crate::viommu::Viommu;
use crate::wire::feature::Features;
use crate::wire::request::Request;
use alloc::vec;
use core::fmt;

const PROPERTY_OUTPUT_SIZE: u16 = 4;
const PROPERTY_PASID_SIZE: u16 = 5;
const PROPERTY_PAGE_TABLE_FORMAT: u16 = 6;
const PROPERTY_PASID_TABLE_FORMAT: u16 = 7;

/// What an endpoint can do with contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContextSupport {
    /// Bits of a PASID; 0 where it has none.
    pub pasid_bits: u8,
    /// Bits of a physical address that tables may name, where it is said.
    pub output_bits: Option<u8>,
    /// Arm's VMSAv8-64 tables.
    pub arm: bool,
    /// Tables of VT-d's first stage.
    pub vtd: bool,
    /// RISC-V's tables.
    pub riscv: bool,
    /// SMMUv3's tables of context descriptors.
    pub descriptors: bool,
}

/// It could not be found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SupportError {
    /// The draft, or PROBE, was not negotiated.
    NoFeature,
    /// The request failed.
    Request(RequestError),
}

impl fmt::Display for SupportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFeature => f.write_str("the draft with contexts, or PROBE, was not negotiated"),
            Self::Request(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for SupportError {}

impl<P: Platform> Viommu<P> {
    /// What an endpoint can do with contexts. Sends PROBE and waits. Allocates.
    ///
    /// # Errors
    /// [`SupportError`].
    pub fn context_support(&self, endpoint: EndpointId) -> Result<ContextSupport, SupportError> {
        self.shared.block_on(self.context_support_async(endpoint))
    }

    /// [`context_support`](Self::context_support) as a future.
    ///
    /// # Errors
    /// As there.
    pub async fn context_support_async(&self, endpoint: EndpointId) -> Result<ContextSupport, SupportError> {
        if !self.features().contains(Features::CONTEXTS | Features::PROBE) {
            return Err(SupportError::NoFeature);
        }
        let shared = &self.shared;
        let mut area = vec![0; self.probe_size];
        let request = Request::Probe { endpoint };
        let submit = |state: &mut State| shared.submit_one(state, &request, Op::Probe);
        let batch = shared.with_slot(Need::Probe, submit).await.map_err(SupportError::Request)?;
        let mut result = Ok(());
        let each = |state: &mut State, answer: Answer| {
            result = answer.map_err(|(_, error)| error);
            // Under the same lock that took the answer: the next PROBE cannot overwrite it.
            state.requests.copy_properties(&mut area);
        };
        shared.wait(batch, each).await;
        result.map_err(SupportError::Request)?;
        Ok(parse(&area))
    }
}

/// Reads the draft's properties, and passes over others and what is malformed. Ends after at most a quarter of the area's
/// bytes.
fn parse(mut area: &[u8]) -> ContextSupport {
    let mut support = ContextSupport::default();
    while let Some((header, rest)) = area.split_first_chunk::<4>() {
        let kind = u16::from_le_bytes([header[0], header[1]]);
        let len = usize::from(u16::from_le_bytes([header[2], header[3]]));
        let Some((value, rest)) = rest.split_at_checked(len) else { break };
        area = rest;
        let format = value.first_chunk::<2>().map(|bytes| u16::from_le_bytes(*bytes));
        match (kind, value.first(), format) {
            (0, ..) => break,
            (PROPERTY_OUTPUT_SIZE, Some(bits), _) => support.output_bits = Some((*bits).min(64)),
            // PCIe has 20.
            (PROPERTY_PASID_SIZE, Some(bits), _) => support.pasid_bits = (*bits).min(20),
            (PROPERTY_PAGE_TABLE_FORMAT, _, Some(1)) => support.arm = true,
            (PROPERTY_PAGE_TABLE_FORMAT, _, Some(4)) => support.vtd = true,
            (PROPERTY_PAGE_TABLE_FORMAT, _, Some(5)) => support.riscv = true,
            (PROPERTY_PASID_TABLE_FORMAT, _, Some(2)) => support.descriptors = true,
            _ => {}
        }
    }
    support
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_of_the_draft_are_read_and_nonsense_is_passed_over() {
        let area = [
            &[1, 0, 20, 0][..],
            &[0; 20],
            &[4, 0, 4, 0, 48, 0, 0, 0],
            &[5, 0, 4, 0, 16, 0, 0, 0],
            &[6, 0, 4, 0, 4, 0, 0, 0],
            &[6, 0, 4, 0, 99, 0, 0, 0],
            &[7, 0, 4, 0, 2, 0, 0, 0],
            &[5, 0x10, 1, 0, 1],
            &[6, 0, 0, 0],
            &[6, 0, 0xff, 0xff],
        ]
        .concat();
        let expected = ContextSupport {
            pasid_bits: 16,
            output_bits: Some(48),
            vtd: true,
            descriptors: true,
            ..ContextSupport::default()
        };
        assert_eq!(parse(&area), expected);
        assert_eq!(parse(&[5, 0, 1, 0, 255]).pasid_bits, 20);
        for len in 0..area.len() {
            parse(&area[..len]);
        }
    }
}
