//! Which cells a person means.

use super::cell::{AxisValue, Cell, CellId, Plan};
use crate::manifest::template::Reference;
use crate::manifest::words;
use crate::problem::{Exit, Problem};
use std::collections::BTreeSet;

impl Plan {
    /// The cells that `name` stands for: `stage`, or `stage[axis=value,...]` with some of its axes.
    pub fn find(&self, name: &str) -> Result<Vec<CellId>, Problem> {
        let usage = |code, message: String| Problem::new(code, message).exit(Exit::Usage);
        let wanted = Reference::parse(name).map_err(|why| {
            usage("plan::bad_reference", format!("`{name}` is not a stage or cell: {why}"))
                .help("`STAGE`, or `STAGE[axis=value,...]`")
        })?;
        let of_stage: Vec<CellId> = (0..self.cells.len()).filter(|&id| self.cells[id].stage == wanted.stage).collect();
        if of_stage.is_empty() {
            let mut names: Vec<&str> = self.cells.iter().map(|cell| cell.stage.as_str()).collect();
            names.dedup();
            let missing = usage("plan::missing_stage", format!("there is no stage `{}`", wanted.stage));
            return Err(match words::nearest(&wanted.stage, names.iter().copied()) {
                Some(near) => missing.help(format!("a stage with a similar name exists: `{near}`")),
                None => missing.note(format!("stages: {}", words::list(names))),
            });
        }
        for (axis, value) in &wanted.fixed {
            let mut values: Vec<String> = Vec::new();
            for &id in &of_stage {
                if let Some(text) = self.cells[id].axes.get(axis).map(AxisValue::to_string)
                    && !values.contains(&text)
                {
                    values.push(text);
                }
            }
            if values.is_empty() {
                return Err(self.no_axis(&of_stage, &wanted.stage, axis));
            }
            if !values.contains(value) {
                let message = format!("axis `{axis}` of stage `{}` has no value `{value}`", wanted.stage);
                let values = values.iter().map(String::as_str);
                let mut bad = usage("plan::bad_axis_value", message);
                if let Some(near) = words::nearest(value, values.clone()) {
                    bad = bad.help(format!("a similar value exists: `{near}`"));
                }
                return Err(bad.note(format!("values of `{axis}`: {}", words::list(values))));
            }
        }
        let matches = |cell: &Cell| {
            wanted
                .fixed
                .iter()
                .all(|(axis, value)| cell.axes.get(axis).is_some_and(|found| found.to_string() == *value))
        };
        let found: Vec<CellId> = of_stage.into_iter().filter(|&id| matches(&self.cells[id])).collect();
        if found.is_empty() {
            let message = format!("`{name}` is no cell of the plan: these values do not occur together");
            return Err(usage("plan::no_cells", message).note("`skip` leaves such cells out"));
        }
        Ok(found)
    }

    fn no_axis(&self, of_stage: &[CellId], stage: &str, axis: &str) -> Problem {
        let mut axes: Vec<&str> = Vec::new();
        for (name, _) in of_stage.iter().flat_map(|&id| &self.cells[id].axes.0) {
            if !axes.contains(&name.as_str()) {
                axes.push(name);
            }
        }
        let mut unknown = Problem::new("plan::unknown_axis", format!("stage `{stage}` does not have axis `{axis}`"))
            .exit(Exit::Usage);
        if let Some(near) = words::nearest(axis, axes.iter().copied()) {
            unknown = unknown.help(format!("an axis with a similar name exists: `{near}`"));
        }
        let has = if axes.is_empty() { "none".to_string() } else { words::list(axes) };
        unknown.note(format!("axes of stage `{stage}`: {has}"))
    }

    /// The cells that `names` stand for; all cells if there are no names. Every wrong name is told.
    pub fn select(&self, names: &[String]) -> Result<Vec<CellId>, Vec<Problem>> {
        if names.is_empty() {
            return Ok((0..self.cells.len()).collect());
        }
        let (mut cells, mut problems) = (BTreeSet::new(), Vec::new());
        for name in names {
            match self.find(name) {
                Ok(found) => cells.extend(found),
                Err(problem) => problems.push(problem),
            }
        }
        if problems.is_empty() { Ok(cells.into_iter().collect()) } else { Err(problems) }
    }
}
