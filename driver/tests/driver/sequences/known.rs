//! What the driver does otherwise than it should, as far as sequences found it. Each is followed, or let pass, only while
//! its constant is true: it becomes false when the driver is mended, and is then compared like the rest.

/// `shutdown(Leave::Blocked)` leaves the bypass open where it is.
pub(super) const SHUTDOWN_LEAVES_THE_BYPASS_OPEN: bool = true;

/// An endpoint whose DETACH was carried out and answered in a way that says nothing stays unknown, and so out of use:
/// the device answers INVAL to the next DETACH, since the endpoint is in no domain.
pub(super) const UNKNOWN_ENDPOINTS_STAY_SO: bool = true;

/// A domain whose only endpoints are unknown counts as one that has them, although its mappings may have gone with the
/// others: it takes another in, or learns that they are there, and maps nothing again.
pub(super) const MAPPINGS_GET_LOST_BESIDE_UNKNOWN_ENDPOINTS: bool = true;

/// An endpoint that is left in an identity domain which nobody holds is taken for one in an empty domain, and goes to
/// another with its number: there it still reaches everything.
pub(super) const IDENTITY_DOMAINS_ARE_TAKEN_OVER: bool = true;

/// A mapping that could not be mapped again with its domain, and of which the device did not say so, goes into quarantine,
/// and from there back to its memory's owner, although whoever made it still uses it. The driver starts again then.
pub(super) const FAILED_REPLAYS_TAKE_MAPPINGS_AWAY: bool = false;

/// Closing a view detaches its endpoint from whatever domain it is in by now. To be: from its own, or not at all.
pub(super) const CLOSING_A_VIEW_DETACHES_FROM_ANY_DOMAIN: bool = false;
