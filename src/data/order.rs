//! Which sample comes when. The order of an epoch is a function of (seed, epoch) alone, so a resumed
//! run finds its place without replaying anything.

use crate::random::Stream;
use std::ops::Range;

/// The samples of epoch `epoch` (from 0), each once: shuffled anew in every epoch, or `0..n`.
pub fn epoch_order(n: usize, seed: u64, epoch: u64, shuffle: bool) -> Vec<usize> {
    if shuffle { Stream::named(seed, &["epoch", &epoch.to_string()]).permutation(n) } else { (0..n).collect() }
}

/// Consecutive batches of `size` samples of an order. The last one may be smaller; nothing is dropped.
pub fn batches(order: &[usize], size: usize) -> Vec<Vec<usize>> {
    order.chunks(size.max(1)).map(<[usize]>::to_vec).collect()
}

/// Cuts a batch, given the lengths of its samples in tokens, into consecutive micro-batches of at
/// most `budget` tokens. A sample longer than the budget is a micro-batch of its own. Ranges index `lengths`.
pub fn micro_batches(lengths: &[usize], budget: usize) -> Vec<Range<usize>> {
    let mut cuts = Vec::new();
    let (mut start, mut tokens) = (0, 0);
    for (i, &length) in lengths.iter().enumerate() {
        if i > start && tokens + length > budget {
            cuts.push(start..i);
            (start, tokens) = (i, 0);
        }
        tokens += length;
    }
    if start < lengths.len() {
        cuts.push(start..lengths.len());
    }
    cuts
}

/// Cuts `n` samples into consecutive micro-batches of `size`; the last one may be smaller.
pub fn equal_parts(n: usize, size: usize) -> Vec<Range<usize>> {
    (0..n).step_by(size.max(1)).map(|start| start..n.min(start + size.max(1))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_epoch_sees_every_sample_once_in_its_own_order() {
        let first = epoch_order(100, 3, 0, true);
        let second = epoch_order(100, 3, 1, true);
        assert_ne!(first, second);
        assert_eq!(first, epoch_order(100, 3, 0, true));
        assert_ne!(first, epoch_order(100, 4, 0, true));
        for mut order in [first, second] {
            order.sort_unstable();
            assert_eq!(order, (0..100).collect::<Vec<_>>());
        }
        assert_eq!(epoch_order(4, 3, 9, false), [0, 1, 2, 3]);
    }

    #[test]
    fn the_last_batch_is_smaller_rather_than_lost() {
        assert_eq!(batches(&[4, 2, 0, 1, 3], 2), [vec![4, 2], vec![0, 1], vec![3]]);
    }

    #[test]
    fn a_sample_over_the_budget_goes_alone() {
        assert_eq!(micro_batches(&[3, 9, 2, 2, 2], 5), [0..1, 1..2, 2..4, 4..5]);
        assert!(micro_batches(&[], 5).is_empty());
    }

    #[test]
    fn equal_parts_leave_the_rest_to_the_last() {
        assert_eq!(equal_parts(5, 2), [0..2, 2..4, 4..5]);
        assert!(equal_parts(0, 2).is_empty());
    }

    proptest! {
        #[test]
        fn micro_batches_cover_a_batch_in_order_and_keep_the_budget(
            lengths in proptest::collection::vec(1usize..50, 0..40), budget in 1usize..120,
        ) {
            let cuts = micro_batches(&lengths, budget);
            let covered: Vec<usize> = cuts.iter().cloned().flatten().collect();
            prop_assert_eq!(covered, (0..lengths.len()).collect::<Vec<_>>());
            for cut in cuts {
                let tokens: usize = lengths[cut.clone()].iter().sum();
                prop_assert!(tokens <= budget || cut.len() == 1);
            }
        }
    }
}
