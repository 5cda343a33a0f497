//! What a model is asked about: packed sequences, and how large they are.

/// Packed sequences and what is asked of them.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// `[T]`, the sequences one after another.
    pub ids: &'a [u32],
    /// Length of each sequence; they add up to T.
    pub lengths: &'a [usize],
    /// `[R]` positions in `ids` whose hidden state predicts a target.
    pub rows: &'a [usize],
    /// `[R]` the predicted ids.
    pub targets: &'a [u32],
}

impl Batch<'_> {
    /// Panics if its parts do not fit each other.
    pub(super) fn check(&self) {
        assert_eq!(self.lengths.iter().sum::<usize>(), self.ids.len(), "lengths of a batch");
        assert_eq!(self.rows.len(), self.targets.len(), "rows and targets of a batch");
    }

    /// Where each sequence begins, and the end of the last.
    pub(super) fn starts(&self) -> impl Iterator<Item = usize> {
        let end = |end: &mut usize, length: &usize| {
            *end += length;
            Some(*end)
        };
        std::iter::once(0).chain(self.lengths.iter().scan(0, end))
    }

    /// `[T]`, from 0 in each sequence.
    pub(super) fn positions(&self) -> impl Iterator<Item = u32> {
        self.lengths.iter().flat_map(|&length| 0..length as u32)
    }
}

/// How large a batch is, or the largest of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// T
    pub tokens: usize,
    /// R: those that predict a learned token.
    pub rows: usize,
    /// How many there are.
    pub sequences: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
}

impl Extent {
    /// Of `tokens` tokens in sequences of at most `longest`, all of them learned.
    pub fn full(tokens: usize, longest: usize) -> Extent {
        let longest = longest.clamp(1, tokens.max(1));
        Extent { tokens, rows: tokens, sequences: tokens.div_ceil(longest), longest }
    }

    /// Of one batch.
    pub fn of(batch: &Batch) -> Extent {
        Extent {
            tokens: batch.ids.len(),
            rows: batch.rows.len(),
            sequences: batch.lengths.len(),
            longest: batch.lengths.iter().copied().max().unwrap_or(0),
        }
    }
}
