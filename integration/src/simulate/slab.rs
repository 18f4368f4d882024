// SPDX-License-Identifier: Apache-2.0
//! Things that come and go, by handles that notice when a place was given to another.

/// Names a thing in a [`Slab`]; never names its successor in the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle {
    place: u32,
    generation: u32,
}

impl Handle {
    /// Names nothing.
    pub const NONE: Handle = Handle {
        place: u32::MAX,
        generation: u32::MAX,
    };
}

/// Things by handle.
#[derive(Debug)]
pub struct Slab<T> {
    places: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab {
            places: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slab<T> {
    /// Takes a thing in.
    pub fn insert(&mut self, thing: T) -> Handle {
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push((0, None));
            u32::try_from(self.places.len() - 1).expect("a simulation holds fewer things")
        });
        let slot = &mut self.places[place as usize];
        slot.1 = Some(thing);
        Handle {
            place,
            generation: slot.0,
        }
    }

    /// The thing, unless it is gone.
    #[must_use]
    pub fn get(&self, handle: Handle) -> Option<&T> {
        let (generation, thing) = self.places.get(handle.place as usize)?;
        thing.as_ref().filter(|_| *generation == handle.generation)
    }

    /// The same, to change it.
    pub fn get_mut(&mut self, handle: Handle) -> Option<&mut T> {
        let (generation, thing) = self.places.get_mut(handle.place as usize)?;
        thing.as_mut().filter(|_| *generation == handle.generation)
    }

    /// Takes the thing out.
    pub fn remove(&mut self, handle: Handle) -> Option<T> {
        let (generation, thing) = self.places.get_mut(handle.place as usize)?;
        if *generation != handle.generation {
            return None;
        }
        *generation = generation.wrapping_add(1);
        self.free.push(handle.place);
        thing.take()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
