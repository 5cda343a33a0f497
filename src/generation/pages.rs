//! Who has which pages of a cache: counts only, no memory.
//!
//! A completion is promised the pages of its longest possible end when it begins, so it never waits in the middle.
//! Pages of a common prompt belong to everyone who reads them, and are free when the last of them has gone.

/// The pages of a pool.
#[derive(Debug)]
pub struct Pages {
    free: Vec<u32>,
    /// How many have each page.
    owners: Vec<u32>,
    /// Free pages that are promised to completions on their way.
    promised: usize,
}

/// What one completion has and may still ask for. It must be given back to [`Pages::release`].
#[derive(Debug, Default)]
pub struct Held {
    pages: Vec<u32>,
    promised: usize,
}

impl Held {
    /// In the order of the tokens.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }
}

impl Pages {
    pub fn new(count: usize) -> Pages {
        Pages { free: (0..count as u32).rev().collect(), owners: vec![0; count], promised: 0 }
    }

    /// Promises `count` pages, if there are this many that are not promised to anyone.
    pub fn promise(&mut self, count: usize) -> Option<Held> {
        (self.free.len() - self.promised >= count).then(|| {
            self.promised += count;
            Held { pages: Vec::new(), promised: count }
        })
    }

    /// Another page of those that were promised.
    pub fn take(&mut self, held: &mut Held) {
        assert!(held.promised > 0, "a completion is longer than was said when it began");
        let page = self.free.pop().expect("promised pages are free");
        held.promised -= 1;
        self.promised -= 1;
        self.owners[page as usize] = 1;
        held.pages.push(page);
    }

    /// Pages of another, which are not written to any more, come behind those that `held` has.
    pub fn share(&mut self, held: &mut Held, pages: &[u32]) {
        for &page in pages {
            assert!(self.owners[page as usize] > 0, "page {page} is free");
            self.owners[page as usize] += 1;
            held.pages.push(page);
        }
    }

    /// Takes back everything.
    pub fn release(&mut self, held: &mut Held) {
        self.promised -= std::mem::take(&mut held.promised);
        for page in held.pages.drain(..) {
            let owners = &mut self.owners[page as usize];
            *owners -= 1;
            if *owners == 0 {
                self.free.push(page);
            }
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.owners.len()
    }

    /// Whether giving `held` back would free any.
    pub fn frees(&self, held: &Held) -> bool {
        held.pages.iter().any(|page| self.owners[*page as usize] == 1)
    }

    /// Whether nobody has any.
    pub fn all_free(&self) -> bool {
        self.promised == 0 && self.free.len() == self.owners.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_promised_to_one_is_refused_to_another() {
        let mut pages = Pages::new(3);
        let mut first = pages.promise(2).unwrap();
        assert!(pages.promise(2).is_none());
        pages.take(&mut first);
        assert!(pages.promise(2).is_none(), "taking changes nothing about it");
        pages.release(&mut first);
        assert!(pages.promise(3).is_some());
    }

    #[test]
    fn a_shared_page_is_free_when_the_last_has_gone() {
        let mut pages = Pages::new(2);
        let (mut first, mut second) = (pages.promise(1).unwrap(), pages.promise(1).unwrap());
        pages.take(&mut first);
        pages.share(&mut second, first.pages());
        assert_eq!(first.pages(), second.pages());
        assert!(!pages.frees(&first));
        pages.release(&mut first);
        assert!(pages.frees(&second));
        assert!(pages.promise(1).is_none(), "one is held, the other promised");
        pages.release(&mut second);
        assert!(pages.all_free());
    }

    proptest! {
        /// Completions come, grow, share and go in any order: nobody's page is another's, and none is lost.
        #[test]
        fn no_page_is_lost_or_given_twice(steps in prop::collection::vec((0u8..4, 0usize..8), 1..200)) {
            let mut pages = Pages::new(12);
            let mut all: Vec<(Held, usize)> = Vec::new();
            for (what, which) in steps {
                let at = which % all.len().max(1);
                match what {
                    0 => all.extend(pages.promise(which).map(|held| (held, 0))),
                    1 if at < all.len() && all[at].0.promised > 0 => pages.take(&mut all[at].0),
                    2 if at < all.len() => {
                        // Only pages at the beginning are common ones.
                        let of = all[at].0.pages().to_vec();
                        if let Some(mut held) = pages.promise(1) {
                            pages.share(&mut held, &of);
                            all.push((held, of.len()));
                        }
                    }
                    3 if at < all.len() => pages.release(&mut all.swap_remove(at).0),
                    _ => {}
                }
                let mut own: Vec<u32> = all.iter().flat_map(|(held, shared)| &held.pages()[*shared..]).copied().collect();
                let count = own.len();
                own.sort_unstable();
                own.dedup();
                prop_assert_eq!(own.len(), count, "a page has two owners that did not share it");
                prop_assert!(own.iter().all(|page| !pages.free.contains(page)));
            }
            all.iter_mut().for_each(|(held, _)| pages.release(held));
            prop_assert!(pages.all_free());
        }
    }
}
