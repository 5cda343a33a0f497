//! Whether two sets of reals are the same one.

use crate::grade::answer::Region;
use crate::grade::number::{ONE, Real, ZERO};
use crate::grade::parse::Node;
use crate::grade::sampling::Sample;
use crate::grade::verdict::Ruling;
use crate::grade::verdict::Verdict::{Correct, Undecided, Wrong};

/// Compares sets of reals at their ends, between them and beyond them.
pub(super) fn regions(gold: &Region, given: &Region) -> Ruling {
    const RULE: &str = "ends and midpoints";
    let mut ends = Vec::new();
    if collect_ends(gold, &mut ends).is_none() || collect_ends(given, &mut ends).is_none() || ends.len() > 200 {
        return (Undecided, RULE);
    }
    ends.sort_by(|a, b| a.hi.total_cmp(&b.hi).then(a.lo.total_cmp(&b.lo)));
    ends.dedup_by(|a, b| same_end(*a, *b));
    let mut points = ends.clone();
    points.extend(ends.windows(2).map(|pair| (pair[0] + pair[1]) * Real::from(0.5)));
    let beyond = |end: Option<&Real>, by: f64| end.map_or(ZERO, |end| *end + Real::from(by) * (ONE + end.abs()));
    points.push(beyond(ends.first(), -1.0));
    points.push(beyond(ends.last(), 1.0));
    for point in points {
        match (contains(gold, point), contains(given, point)) {
            (Some(a), Some(b)) if a == b => {}
            (Some(_), Some(_)) => return (Wrong, RULE),
            _ => return (Undecided, RULE),
        }
    }
    (Correct, RULE)
}

fn same_end(a: Real, b: Real) -> bool {
    (a - b).abs().hi <= 1e-20 * a.abs().hi.max(b.abs().hi)
}

fn end_value(node: &Node) -> Option<Real> {
    if node.has_variables() {
        return None;
    }
    let value = Sample::new(0).value(node)?;
    (value.is_real() && value.is_finite()).then_some(value.re)
}

fn collect_ends(region: &Region, into: &mut Vec<Real>) -> Option<()> {
    match region {
        Region::Interval(from, _, to, _) => {
            for end in [from, to].into_iter().flatten() {
                into.push(end_value(end)?);
            }
        }
        Region::Points(points) => {
            for point in points {
                into.push(end_value(point)?);
            }
        }
        Region::Union(a, b) | Region::Intersection(a, b) | Region::Difference(a, b) => {
            collect_ends(a, into)?;
            collect_ends(b, into)?;
        }
    }
    Some(())
}

fn contains(region: &Region, point: Real) -> Option<bool> {
    Some(match region {
        Region::Interval(from, with_from, to, with_to) => {
            let above = match from {
                None => true,
                Some(end) => {
                    let end = end_value(end)?;
                    if same_end(end, point) { *with_from } else { (point - end).hi > 0.0 }
                }
            };
            let below = match to {
                None => true,
                Some(end) => {
                    let end = end_value(end)?;
                    if same_end(end, point) { *with_to } else { (end - point).hi > 0.0 }
                }
            };
            above && below
        }
        Region::Points(points) => {
            let mut is = false;
            for end in points {
                is |= same_end(end_value(end)?, point);
            }
            is
        }
        Region::Union(a, b) => contains(a, point)? | contains(b, point)?,
        Region::Intersection(a, b) => contains(a, point)? & contains(b, point)?,
        Region::Difference(a, b) => contains(a, point)? & !contains(b, point)?,
    })
}
