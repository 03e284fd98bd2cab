//! What makers call their mappings. A record keeps a byte of it.

use alloc::vec::Vec;

/// Names a tag: a number of eight bits, where a record has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag(pub(super) u16);

impl Tag {
    /// Of those who did not say.
    pub(crate) const NONE: Self = Self::new(0);
    /// Of those who came when there was no room for another.
    const OTHER: Self = Self::new(u8::MAX);
    /// Where the number lies.
    pub(super) const BITS: u16 = 0xff00;

    const fn new(number: u8) -> Self {
        Self((number as u16) << 8)
    }

    fn number(self) -> usize {
        (self.0 >> 8).into()
    }
}

/// All tags of an IOMMU, each once.
pub(super) struct Tags(Vec<&'static str>);

impl Tags {
    /// With room for all that there can be. Allocates.
    pub(super) fn new() -> Self {
        let mut names = Vec::with_capacity(Tag::OTHER.number());
        names.push("");
        Self(names)
    }

    /// The tag of this name. Bounded by the number of tags, and allocates nothing.
    pub(super) fn tag(&mut self, name: &'static str) -> Tag {
        let place = self.0.iter().position(|known| *known == name).or_else(|| {
            let room = self.0.len() < self.0.capacity().min(Tag::OTHER.number());
            room.then(|| {
                self.0.push(name);
                self.0.len() - 1
            })
        });
        place.map_or(Tag::OTHER, |place| Tag::new(place as u8))
    }

    pub(super) fn name(&self, tag: Tag) -> &'static str {
        self.0.get(tag.number()).copied().unwrap_or("(other)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;

    #[test]
    fn each_name_has_one_tag_until_there_is_no_room() {
        let mut tags = Tags::new();
        assert_eq!((tags.tag(""), tags.name(Tag::NONE)), (Tag::NONE, ""));
        let names: Vec<&'static str> = (0..300).map(|number| &*format!("name {number}").leak()).collect();
        let made: Vec<_> = names.iter().map(|name| tags.tag(name)).collect();
        assert_eq!(tags.tag(names[7]), made[7]);
        for (name, tag) in names.iter().zip(&made).take(254) {
            assert_eq!(tags.name(*tag), *name);
        }
        assert!(made[254..].iter().all(|tag| tags.name(*tag) == "(other)"));
    }
}
