//! Switches that make the model deviate from the standard as other devices do (PROTOCOL 4.2, 4.3; DEVICES 2).
//!
//! The default has every switch off: a strict device. A preset holds only what was measured or read in that device's
//! source; where nothing is known of it, the model stays strict. [`Config`](crate::Config) has presets that add features
//! and ranges.

/// The deviations of one device. All off by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quirks {
    /// Answers an unknown type UNSUPP with used length 4, not unwritten (against R-08).
    pub unknown_type_unsupp: bool,
    /// Stops with NEEDS_RESET on a request without room for head or tail, or an event buffer below 24 bytes.
    pub malformed_stops: bool,
    /// Writes the tail behind the expected length, not at the end of a longer writable part.
    pub tail_at_expected_place: bool,
    /// What a PROBE with too little room gets.
    pub short_probe: ShortProbe,
    /// Behaves as if every offered feature had been negotiated.
    pub ignore_negotiation: bool,
    /// Writes the status of a failing request but reports used length 0.
    pub failure_used_len_zero: bool,
    /// Leaves requests unwritten that are not exactly one readable and one writable descriptor.
    pub one_descriptor_each: bool,

    /// Ignores reserved bytes of ATTACH and UNMAP.
    pub reserved_ignored: bool,
    /// Takes an ATTACH of an endpoint that nobody registered.
    pub attach_unknown_endpoint: bool,
    /// Leaves the old domain before anything is checked: re-attachment drops mappings, failure detaches.
    pub attach_detaches_first: bool,
    /// Answers UNSUPP to an ATTACH of an attached endpoint, to the same or another domain (R-18 allows it).
    pub move_unsupported: bool,
    /// How DETACH behaves.
    pub detach: Detach,

    /// Takes MAPs that are unaligned, single-byte, over reserved regions, outside the input range, or whose physical range
    /// overflows; does not check domain and input ranges in any request.
    pub unchecked: bool,
    /// Takes a MAP whose end is below its start; a covering UNMAP then hangs the device.
    pub inverted_accepted: bool,
    /// Takes inverted UNMAPs: RANGE when some mapping is met, else OK.
    pub inverted_unmap_looked_up: bool,
    /// Status for an inverted or single-byte MAP is RANGE, not INVAL.
    pub inverted_range: bool,
    /// What a MAP or UNMAP that ends at 2^64-1 gets.
    pub last_address: LastAddress,
    /// An UNMAP that would split a mapping has removed those that it met before (against R-37), in
    /// the order of QEMU's tree.
    pub partial_unmap: bool,
    /// An UNMAP of nothing is left unwritten (against R-38).
    pub empty_unmap_unwritten: bool,

    /// Ignores READ and WRITE of mappings (against R-31).
    pub permissions_ignored: bool,
    /// Lets reads through a mapping that has only WRITE (R-31 allows it).
    pub write_implies_read: bool,
    /// Translates whole granules: a smaller mapping exposes its granule, and the byte below a mapping is let through.
    /// Where two mappings meet there, QEMU's choice is made only with `partial_unmap`.
    pub granule_translation: bool,
    /// What fault records say.
    pub faults: FaultStyle,
    /// Leaves ADDRESS out of fault records (R-48 allows it).
    pub omit_fault_address: bool,

    /// Domains and attachments survive a device reset (against R-06).
    pub domains_survive_reset: bool,
    /// After one life (DRIVER_OK, reset) FEATURES_OK does not stick again.
    pub single_life: bool,
    /// Stops on a bad write of `bypass`: a value other than 0 and 1, or the feature was not negotiated.
    pub bad_bypass_write_stops: bool,
    /// `bypass` reads its stored value, but unattached endpoints bypass until it is first written.
    pub bypass_until_written: bool,
    /// Bits ORed into what a read of `bypass` returns, to test that drivers ignore bits 1-7 (D-04; against R-05).
    pub bypass_read_noise: u8,
    /// Bytes put in the tail's reserved field, which drivers must ignore (D-08; against R-10).
    pub tail_reserved: [u8; 3],
}

/// What a PROBE gets whose writable part is too small.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShortProbe {
    /// INVAL in the tail, no property.
    #[default]
    Inval,
    /// DEVERR at offset 0, used length 4 (QEMU 10 and 11).
    DevErr,
    /// The device's process aborts (QEMU 7.2).
    Abort,
}

/// How DETACH behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Detach {
    /// NOENT for unknown endpoints, INVAL when it is not in that domain.
    #[default]
    Strict,
    /// As strict, but an endpoint that was never attached is unknown (QEMU 7.2).
    QemuKeepsEndpoint,
    /// As before, and a detached endpoint is unknown again (QEMU 10 and 11).
    QemuForgetsEndpoint,
    /// Always OK; detaches whatever domain is named (cloud-hypervisor).
    AlwaysOk,
    /// Always UNSUPP (crosvm).
    Unsupported,
}

/// What a MAP or UNMAP that ends at 2^64-1 gets, once other checks passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LastAddress {
    /// Nothing special.
    #[default]
    Allowed,
    /// RANGE (cloud-hypervisor).
    Range,
    /// The device's process aborts (crosvm).
    Abort,
}

/// What fault records say, and whether there are any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FaultStyle {
    /// READ or WRITE, and ADDRESS; DOMAIN for every registered endpoint without a domain.
    #[default]
    Standard,
    /// Only permission faults say READ or WRITE; UNKNOWN for endpoints that the device does not remember.
    Qemu,
    /// No record is ever sent.
    Never,
}

impl Quirks {
    /// QEMU 10.0.
    pub fn qemu_10() -> Self {
        Self {
            unknown_type_unsupp: true,
            malformed_stops: true,
            tail_at_expected_place: true,
            short_probe: ShortProbe::DevErr,
            ignore_negotiation: true,
            reserved_ignored: true,
            attach_detaches_first: true,
            detach: Detach::QemuForgetsEndpoint,
            unchecked: true,
            inverted_accepted: true,
            inverted_unmap_looked_up: true,
            partial_unmap: true,
            granule_translation: true,
            faults: FaultStyle::Qemu,
            domains_survive_reset: true,
            bad_bypass_write_stops: true,
            ..Self::default()
        }
    }

    /// QEMU 7.2.
    pub fn qemu_7_2() -> Self {
        Self {
            short_probe: ShortProbe::Abort,
            detach: Detach::QemuKeepsEndpoint,
            domains_survive_reset: false,
            ..Self::qemu_10()
        }
    }

    /// QEMU 11.1.
    pub fn qemu_11_1() -> Self {
        Self { inverted_accepted: false, inverted_unmap_looked_up: false, ..Self::qemu_10() }
    }

    /// A device like cloud-hypervisor 54's.
    pub fn cloud_hypervisor() -> Self {
        Self {
            failure_used_len_zero: true,
            one_descriptor_each: true,
            attach_unknown_endpoint: true,
            detach: Detach::AlwaysOk,
            inverted_range: true,
            last_address: LastAddress::Range,
            permissions_ignored: true,
            faults: FaultStyle::Never,
            domains_survive_reset: true,
            bypass_until_written: true,
            ..Self::default()
        }
    }

    /// A device like crosvm's with VFIO endpoints.
    pub fn crosvm() -> Self {
        Self {
            move_unsupported: true,
            detach: Detach::Unsupported,
            last_address: LastAddress::Abort,
            empty_unmap_unwritten: true,
            faults: FaultStyle::Never,
            single_life: true,
            ..Self::default()
        }
    }
}
