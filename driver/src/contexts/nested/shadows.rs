//! Keeping the device at what the levels come to: making shadows, taking them away, and making good what went wrong.

use super::compose::{self, Piece};
use super::error::NestError;
use super::hardware::{Hardware, Held};
use super::send::{self, Unmapped};
use super::{Nest, SpaceId};
use crate::addr::IovaRange;
use crate::engine::Made;
use crate::error::{MapError, RequestError};
use crate::platform::Platform;
use crate::wire::request::Status;
use alloc::vec::Vec;

/// A shadow of a space: one that there is, or is to be.
type Of<T> = (SpaceId, T);

impl<P: Platform> Nest<P> {
    /// Spaces with a domain that a space's mappings show in, each with the ranges that the given ones are seen at there.
    fn affected(&self, space: SpaceId, ranges: &[IovaRange]) -> Vec<Of<Vec<IovaRange>>> {
        let shadowed = self.spaces.iter().filter(|(_, other)| other.hardware.is_some());
        let mut affected = Vec::new();
        for (other, _) in shadowed {
            let Ok(mut path) = self.path(*other) else { continue };
            let Some(at) = path.iter().position(|step| *step == space) else { continue };
            path.truncate(at);
            path.reverse();
            affected.push((*other, compose::seen_from(&|id| self.level(id), &path, ranges)));
        }
        affected
    }

    /// The pieces of ranges of spaces that endpoints are attached to.
    fn pieces<'r>(&self, of: impl Iterator<Item = Of<&'r IovaRange>>) -> Vec<Of<Piece>> {
        let mut wanted = Vec::new();
        let mut pieces = Vec::new();
        for (space, range) in of {
            let is_used = |hardware: &Hardware<P>| !hardware.endpoints.is_empty();
            if self.hardware(space).is_some_and(is_used) {
                compose::resolve(&|id| self.level(id), space, *range, self.merging, &mut pieces);
            }
            wanted.extend(pieces.drain(..).map(|piece| (space, piece)));
        }
        wanted
    }

    /// Makes the shadows of a range of a space, in which there is none yet. On an error some may be made.
    pub(super) fn make_shadows(&mut self, space: SpaceId, range: IovaRange) -> Result<(), NestError> {
        let affected = self.affected(space, &[range]);
        let ranges = affected.iter().flat_map(|(other, ranges)| ranges.iter().map(|range| (*other, range)));
        let wanted = self.pieces(ranges);
        self.map_pieces(&wanted)
    }

    /// Makes the shadows of one space that the device lacks. On an error some may be made.
    pub(super) fn complete(&mut self, space: SpaceId) -> Result<(), NestError> {
        let mut wanted = Vec::new();
        let whole = self.pieces(core::iter::once((space, &IovaRange::WHOLE)));
        if let Some(hardware) = self.hardware(space) {
            for (_, piece) in whole {
                hardware.without_shadow(piece, &mut wanted);
            }
        }
        let wanted: Vec<Of<Piece>> = wanted.into_iter().map(|piece| (space, piece)).collect();
        let completed = self.map_pieces(&wanted);
        let hardware = self.hardware_mut(space)?;
        let is_stuck = hardware.overlapping(IovaRange::WHOLE).any(|(_, held)| held == Held::Stuck);
        hardware.lacking = completed.is_err() || is_stuck;
        completed
    }

    /// The same for all that may lack some. The first error.
    pub(super) fn complete_all(&mut self) -> Result<(), NestError> {
        let lacking = |hardware: &Hardware<P>| hardware.lacking && !hardware.endpoints.is_empty();
        let spaces = self.spaces.iter();
        let spaces = spaces.filter(|(_, space)| space.hardware.as_ref().is_some_and(lacking));
        let spaces: Vec<SpaceId> = spaces.map(|(id, _)| *id).collect();
        spaces.into_iter().map(|space| self.complete(space)).fold(Ok(()), Result::and)
    }

    /// Takes all shadows away that have an address in ranges of a space as they are seen elsewhere: where they were. On an
    /// error some may be left.
    pub(super) fn drop_shadows(
        &mut self,
        space: SpaceId,
        ranges: &[IovaRange],
    ) -> Result<Vec<Of<IovaRange>>, NestError> {
        let mut gone = Vec::new();
        for (other, ranges) in self.affected(space, ranges) {
            let Some(hardware) = self.hardware(other) else { continue };
            let met = ranges.iter().flat_map(|range| hardware.overlapping(*range));
            gone.extend(met.map(|(shadow, _)| (other, shadow)));
        }
        // One shadow may lie in two of the ranges, which are in order.
        gone.dedup();
        self.unmap_shadows(&gone)?;
        Ok(gone)
    }

    /// Maps again what is left of shadows that went as a whole. What cannot be is lacking, and may be mended.
    pub(super) fn remake(&mut self, gone: &[Of<IovaRange>]) {
        let rest = self.pieces(gone.iter().map(|(space, range)| (*space, range)));
        let Err(error) = self.map_pieces(&rest) else { return };
        log::warn!("what is left of shadows is not mapped any more: {error}");
        self.note_lacking(&rest);
    }

    fn note_lacking<T>(&mut self, of: &[Of<T>]) {
        for (space, _) in of {
            if let Ok(hardware) = self.hardware_mut(*space) {
                hardware.lacking = true;
            }
        }
    }

    /// Maps pieces, all with one doorbell. On an error some may be made.
    fn map_pieces(&mut self, wanted: &[Of<Piece>]) -> Result<(), NestError> {
        let Err((at, error)) = self.send_maps(wanted) else { return Ok(()) };
        let (space, Piece { range, phys, prot }) = wanted[at];
        let shadow = |error| NestError::Shadow { range, error };
        let unused = matches!(error, MapError::Request { error: RequestError::Refused(Status::Inval), .. });
        let domain = &self.hardware_mut(space)?.domain;
        if !unused || domain.stats().maps > 0 {
            return Err(shadow(error));
        }
        // The domain's number may have mappings of an earlier life (I12): whoever maps one by itself gives it another.
        let len = range.len_bytes().ok_or(shadow(error))?;
        // SAFETY: as in `send_maps`.
        let mapped = unsafe { domain.map_at(range.start(), phys, len, prot) };
        let held = match mapped {
            Ok(()) => Held::Mapped,
            Err(MapError::Quarantined { .. }) => Held::Stuck,
            Err(error) => return Err(shadow(error)),
        };
        self.hardware_mut(space)?.insert(range, held);
        mapped.map_err(shadow)?;
        let is_left = |(space, piece): &&Of<Piece>| {
            self.hardware(*space).is_some_and(|hardware| !hardware.has(piece.range.start()))
        };
        let rest: Vec<Of<Piece>> = wanted.iter().filter(is_left).copied().collect();
        self.send_maps(&rest).map_err(|(at, error)| NestError::Shadow { range: rest[at].1.range, error })
    }

    /// The first that failed, and why.
    fn send_maps(&mut self, wanted: &[Of<Piece>]) -> Result<(), (usize, MapError)> {
        for of_one in wanted.chunk_by(|(one, _), (other, _)| one == other) {
            if let Some(hardware) = self.hardware(of_one[0].0) {
                hardware.domain.reserve(hardware.len() + of_one.len());
            }
        }
        let keyed =
            wanted.iter().filter_map(|(space, piece)| Some((self.hardware(*space)?.domain.key(), *piece)));
        let keyed: Vec<_> = keyed.collect();
        // SAFETY: who mapped the memory in the root promised that it may be accessed from every space below, as far as is
        // allowed there, and a piece allows no more than that. It stays so until these shadows are gone, since the root's
        // mapping goes only then: each that is made, or may be, is put down as such.
        let mapped = unsafe { send::map_all(&self.viommu.shared, &keyed) };
        for ((space, piece), made) in wanted.iter().zip(mapped.made) {
            let held = match made {
                Made::Live => Held::Mapped,
                Made::Unknown => Held::Stuck,
                Made::Refused => continue,
            };
            if let Ok(hardware) = self.hardware_mut(*space) {
                hardware.insert(piece.range, held);
            }
        }
        mapped.result
    }

    /// Unmaps shadows, all with one doorbell: those that touch with one request.
    pub(super) fn unmap_shadows(&mut self, gone: &[Of<IovaRange>]) -> Result<(), NestError> {
        let mut runs: Vec<Of<(IovaRange, Held)>> = Vec::new();
        for (space, range) in gone {
            let Some(hardware) = self.hardware(*space) else { continue };
            let held = hardware.overlapping(*range).map(|(_, held)| held).next().unwrap_or(Held::Stuck);
            match runs.last_mut().filter(|(last, _)| last == space) {
                // One that is stuck goes by itself, or not at all.
                Some((_, (run, Held::Mapped)))
                    if held == Held::Mapped && run.last().checked_add(1) == Some(range.start()) =>
                {
                    *run = IovaRange::new(run.start(), range.last()).unwrap_or(*run);
                }
                _ => runs.push((*space, (*range, held))),
            }
        }
        let keyed =
            runs.iter().filter_map(|(space, (range, _))| Some((self.hardware(*space)?.domain.key(), *range)));
        let keyed: Vec<_> = keyed.collect();
        let unmapped = send::unmap_all(&self.viommu.shared, &keyed);
        let is_left = |nest: &Self, space, range| {
            unmapped == Unmapped::Some
                && nest.hardware(space).is_some_and(|hardware| hardware.is_recorded(range))
        };
        // What was not unmapped is in the driver's quarantine, which it tries to empty.
        if gone.iter().any(|(space, range)| is_left(self, *space, *range)) {
            self.viommu.reclaim();
        }
        let mut result = Ok(());
        for (space, range) in gone {
            let stuck = is_left(self, *space, *range);
            let Ok(hardware) = self.hardware_mut(*space) else { continue };
            if stuck {
                hardware.insert(*range, Held::Stuck);
                result = result.and(Err(NestError::Stuck { range: *range }));
            } else {
                hardware.remove(*range);
            }
        }
        if result.is_err() {
            self.note_lacking(gone);
        }
        result
    }

    /// Unmaps all shadows of a space.
    pub(super) fn unmap_all(&mut self, space: SpaceId) -> Result<(), NestError> {
        let gone =
            self.hardware(space).into_iter().flat_map(|hardware| hardware.overlapping(IovaRange::WHOLE));
        let gone: Vec<Of<IovaRange>> = gone.map(|(range, _)| (space, range)).collect();
        self.unmap_shadows(&gone)
    }

    /// Unmaps shadows that are stuck, wherever they are.
    pub(super) fn unmap_stuck(&mut self) -> Result<(), NestError> {
        let spaces = self.spaces.iter();
        let shadows = spaces.filter_map(|(id, space)| Some((*id, space.hardware.as_ref()?)));
        let stuck = shadows.flat_map(|(id, hardware)| {
            let stuck = hardware.overlapping(IovaRange::WHOLE).filter(|(_, held)| *held == Held::Stuck);
            stuck.map(move |(range, _)| (id, range))
        });
        let stuck: Vec<Of<IovaRange>> = stuck.collect();
        self.unmap_shadows(&stuck)
    }
}
