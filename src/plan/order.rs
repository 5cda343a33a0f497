//! Dependencies first, or the cycle itself.

/// Dependencies first, ties in the order written. `Err` is the cycle itself: it starts at its
/// earliest stage in the manifest and each stage needs the next one.
///
/// A depth-first walk without recursion: linear in stages and needs, at any depth.
pub(super) fn order(needs: &[Vec<usize>]) -> Result<Vec<usize>, Vec<usize>> {
    let mut done = vec![false; needs.len()];
    let mut on_path = vec![false; needs.len()];
    let mut order = Vec::with_capacity(needs.len());
    for root in 0..needs.len() {
        if done[root] {
            continue;
        }
        on_path[root] = true;
        let mut path = vec![(root, 0)]; // (stage, index of the next need to look at)
        while let Some((stage, next)) = path.last_mut() {
            let Some(&need) = needs[*stage].get(*next) else {
                done[*stage] = true;
                on_path[*stage] = false;
                order.push(*stage);
                path.pop();
                continue;
            };
            *next += 1;
            if on_path[need] {
                let at = path.iter().position(|&(stage, _)| stage == need).unwrap_or(0);
                let mut cycle: Vec<usize> = path[at..].iter().map(|&(stage, _)| stage).collect();
                let first = (0..cycle.len()).min_by_key(|&i| cycle[i]).unwrap_or(0);
                cycle.rotate_left(first);
                return Err(cycle);
            }
            if !done[need] {
                on_path[need] = true;
                path.push((need, 0));
            }
        }
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ties_keep_the_written_order() {
        assert_eq!(order(&[vec![], vec![], vec![]]), Ok(vec![0, 1, 2]));
        assert_eq!(order(&[vec![2], vec![], vec![]]), Ok(vec![2, 0, 1]));
    }

    #[test]
    fn a_cycle_starts_at_its_earliest_stage() {
        assert_eq!(order(&[vec![], vec![3], vec![1], vec![2]]), Err(vec![1, 3, 2]));
        assert_eq!(order(&[vec![0]]), Err(vec![0]));
    }

    #[test]
    fn a_very_long_chain_needs_no_stack() {
        let needs: Vec<Vec<usize>> = (0..100_000).map(|i| if i == 99_999 { vec![] } else { vec![i + 1] }).collect();
        assert_eq!(order(&needs).map(|order| order[0]), Ok(99_999));
    }

    proptest! {
        #[test]
        fn the_order_is_valid_or_the_cycle_is_true(
            needs in (1usize..12).prop_flat_map(|n| prop::collection::vec(prop::collection::vec(0..n, 0..4), n))
        ) {
            match order(&needs) {
                Ok(order) => {
                    let mut rank = vec![usize::MAX; needs.len()];
                    for (place, &stage) in order.iter().enumerate() {
                        prop_assert_eq!(rank[stage], usize::MAX, "twice");
                        rank[stage] = place;
                    }
                    for (stage, needs) in needs.iter().enumerate() {
                        prop_assert!(rank[stage] < order.len());
                        for &need in needs {
                            prop_assert!(rank[need] < rank[stage]);
                        }
                    }
                }
                Err(cycle) => {
                    prop_assert!(!cycle.is_empty());
                    for (i, &stage) in cycle.iter().enumerate() {
                        prop_assert!(needs[stage].contains(&cycle[(i + 1) % cycle.len()]));
                        prop_assert!(stage >= cycle[0]);
                        prop_assert!(i == 0 || stage != cycle[0], "simple");
                    }
                }
            }
        }
    }
}
