//! Axis names and values as numbers, and the join of cells on the axes they share.
//!
//! Values are compared as they are typed (`7` is not `"7"`), so that a join never guesses; only where
//! a person names a cell (`sft[size=7]`) does the text decide.

use super::cell::{AxisValue, CellId};
use std::collections::HashMap;

/// Number of an axis name.
pub(super) type AxisId = u32;
/// Number of an axis value.
pub(super) type ValueId = u32;
/// A point: axes and values, in the order they came along.
pub(super) type Point = Vec<(AxisId, ValueId)>;

#[derive(PartialEq, Eq, Hash)]
enum Key {
    Str(String),
    Int(i64),
    Float(u64),
    Bool(bool),
}

#[derive(Default)]
pub(super) struct Interner {
    names: Vec<String>,
    by_name: HashMap<String, AxisId>,
    values: Vec<AxisValue>,
    by_value: HashMap<Key, ValueId>,
}

impl Interner {
    pub fn axis(&mut self, name: &str) -> AxisId {
        if let Some(&id) = self.by_name.get(name) {
            return id;
        }
        let id = self.names.len() as AxisId;
        self.names.push(name.to_string());
        self.by_name.insert(name.to_string(), id);
        id
    }

    pub fn known_axis(&self, name: &str) -> Option<AxisId> {
        self.by_name.get(name).copied()
    }

    pub fn value(&mut self, value: AxisValue) -> ValueId {
        let key = match &value {
            AxisValue::Str(text) => Key::Str(text.clone()),
            AxisValue::Int(int) => Key::Int(*int),
            AxisValue::Float(float) => Key::Float(float.to_bits()),
            AxisValue::Bool(bool) => Key::Bool(*bool),
        };
        *self.by_value.entry(key).or_insert_with(|| {
            self.values.push(value);
            (self.values.len() - 1) as ValueId
        })
    }

    pub fn axis_name(&self, id: AxisId) -> &str {
        &self.names[id as usize]
    }

    pub fn value_of(&self, id: ValueId) -> &AxisValue {
        &self.values[id as usize]
    }
}

/// The value of an axis at a point.
pub(super) fn at(point: &[(AxisId, ValueId)], axis: AxisId) -> Option<ValueId> {
    point.iter().find(|(name, _)| *name == axis).map(|(_, value)| *value)
}

/// Values of each axis, in the order first seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Domain(pub Vec<(AxisId, Vec<ValueId>)>);

impl Domain {
    pub fn get(&self, axis: AxisId) -> Option<&[ValueId]> {
        self.0.iter().find(|(name, _)| *name == axis).map(|(_, values)| values.as_slice())
    }

    pub fn add(&mut self, axis: AxisId, values: &[ValueId]) {
        let at = self.0.iter().position(|(name, _)| *name == axis).unwrap_or_else(|| {
            self.0.push((axis, Vec::new()));
            self.0.len() - 1
        });
        let mine = &mut self.0[at].1;
        // Long axes are unions of few lists; the first one is taken over whole.
        if mine.is_empty() {
            mine.extend_from_slice(values);
        } else if mine.as_slice() != values {
            let mut seen: std::collections::HashSet<ValueId> = mine.iter().copied().collect();
            mine.extend(values.iter().copied().filter(|value| seen.insert(*value)));
        }
    }
}

/// The cells of one stage, with some axes fixed, ready to be joined to points.
///
/// Cells of a stage need not have the same axes (a stage whose data vary takes the axes of each), so
/// they are grouped by the axes they have; each group is indexed by whichever of them a point shares.
pub(super) struct View {
    groups: Vec<Group>,
}

struct Group {
    axes: Vec<AxisId>,
    cells: Vec<CellId>,
    by_shared: HashMap<Vec<AxisId>, HashMap<Vec<ValueId>, Vec<CellId>>>,
}

impl View {
    /// `cells` with their points; `keep` says which have the fixed values; fixed axes are not shared.
    pub fn new<'a>(
        cells: impl Iterator<Item = (CellId, &'a Point)>,
        fixed: &[AxisId],
        keep: impl Fn(&Point) -> bool,
    ) -> View {
        let mut groups: Vec<Group> = Vec::new();
        for (cell, point) in cells.filter(|(_, point)| keep(point)) {
            let axes = || point.iter().map(|(axis, _)| *axis).filter(|axis| !fixed.contains(axis));
            match groups.iter_mut().find(|group| group.axes.iter().copied().eq(axes())) {
                Some(group) => group.cells.push(cell),
                None => groups.push(Group { axes: axes().collect(), cells: vec![cell], by_shared: HashMap::new() }),
            }
        }
        View { groups }
    }

    /// Calls `found` with the cells that agree with `point` on every axis both have, and the axes
    /// those cells can bring.
    pub fn matching(
        &mut self,
        point: &[(AxisId, ValueId)],
        points: &[Point],
        mut found: impl FnMut(&[AxisId], &[CellId]),
    ) {
        for group in &mut self.groups {
            let shared: Vec<AxisId> = group.axes.iter().copied().filter(|axis| at(point, *axis).is_some()).collect();
            if shared.is_empty() {
                found(&group.axes, &group.cells);
                continue;
            }
            let key: Vec<ValueId> = shared.iter().filter_map(|axis| at(point, *axis)).collect();
            let cells = &group.cells;
            let index = group.by_shared.entry(shared).or_insert_with_key(|shared| {
                let mut index: HashMap<Vec<ValueId>, Vec<CellId>> = HashMap::new();
                for &cell in cells {
                    let key = shared.iter().filter_map(|axis| at(&points[cell], *axis)).collect();
                    index.entry(key).or_default().push(cell);
                }
                index
            });
            if let Some(cells) = index.get(&key) {
                found(&group.axes, cells);
            }
        }
    }
}
