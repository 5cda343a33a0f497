//! What the cells of a plan are going to do, in numbers: rows, tokens, steps, requests and their cost, bytes on disk.
//! What nobody can know yet is said to be unknown, with the cell that has to be made first.

mod words;

use super::global::Global;
use super::needs::Look;
use crate::report::{self, number};
use pipe::data::{self, Record, Tokenizer};
use pipe::files::Files;
use pipe::measure;
use pipe::plan::{Cell, CellId};
use pipe::problem::Problem;
use pipe::remote::{Connection, Endpoint, Remote, money};
use pipe::stage::Forecast;
use pipe::stage::forecast::completions::{Calls, CompletionForecast, Completions, Likely, Requests};
use pipe::stage::forecast::training::{TakenRows, TrainingCount};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use words::{call_words, likely_words, replies, requests_object};

/// What a cell does.
pub enum Work {
    Training(TrainingCount),
    Completions(Completions),
    Calls(Box<Calls>),
    /// Beside its own work: what it asks about answers that are not there yet, at most.
    Judging(Box<Calls>),
    /// Its data are there, and it would refuse them.
    Fails(Problem),
}

/// One cell that would run and does what can be counted.
pub struct Row {
    pub cell: CellId,
    /// `None`: nothing is known.
    pub work: Option<Work>,
    /// What has to be made before all is known.
    pub until: Option<CellId>,
}

/// What is asked of one endpoint by all cells together.
pub struct Asked {
    pub line: Arc<Connection>,
    pub endpoint: Endpoint,
    /// Completions that stages are made of, whoever made them when.
    pub wanted: u64,
    pub once: Requests,
    pub most: Requests,
    pub likely: Option<Likely>,
    /// Stages of which only completions could be counted, or nothing.
    pub unknown: Vec<CellId>,
}

pub struct Counts<'a> {
    look: &'a Look<'a>,
    pub rows: Vec<Row>,
    pub endpoints: Vec<Asked>,
    /// Bytes that models and trained weights will take, and cells of which nobody knows.
    disk: (u64, usize),
}

/// What was read so far. Cells are looked at by their data, so that no dataset is read twice and one at a time is held.
struct Reader<'a> {
    look: &'a Look<'a>,
    records: Option<(CellId, Rc<Vec<Record>>)>,
    tokenizers: HashMap<PathBuf, Option<Rc<Tokenizer>>>,
    taken: HashMap<(CellId, PathBuf, String), Result<Rc<TakenRows>, Problem>>,
    /// Keys of requests that cells looked at before send.
    asked: HashSet<String>,
}

/// Which cells are counted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Which {
    All,
    /// Those that ask an endpoint.
    Asking,
}

impl<'a> Counts<'a> {
    /// `at` is told how many cells of how many are done. `Err` if a journal cannot be read.
    pub fn new(
        look: &'a Look<'a>,
        which: Which,
        on_device: bool,
        remote: &Remote,
        at: &dyn Fn(usize, usize),
    ) -> Result<Counts<'a>, Problem> {
        let counted = |id: &CellId| match look.forecast(*id) {
            Some(Forecast::Completing(completing)) => {
                which == Which::All || completing.endpoint.is_some() || completing.judging_endpoint().is_some()
            }
            Some(Forecast::Training(_)) => which == Which::All,
            Some(Forecast::Other(_)) | None => false,
        };
        let mut cells: Vec<CellId> = look.to_run().filter(counted).collect();
        cells.sort_by_key(|id| (look.data_of(*id), *id));
        let mut reader =
            Reader { look, records: None, tokenizers: HashMap::new(), taken: HashMap::new(), asked: HashSet::new() };
        let (mut rows, mut endpoints) = (Vec::new(), Vec::new());
        for (done, id) in cells.iter().enumerate() {
            at(done, cells.len());
            let Some(forecast) = look.forecast(*id) else { continue };
            let completing = match &forecast {
                Forecast::Completing(completing) => Some(&**completing),
                _ => None,
            };
            let row = match completing.and_then(|completing| Some((completing, completing.endpoint.clone()?))) {
                Some((completing, endpoint)) => {
                    let line = asked(&mut endpoints, endpoint, remote)?;
                    let row = reader.calls(*id, completing, &endpoints[line])?;
                    endpoints[line].add(&row);
                    row
                }
                None => reader.row(*id, &forecast),
            };
            rows.push(row);
            if let Some((completing, endpoint)) =
                completing.and_then(|completing| Some((completing, completing.judging_endpoint()?.clone())))
            {
                let line = asked(&mut endpoints, endpoint, remote)?;
                // Of a cell whose data are not there that is all there is to say, and its own row says it.
                let judging = reader.judging(*id, completing, &endpoints[line].endpoint);
                endpoints[line].add(&judging);
                rows.extend(Some(judging).filter(|row| row.work.is_some()));
            }
        }
        rows.sort_by_key(|row| row.cell);
        let disk = if which == Which::All { look.disk(on_device) } else { (0, 0) };
        Ok(Counts { look, rows, endpoints, disk })
    }

    fn label(&self, id: CellId) -> String {
        self.look.cell(id).to_string()
    }

    /// For `plan`: cells that do the same in one line, then what is asked of endpoints, and all together.
    pub fn table(&self, global: &Global) -> String {
        if self.rows.is_empty() && self.disk == (0, 0) {
            return String::new();
        }
        let mut groups: Vec<(String, Vec<CellId>)> = Vec::new();
        for row in &self.rows {
            let (words, stage) = (self.words(row), &self.look.cell(row.cell).stage);
            let alike =
                groups.iter_mut().find(|(known, cells)| *known == words && self.look.cell(cells[0]).stage == *stage);
            match alike {
                Some((_, cells)) => cells.push(row.cell),
                None => groups.push((words, vec![row.cell])),
            }
        }
        let mut text = String::new();
        let name = |cells: &[CellId]| match cells {
            [one] => self.label(*one),
            many => format!("{} ({} cells, each)", self.look.cell(many[0]).stage, many.len()),
        };
        let width = groups.iter().map(|(_, cells)| name(cells).chars().count()).max().unwrap_or(0).min(48);
        if !groups.is_empty() {
            text += "\nwork:\n";
        }
        for (words, cells) in &groups {
            let _ = writeln!(text, "  {:width$}  {words}", name(cells));
        }
        if !self.endpoints.is_empty() {
            text += "\nendpoints:\n";
        }
        for asked in &self.endpoints {
            let _ = writeln!(text, "  {}", self.asked_words(asked));
        }
        let _ = writeln!(text, "\ntotal: {}", self.total_words(global));
        text
    }

    fn words(&self, row: &Row) -> String {
        let until = row.until.map(|id| format!("unknown until `{}` is made", self.label(id)));
        let work = match &row.work {
            None => return until.unwrap_or_else(|| "unknown".into()),
            Some(work) => work,
        };
        match work {
            Work::Fails(problem) => {
                let first = problem.notes.first().map_or(String::new(), |note| format!(": {note}"));
                format!("would fail: {}{first}", problem.message)
            }
            Work::Training(training) => {
                let mut parts = Vec::new();
                parts.extend(training.rows.map(|rows| {
                    let over = [(training.dropped, "dropped"), (training.truncated, "cut")];
                    let over = over.into_iter().filter(|(count, _)| *count > 0);
                    let over: String =
                        over.map(|(count, how)| format!(", {} too long and {how}", number(count))).collect();
                    report::count(rows as usize, "row") + &over
                }));
                let tokens = training.tokens.map_or(String::new(), |tokens| format!(" over {} tokens", number(tokens)));
                parts.extend(training.steps.map(|steps| report::count(steps as usize, "step") + &tokens));
                match (training.rows, training.tokens, until) {
                    (None, _, Some(until)) => parts.push(format!("rows and tokens {until}")),
                    (_, None, Some(until)) => parts.push(format!("tokens, and rows too long, {until}")),
                    _ => {}
                }
                parts.join("; ")
            }
            Work::Completions(Completions { wanted, tokens }) => {
                let up_to = if row.until.is_some() { "up to " } else { "" };
                let made = report::count(*wanted as usize, "completion");
                format!("{up_to}{made}, at most {} tokens", number(*tokens))
            }
            Work::Calls(calls) => call_words(calls, until),
            Work::Judging(calls) => {
                let count = report::count(calls.wanted as usize, "call");
                let tokens = number(calls.once.completion_tokens);
                format!("judged by up to {count} of `{}`, at most {tokens} tokens of replies", calls.endpoint.model)
            }
        }
    }

    /// One line about an endpoint: calls, cost, what is likely, the budget.
    pub fn asked_words(&self, asked: &Asked) -> String {
        let Asked { line, endpoint, once, most, .. } = asked;
        if once.count == 0 && asked.unknown.is_empty() {
            return format!("{}: no call, {} kept", endpoint.name(), replies(asked.wanted));
        }
        let waiting: Vec<String> = asked.unknown.iter().take(3).map(|id| format!("`{}`", self.label(*id))).collect();
        let waiting = waiting.join(", ") + if asked.unknown.len() > 3 { ", .." } else { "" };
        let beside = format!("what is asked by {waiting} about data that are not there yet");
        let mut text = format!("{}: ", endpoint.name());
        match once.count {
            0 => text += &beside,
            count => {
                text += &report::count(count as usize, "call");
                if most.count > count {
                    let _ = write!(text, " (at most {}, if no reply parses)", number(most.count));
                }
                if let (Some(first), Some(all)) = (once.cost(endpoint), most.cost(endpoint)) {
                    let _ = write!(text, ", cost at most {}", money(first));
                    if all > first {
                        let _ = write!(text, " ({})", money(all));
                    }
                }
                text += &likely_words(asked.likely.as_ref(), endpoint);
                if !asked.unknown.is_empty() {
                    let _ = write!(text, "; beside {beside}");
                }
            }
        }
        if let Some(budget) = endpoint.budget {
            let _ = write!(text, "; {} of the budget of {} is paid", money(line.paid()), money(budget));
        }
        if asked.passes_budget() {
            let rest = "a call that could pass it is not sent, and replies that came are kept";
            let _ = write!(text, "\n  warning: this may be more than is left of the budget: {rest}");
        }
        text
    }

    fn total_words(&self, global: &Global) -> String {
        let total = self.total();
        let mut parts = Vec::new();
        if total.steps > 0 {
            let tokens =
                if total.tokens > 0 { format!(" over {} tokens", number(total.tokens)) } else { String::new() };
            parts.push(report::count(total.steps as usize, "step") + &tokens);
        }
        if total.completions.wanted > 0 {
            let made = report::count(total.completions.wanted as usize, "completion");
            parts.push(format!("{made} of at most {} tokens", number(total.completions.tokens)));
        }
        if total.calls > 0 {
            let cost = total.cost.map_or(String::new(), |cost| format!(", cost at most {}", money(cost)));
            parts.push(report::count(total.calls as usize, "call") + &cost);
        }
        if self.disk.0 > 0 {
            let free = measure::disk_free(&global.cache);
            let free = free.map_or(String::new(), |free| format!(", {} free there", report::bytes(free)));
            parts.push(format!("about {} on disk{free}", report::bytes(self.disk.0)));
        }
        if total.unknown > 0 {
            parts.push(format!("{} not known in full yet", report::count(total.unknown, "cell")));
        }
        if parts.is_empty() { "nothing".into() } else { parts.join("; ") }
    }

    fn total(&self) -> Total {
        let mut total = Total::default();
        for row in &self.rows {
            total.unknown += usize::from(row.until.is_some());
            match &row.work {
                Some(Work::Training(training)) => {
                    total.steps = total.steps.saturating_add(training.steps.unwrap_or(0));
                    total.tokens = total.tokens.saturating_add(training.tokens.unwrap_or(0));
                }
                Some(Work::Completions(more)) => {
                    let Completions { wanted, tokens } = &mut total.completions;
                    *wanted = wanted.saturating_add(more.wanted);
                    *tokens = tokens.saturating_add(more.tokens);
                }
                Some(Work::Calls(_) | Work::Judging(_) | Work::Fails(_)) | None => {}
            }
        }
        for asked in &self.endpoints {
            total.calls = total.calls.saturating_add(asked.once.count);
            let cost = asked.once.cost(&asked.endpoint);
            total.cost = total.cost.map_or(cost, |sum| Some(sum + cost.unwrap_or(0.0)));
        }
        total
    }

    /// Stages that would refuse their data, each with its first cell.
    pub fn failing(&self) -> Vec<Problem> {
        let mut problems: BTreeMap<&str, Problem> = BTreeMap::new();
        for row in &self.rows {
            let Some(Work::Fails(problem)) = &row.work else { continue };
            let cell = self.look.cell(row.cell);
            problems.entry(&cell.stage).or_insert_with(|| Problem {
                message: format!("`{cell}` would fail: {}", problem.message),
                ..problem.clone().at_span(&cell.file, cell.span.clone(), "")
            });
        }
        problems.into_values().collect()
    }

    /// For `--json`: what a cell does.
    pub fn object(&self, id: CellId) -> Option<Value> {
        let rows = || self.rows.iter().filter(|row| row.cell == id);
        let judging = rows().find_map(|row| match &row.work {
            Some(Work::Judging(calls)) => Some(json!({
                "endpoint": calls.endpoint.name(), "calls_at_most": calls.wanted,
                "completion_tokens_at_most": calls.once.completion_tokens,
            })),
            _ => None,
        });
        let row = rows().find(|row| !matches!(row.work, Some(Work::Judging(_))))?;
        let mut object = match &row.work {
            None => json!({}),
            Some(Work::Judging(_)) => return None,
            Some(Work::Fails(problem)) => json!({ "fails": problem.message }),
            Some(Work::Training(TrainingCount { rows, dropped, truncated, steps, tokens })) => json!({
                "rows": rows, "dropped": dropped, "truncated": truncated, "steps": steps, "tokens": tokens,
            }),
            Some(Work::Completions(Completions { wanted, tokens })) => {
                json!({ "completions": wanted, "tokens_at_most": tokens })
            }
            Some(Work::Calls(calls)) => {
                let Calls { endpoint, wanted, kept, prompts_known, once, most, likely } = &**calls;
                let mut object = requests_object(endpoint, once, most, likely.as_ref());
                object["endpoint"] = json!(endpoint.name());
                (object["completions"], object["kept"]) = (json!(wanted), json!(kept));
                object["prompts_known"] = json!(prompts_known);
                object
            }
        };
        if let Some(judging) = judging {
            object["judge"] = judging;
        }
        if let Some(until) = row.until {
            object["unknown_until"] = json!(self.label(until));
        }
        Some(object)
    }

    /// For `--json`: endpoints and all together.
    pub fn objects(&self, global: &Global) -> (Value, Value) {
        let asked = |asked: &Asked| {
            let Asked { line, endpoint, once, most, likely, unknown, .. } = asked;
            let mut object = requests_object(endpoint, once, most, likely.as_ref());
            object["endpoint"] = json!(endpoint.name());
            object["not_counted"] = unknown.iter().map(|id| self.label(*id)).collect();
            if let Some(budget) = endpoint.budget {
                (object["budget"], object["paid"]) = (json!(budget), json!(line.paid()));
                object["may_pass_budget"] = json!(asked.passes_budget());
            }
            object
        };
        let Total { steps, tokens, completions, calls, cost, unknown } = self.total();
        let total = json!({
            "steps": steps, "tokens": tokens, "completions": completions.wanted,
            "completion_tokens_at_most": completions.tokens, "calls": calls, "cost_at_most": cost,
            "disk": self.disk.0, "disk_free": measure::disk_free(&global.cache), "unknown_cells": unknown,
        });
        (self.endpoints.iter().map(asked).collect(), total)
    }
}

/// All cells together, as far as it is known.
#[derive(Default)]
struct Total {
    steps: u64,
    tokens: u64,
    completions: Completions,
    calls: u64,
    cost: Option<f64>,
    unknown: usize,
}

impl Asked {
    fn add(&mut self, row: &Row) {
        let Some(Work::Calls(calls)) = &row.work else {
            return self.wait_for(row.cell);
        };
        let first = self.wanted == 0;
        self.wanted = self.wanted.saturating_add(calls.wanted);
        self.once.add(&calls.once);
        self.most.add(&calls.most);
        if !calls.prompts_known {
            self.wait_for(row.cell);
        }
        if first {
            self.likely = calls.likely;
        } else if calls.once.count > 0 || !calls.prompts_known {
            self.likely = self.likely.zip(calls.likely).map(|(sum, more)| Likely {
                prompt_tokens: sum.prompt_tokens + more.prompt_tokens,
                completion_tokens: sum.completion_tokens + more.completion_tokens,
                replies: sum.replies.max(more.replies),
                own: false,
            });
        }
    }

    fn wait_for(&mut self, cell: CellId) {
        if self.unknown.last() != Some(&cell) {
            self.unknown.push(cell);
        }
    }

    /// Whether the most that is asked may cost more than is left.
    fn passes_budget(&self) -> bool {
        match (self.endpoint.budget, self.most.cost(&self.endpoint)) {
            (Some(budget), Some(cost)) => self.line.paid() + cost > budget,
            _ => false,
        }
    }
}

/// The place of an endpoint in the list, where it is put if it is not there.
fn asked(endpoints: &mut Vec<Asked>, endpoint: Endpoint, remote: &Remote) -> Result<usize, Problem> {
    if let Some(known) = endpoints.iter().position(|asked| asked.endpoint == endpoint) {
        return Ok(known);
    }
    let line = remote.connection(&endpoint)?;
    line.look()?;
    let (once, most) = (Requests::default(), Requests::default());
    endpoints.push(Asked { line, endpoint, wanted: 0, once, most, likely: None, unknown: Vec::new() });
    Ok(endpoints.len() - 1)
}

impl<'a> Reader<'a> {
    fn cell(&self, id: CellId) -> &'a Cell {
        self.look.cell(id)
    }

    /// A cell that computes here.
    fn row(&mut self, id: CellId, forecast: &Forecast) -> Row {
        let data = self.look.data_of(id);
        let Some((records, at_most)) = data.and_then(|data| self.count(data)) else {
            let work = match forecast {
                Forecast::Training(training) => Some(training.count_of(None)).filter(|count| count.steps.is_some()),
                _ => None,
            };
            return Row { cell: id, work: work.map(Work::Training), until: data };
        };
        let until = data.filter(|_| at_most);
        let training = match forecast {
            Forecast::Training(training) => training,
            Forecast::Completing(completing) => {
                return Row { cell: id, work: Some(Work::Completions(completing.completions(records))), until };
            }
            Forecast::Other(_) => return Row { cell: id, work: None, until },
        };
        let base = self.look.input(id, "model").first().copied();
        let rows = || Some(Work::Training(training.count_of(Some(records))));
        let (Some(data), Some(base)) = (data.filter(|data| self.look.files(*data).is_some()), base) else {
            return Row { cell: id, work: rows(), until: data };
        };
        let Some((name, tokenizer)) = self.tokenizer(base) else {
            return Row { cell: id, work: rows(), until: Some(base) };
        };
        let key = (data, name, training.taken_as());
        let taken = match self.taken.get(&key) {
            Some(taken) => taken.clone(),
            None => {
                let taken = self.records(data).and_then(|records| training.taken(&records, &tokenizer)).map(Rc::new);
                self.taken.insert(key, taken.clone());
                taken
            }
        };
        let work = match taken {
            Ok(taken) => Some(Work::Training(training.count(&taken))),
            Err(problem) => Some(Work::Fails(problem)),
        };
        Row { cell: id, work, until: None }
    }

    /// A cell that asks an endpoint. `Err` if the journal cannot be read.
    fn calls(&mut self, id: CellId, completing: &CompletionForecast, asked: &Asked) -> Result<Row, Problem> {
        let endpoint = || asked.endpoint.clone();
        let data = self.look.data_of(id);
        let known = data.filter(|data| self.look.files(*data).is_some());
        let work = match known {
            Some(data) => {
                let records = match self.records(data) {
                    Ok(records) => records,
                    Err(problem) => return Ok(Row { cell: id, work: Some(Work::Fails(problem)), until: None }),
                };
                let prompt_file = self.look.source(id, "prompt_file");
                let Some(kind) = self.look.kind(id) else { return Ok(Row { cell: id, work: None, until: None }) };
                match (kind.pending)(&self.cell(id).params, prompt_file, &records, &asked.line) {
                    Ok(pending) => Some(completing.calls(pending, endpoint(), &records, &asked.line, &mut self.asked)),
                    Err(problem) if problem.code == "remote::journal" => return Err(problem),
                    Err(problem) => return Ok(Row { cell: id, work: Some(Work::Fails(problem)), until: None }),
                }
            }
            None => {
                data.and_then(|data| self.count(data)).map(|(records, _)| completing.calls_at_most(endpoint(), records))
            }
        };
        let until = data.filter(|data| self.look.files(*data).is_none());
        Ok(Row { cell: id, work: work.map(Box::new).map(Work::Calls), until })
    }

    /// What a cell asks its judge.
    fn judging(&self, id: CellId, completing: &CompletionForecast, endpoint: &Endpoint) -> Row {
        let data = self.look.data_of(id);
        let counted = data.and_then(|data| self.count(data));
        let calls = counted.and_then(|(records, _)| completing.judging(endpoint.clone(), records));
        let until = if calls.is_some() { None } else { data };
        Row { cell: id, work: calls.map(Box::new).map(Work::Judging), until }
    }

    /// Records of a cell, made or not, and whether there may be fewer.
    fn count(&self, id: CellId) -> Option<(u64, bool)> {
        if let Some(data) = self.look.data(id) {
            return Some((data.records as u64, false));
        }
        let Forecast::Completing(completing) = self.look.forecast(id)? else { return None };
        if !self.look.kind(id)?.makes_records() {
            return None;
        }
        let (records, fewer) = self.count(self.look.data_of(id)?)?;
        Some((completing.wanted(records), fewer || completing.drops))
    }

    fn records(&mut self, id: CellId) -> Result<Rc<Vec<Record>>, Problem> {
        if let Some((_, records)) = self.records.as_ref().filter(|(known, _)| *known == id) {
            return Ok(records.clone());
        }
        let path = self.look.files(id).and_then(|files| files.get("data.jsonl").map(PathBuf::from));
        let path = path.ok_or_else(|| Problem::new("data::unreadable", format!("`{}` is not there", self.cell(id))))?;
        self.records = None;
        let records = Rc::new(data::read_records(&path)?);
        self.records = Some((id, records.clone()));
        Ok(records)
    }

    /// The tokenizer of a base model, made or not, and its file, by which it is known.
    fn tokenizer(&mut self, base: CellId) -> Option<(PathBuf, Rc<Tokenizer>)> {
        let files: Files = self.look.tokenizer_files(base)?;
        let name = files.get("tokenizer.json")?.to_path_buf();
        let load = || Tokenizer::load(&files).ok().map(Rc::new);
        let tokenizer = self.tokenizers.entry(name.clone()).or_insert_with(load).clone()?;
        Some((name, tokenizer))
    }
}
