//! Fault records, against a second reading of the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_iommu::fuzzing::{RECORD_LEN, fault};
use virtio_iommu::{FaultAccess, FaultReason};

fuzz_target!(|records: &[u8]| {
    for bytes in records.chunks_exact(RECORD_LEN) {
        let record: [u8; RECORD_LEN] = bytes.try_into().expect("chunks are exact");
        let fault = fault(&record);
        let [reason, reserved @ ..] = &record[..4] else { unreachable!("a record has 24 bytes") };
        assert_eq!(fault.is_none(), reserved.iter().any(|byte| *byte != 0));
        let Some(fault) = fault else { continue };
        let expected = match reason {
            1 => FaultReason::Domain,
            2 => FaultReason::Mapping,
            _ => FaultReason::Unknown,
        };
        assert_eq!(fault.reason, expected);
        assert_eq!(fault.access.contains(FaultAccess::READ), record[4] & 1 != 0);
        assert_eq!(fault.access.contains(FaultAccess::WRITE), record[4] & 2 != 0);
        assert_eq!(fault.endpoint.get().to_le_bytes(), record[8..12]);
        assert_eq!(fault.address.is_some(), record[5] & 1 != 0);
        if let Some(address) = fault.address {
            assert_eq!(address.get().to_le_bytes(), record[16..24]);
        }
        assert!(fault.to_string().starts_with("endpoint 0x"));
    }
});
