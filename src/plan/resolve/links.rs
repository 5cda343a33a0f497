//! The first pass: which stages each stage names.

use super::{CELLS_MAX, CYCLES_MAX, Resolver};
use crate::manifest::task::{SCHEME, SHIPPED, Task};
use crate::manifest::template::{self, Reference};
use crate::manifest::{Arity, RefUse, Stage, choices, names_stage, words};
use crate::plan::axes::{Domain, ValueId};
use crate::plan::graph::Graph;
use crate::problem::{Exit, Problem};
use std::collections::{BTreeSet, HashMap};

impl Resolver<'_> {
    /// Which stages each stage names; returns those outside cycles, dependencies first.
    pub(super) fn links(&mut self) -> Vec<usize> {
        let count = self.manifest.stages.len();
        // What a task names is wrong whether or not a stage names the task.
        for task in &self.manifest.tasks {
            if let Some(data) = &task.data {
                self.named(&format!("task `{}`", task.name), None, data, &data.text);
            }
        }
        for stage in 0..count {
            for reference in &self.stage_of(stage).found.refs {
                if template::axes(&reference.text).is_empty() {
                    self.tainted[stage] |= self.target_of(stage, reference, &reference.text).is_none();
                }
            }
        }
        // What `{axis}` names depends on the axes, which come along with what is named: repeat until
        // nothing new appears. Without such references once is enough.
        loop {
            let needs = self.needs();
            let order = self.order_or_cycles(&needs);
            let mut domains: Vec<Domain> = self.own.iter().map(|own| Domain(own.clone())).collect();
            for &stage in &order {
                domains[stage] = self.domain(stage, &domains);
            }
            let settled = domains == self.domains;
            self.domains = domains;
            if settled || self.needs() == needs {
                return order;
            }
        }
    }

    /// The stages that any cell of each stage may need, in the order of its keys.
    fn needs(&self) -> Vec<Vec<usize>> {
        (0..self.manifest.stages.len())
            .map(|stage| {
                let mut needs = Vec::new();
                for reference in &self.stage_of(stage).found.refs {
                    for (target, _) in self.candidates(reference, &self.domains[stage]) {
                        if !needs.contains(&target) {
                            needs.push(target);
                        }
                    }
                }
                needs
            })
            .collect()
    }

    /// The stages a reference may name, with the axes it fixes.
    fn candidates(&self, reference: &RefUse, domain: &Domain) -> Vec<(usize, Vec<String>)> {
        let mut targets: Vec<(usize, Vec<String>)> = Vec::new();
        let mut add = |text: &str| {
            if reference.also.is_none_or(|types| names_stage(types, text))
                && let Ok(parsed) = Reference::parse(text)
                && let Some(parsed) = self.behind_task(reference, parsed)
                && let Some((target, _)) = self.manifest.stage(&parsed.stage)
            {
                let fixed: Vec<String> = parsed.fixed.into_iter().map(|(axis, _)| axis).collect();
                if !targets.contains(&(target, fixed.clone())) {
                    targets.push((target, fixed));
                }
            }
        };
        let axes: BTreeSet<&str> = template::axes(&reference.text).into_iter().map(|(_, name)| name).collect();
        if axes.is_empty() {
            add(&reference.text);
            return targets;
        }
        let values: Option<Vec<(&str, &[ValueId])>> =
            axes.iter().map(|name| Some((*name, domain.get(self.ids.known_axis(name)?)?))).collect();
        // An axis that is not there is told when the cells are made.
        let Some(values) = values else { return targets };
        let combinations = values.iter().try_fold(1usize, |product, (_, values)| product.checked_mul(values.len()));
        let Some(combinations) = combinations.filter(|count| *count <= CELLS_MAX) else { return targets };
        for number in 0..combinations {
            let mut rest = number;
            let mut chosen = HashMap::new();
            for (name, values) in values.iter().rev() {
                chosen.insert(*name, values[rest % values.len()]);
                rest /= values.len();
            }
            let text = template::fill(&reference.text, |name| Some(self.ids.value_of(*chosen.get(name)?).to_string()));
            if let Ok(text) = text {
                add(&text);
            }
        }
        targets
    }

    /// The reference to the data of the task that `parsed` names; `parsed` itself if it names none.
    fn behind_task(&self, reference: &RefUse, parsed: Reference) -> Option<Reference> {
        let Some((_, task)) = self.manifest.task(&parsed.stage).filter(|_| reference.task) else { return Some(parsed) };
        let mut data = Reference::parse(&task.data.as_ref()?.text).ok()?;
        data.fixed.extend(parsed.fixed);
        Some(data)
    }

    /// Own axes and those that references bring, in the order of a cell's name: inherited first.
    fn domain(&self, stage: usize, domains: &[Domain]) -> Domain {
        let mut domain = Domain::default();
        for reference in self.stage_of(stage).found.refs.iter().filter(|reference| reference.arity == Arity::One) {
            for (target, fixed) in self.candidates(reference, &self.domains[stage]) {
                for (axis, values) in &domains[target].0 {
                    if !fixed.iter().any(|name| name == self.ids.axis_name(*axis)) {
                        domain.add(*axis, values);
                    }
                }
            }
        }
        for (axis, values) in &self.own[stage] {
            domain.add(*axis, values);
        }
        domain
    }

    /// Tells every cycle and returns an order of all stages; those on a cycle make no cells.
    fn order_or_cycles(&mut self, needs: &[Vec<usize>]) -> Vec<usize> {
        let mut needs = needs.to_vec();
        let mut told = 0;
        loop {
            let cycle = match Graph::new(needs.iter().cloned()).order() {
                Ok(order) => return order,
                Err(cycle) => cycle,
            };
            if told < CYCLES_MAX {
                self.cycle(&cycle);
                told += 1;
            }
            for &stage in &cycle {
                self.tainted[stage] = true;
            }
            // Without its last edge the cycle is open, and others can be found.
            let (last, first) = (cycle[cycle.len() - 1], cycle[0]);
            needs[last].retain(|&need| need != first);
        }
    }

    fn cycle(&mut self, cycle: &[usize]) {
        let name = |stage: usize| self.stage_of(stage).name.as_str();
        let mut path: Vec<&str> = cycle.iter().map(|&stage| name(stage)).collect();
        path.push(path[0]);
        let message = match cycle.len() {
            1 => format!("stage `{}` waits for itself", path[0]),
            2 => format!("two stages wait for each other: {}", path.join(" -> ")),
            n => format!("{} stages wait for one another: {}", words::count(n), path.join(" -> ")),
        };
        let mut problem = Problem::new("plan::cycle", message).exit(Exit::Usage);
        for (i, &stage) in cycle.iter().enumerate() {
            let need = cycle[(i + 1) % cycle.len()];
            let names_it = |reference: &&RefUse| {
                self.candidates(reference, &self.domains[stage]).iter().any(|(target, _)| *target == need)
            };
            if let Some(reference) = self.stage_of(stage).found.refs.iter().find(names_it) {
                let mut label = format!("{} needs {}", name(stage), name(need));
                let through = |task: &&Task| {
                    let data = task.data.as_ref().and_then(|data| Reference::parse(&data.text).ok());
                    data.is_some_and(|data| data.stage == name(need))
                };
                if let Some(task) = self.manifest.tasks.iter().filter(|_| reference.task).find(through) {
                    label += &format!(" through task {}", task.name);
                }
                let file = self.manifest.path_of(reference.origin.file);
                problem = problem.at_span(file, reference.origin.span.clone(), &label);
            }
        }
        let help = match cycle.len() {
            1 => "its input has to come from elsewhere".to_string(),
            n => format!("one of these {} inputs has to come from elsewhere", words::count(n)),
        };
        let problem = problem.help(help);
        self.report(problem);
    }

    /// The stage a filled reference names, if it exists and yields what is taken; else says so.
    pub(super) fn target_of(
        &mut self,
        stage: usize,
        reference: &RefUse,
        text: &str,
    ) -> Option<(usize, Vec<(String, String)>)> {
        let owner = format!("stage `{}`", self.stage_of(stage).name);
        let parsed = Reference::parse(text).ok().filter(|_| reference.task);
        let Some((parsed, task)) =
            parsed.and_then(|parsed| Some((parsed.clone(), self.manifest.task(&parsed.stage)?.1)))
        else {
            return self.named(&owner, Some(stage), reference, text);
        };
        let data = task.data.as_ref()?;
        let (target, mut fixed) = self.named(&format!("task `{}`", task.name), None, data, &data.text)?;
        fixed.extend(parsed.fixed);
        Some((target, fixed))
    }

    /// The same of a text that is the name of a stage and of no task. `stage`: the one whose reference it is.
    fn named(
        &mut self,
        owner: &str,
        stage: Option<usize>,
        reference: &RefUse,
        text: &str,
    ) -> Option<(usize, Vec<(String, String)>)> {
        let parsed = match Reference::parse(text) {
            Ok(parsed) => parsed,
            Err(why) => {
                let message = format!("`{}` of {owner} is not a reference: {why}", reference.slot);
                let mut bad = self.problem("plan::bad_reference", message, &reference.origin);
                if text != reference.text {
                    bad = bad.note(format!("`{}` comes to `{text}`", reference.text));
                }
                self.report(bad);
                return None;
            }
        };
        let Some((target, found)) = self.manifest.stage(&parsed.stage) else {
            if !self.manifest.incomplete {
                self.missing_stage(owner, stage, reference, &parsed.stage);
            }
            return None;
        };
        let kind = found.kind?;
        if !reference.takes.contains(&kind.yields) {
            let takes: Vec<&str> = reference.takes.iter().map(|ty| ty.noun()).collect();
            let message = format!(
                "`{}` of {owner} takes {}, and `{}` yields {}",
                reference.slot,
                takes.join(" or "),
                found.name,
                kind.yields.noun()
            );
            let fitting = self.manifest.stages.iter().enumerate().filter(|(at, fits)| {
                Some(*at) != stage && fits.kind.is_some_and(|kind| reference.takes.contains(&kind.yields))
            });
            let fitting: Vec<&str> = fitting.map(|(_, stage)| stage.name.as_str()).collect();
            let mut wrong = self.problem("plan::wrong_artifact", message, &reference.origin);
            wrong = wrong.note(format!("`{}` is of kind `{}`", found.name, kind.name));
            if !fitting.is_empty() {
                wrong = wrong.help(format!("stages that fit: {}", words::list(fitting)));
            }
            self.report(wrong);
            return None;
        }
        Some((target, parsed.fixed))
    }

    fn missing_stage(&mut self, owner: &str, stage: Option<usize>, reference: &RefUse, name: &str) {
        let what = if reference.task { "task or stage" } else { "stage" };
        let message = format!("`{}` of {owner} names `{name}`, and there is no such {what}", reference.slot);
        let mut missing = self.problem("plan::missing_stage", message, &reference.origin);
        let stages = || self.manifest.stages.iter().enumerate().filter(|(at, _)| Some(*at) != stage);
        let stages = || stages().map(|(_, stage)| stage);
        let tasks = || self.manifest.tasks.iter().filter(|_| reference.task).map(|task| task.name.as_str());
        let names = || tasks().chain(stages().map(|stage| stage.name.as_str()));
        let yields_it = |stage: &&Stage| stage.kind.is_some_and(|kind| reference.takes.contains(&kind.yields));
        let words_too: Vec<&str> = reference.also.map(choices).into_iter().flatten().collect();
        if !words_too.is_empty() {
            missing = missing.note(format!("it takes a stage or one of {}", words::list(words_too.iter().copied())));
        }
        if reference.task && SHIPPED.iter().any(|(shipped, _)| *shipped == name) {
            missing = missing.help(format!("it comes with the program: `include = [\"{SCHEME}{name}\"]`"));
        } else if self.manifest.task(name).is_some() {
            missing = missing.note(format!("`{name}` is a task, and its problems are a stage of their own"));
        }
        missing = match words::nearest(name, names().chain(words_too)) {
            Some(near) if tasks().any(|task| task == near) => {
                missing.help(format!("a task with a similar name exists: `{near}`"))
            }
            Some(near) if self.manifest.stage(near).is_none() => {
                missing.help(format!("a similar word exists: `{near}`"))
            }
            Some(near) => missing.help(format!("a stage with a similar name exists: `{near}`")),
            None => {
                let tasks: Vec<&str> = tasks().collect();
                if !tasks.is_empty() {
                    missing = missing.note(format!("tasks: {}", words::list(tasks)));
                }
                let fitting: Vec<&str> = stages().filter(yields_it).map(|stage| stage.name.as_str()).collect();
                if fitting.is_empty() {
                    missing
                } else {
                    missing.note(format!("stages that fit: {}", words::list(fitting)))
                }
            }
        };
        if reference.text != name && !template::axes(&reference.text).is_empty() {
            missing = missing.note(format!("`{}` comes to `{name}` here", reference.text));
        }
        self.report(missing);
    }
}
