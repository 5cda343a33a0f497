//! Templates kept within bounds: what a model's folder or a manifest says may ask for anything, and must not end the process.
//!
//! `minijinja` counts steps and the bytes they make (fuel). What is left is done here, once, for every template:
//! - its text is read by `scan` first, which counts the symbols, and marks in the text where values become text and where a
//!   `namespace` keeps them;
//! - it is parsed on a thread whose stack is as deep as its symbols can nest;
//! - what a `namespace` keeps is a plain tree of bounded depth, so that no value holds itself (`__kept`);
//! - lists and maps are measured before they become text (`__shown`), and methods of texts before they are called;
//! - it is rendered on a thread with room for the deepest value it can make, where the caller's stack might be too small.

mod scan;

use minijinja::value::{DynObject, Object, ObjectRepr, Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use scan::Scan;
use std::fmt;

/// Steps a rendering may take; each pays for [`BYTES`] bytes too. A long conversation with tools takes some ten thousand.
const FUEL: u64 = 20_000_000;
/// Bytes that one step pays for in `minijinja`.
const BYTES: usize = 64;
/// Symbols (names, operators, brackets, texts) that a template may have in its tags; real ones have some thousand.
const SYMBOLS: usize = 20_000;
/// How deep a value kept in a `namespace`, or made into text, may be. JSON is read to 128.
const DEPTH: usize = 200;
/// Values within a list or map that is made into text or kept, and the bytes of its texts.
const VALUES: usize = 1_000_000;
const TEXT: usize = 64 << 20;
/// What macros, includes and recursive loops may nest, in `minijinja`'s count (a macro is 4, an include 10).
const CALLS: usize = 250;
/// Stack that one level of a value takes at most, whatever is done with it, and one symbol while it is parsed.
const LEVEL: usize = 1 << 10;
const SYMBOL: usize = 4 << 10;
/// Stack for all else.
const BASE: usize = 4 << 20;
/// What every thread of this program has to spare, and the most that is asked for a thread.
const SPARE: usize = 512 << 10;
const STACK: usize = 1 << 30;

/// Templates by name, under one set of rules.
pub struct Templates {
    env: Environment<'static>,
    /// Stack that rendering needs beyond [`BASE`].
    stack: usize,
}

/// In place of `minijinja`'s word for a value.
pub type Word = fn(&Value) -> Option<&'static str>;

/// A template asked for more than it gets: the cause of an [`Error`].
#[derive(Debug)]
struct Limit;

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a limit of templates")
    }
}

impl std::error::Error for Limit {}

impl Templates {
    /// With the syntax, filters and functions of `env`; `word` prints values that are printed otherwise than by `minijinja`.
    pub fn new(mut env: Environment<'static>, word: Word) -> Templates {
        env.set_fuel(Some(FUEL));
        env.set_recursion_limit(CALLS);
        env.set_unknown_method_callback(method);
        env.remove_global("debug");
        env.set_formatter(move |out, state, value| match word(value) {
            Some(word) => out.write_str(word).map_err(Error::from),
            None => shown(state, value).and_then(|_| minijinja::escape_formatter(out, state, value)),
        });
        env.add_filter("__shown", |state: &State, value: &Value| shown(state, value).map(|_| value.clone()));
        env.add_filter("__kept", |state: &State, value: &Value| kept(state, value));
        Templates { env, stack: 0 }
    }

    /// Another one. `Err`: it is no template, or too large a one.
    pub fn add(&mut self, name: &str, text: &str) -> Result<(), Error> {
        let Scan { text, symbols, nesting, calls } = scan::scan(text);
        if symbols > SYMBOLS {
            return Err(over(format!("its tags have {symbols} names, operators and brackets; {SYMBOLS} are the most")));
        }
        let levels = DEPTH + nesting * if calls { CALLS } else { 1 };
        let stack = levels * LEVEL;
        if stack > STACK {
            return Err(over(format!(
                "it has macros, includes or recursive loops, and {nesting} brackets and operators in its tags; beside these, {} are the most",
                (STACK / LEVEL - DEPTH) / CALLS
            )));
        }
        self.stack = self.stack.max(stack);
        let env = &mut self.env;
        with_stack(BASE + symbols * SYMBOL, || env.add_template_owned(name.to_string(), text))?
    }

    /// Whether there is one of this name.
    pub fn has(&self, name: &str) -> bool {
        self.env.get_template(name).is_ok()
    }

    /// The text it gives.
    pub fn render(&self, name: &str, context: Value) -> Result<String, Error> {
        let render = || self.env.get_template(name)?.render(context);
        if self.stack <= SPARE { render() } else { with_stack(BASE + self.stack, render)? }
    }
}

/// What a user is told of an error that is a limit's: what to do.
pub fn help_for(error: &Error) -> Option<&'static str> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        if inner.is::<Limit>() {
            return Some(
                "a template of this size or depth is taken for a mistake: make it smaller, or nest less in it",
            );
        }
        if inner.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::OutOfFuel) {
            return Some(
                "a template may take 20,000,000 steps, each for 64 bytes of text: look for a loop or a text in it that grows without end",
            );
        }
        cause = inner.source();
    }
    None
}

fn over(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into()).with_source(Limit)
}

/// `work` on a thread with a stack of this size.
fn with_stack<T: Send>(size: usize, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("template".into()).stack_size(size).spawn_scoped(scope, work);
        let thread = thread.map_err(|error| over(format!("there is no room to nest as it may: {error}")))?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// What a value comes to when it is written out.
#[derive(Default)]
pub(crate) struct Size {
    values: usize,
    bytes: usize,
}

impl Size {
    fn add(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.values += 1;
        self.bytes += value.as_str().map_or(0, str::len);
        if let Some(object) = value.as_object() {
            if depth == 0 {
                return Err(over(format!("it makes a text of a value more than {DEPTH} deep")));
            }
            match object.repr() {
                ObjectRepr::Map => {
                    for (key, value) in object.try_iter_pairs().into_iter().flatten() {
                        self.add(&key, depth - 1)?;
                        self.add(&value, depth - 1)?;
                    }
                }
                ObjectRepr::Seq | ObjectRepr::Iterable => {
                    for value in object.try_iter().into_iter().flatten() {
                        self.add(&value, depth - 1)?;
                    }
                }
                _ => {}
            }
        }
        if self.values > VALUES || self.bytes > TEXT {
            return Err(over(format!(
                "it makes a text of a list or map of more than {VALUES} values or {} MiB of text",
                TEXT >> 20
            )));
        }
        Ok(())
    }
}

/// `Err` where a list or map is too large to become text. A text is what it is.
pub(crate) fn shown(state: &State, value: &Value) -> Result<Size, Error> {
    let mut size = Size::default();
    if value.as_object().is_none() {
        return Ok(size);
    }
    size.add(value, DEPTH)?;
    state.consume_fuel(size.values as u64 / 4)?;
    Ok(size)
}

/// The value as a plain tree: a `namespace` outlives the steps of a loop, so what it keeps must not grow deeper by each.
fn kept(state: &State, value: &Value) -> Result<Value, Error> {
    let mut seen = 0;
    let plain = plain(value, DEPTH, &mut seen)?;
    state.consume_fuel(seen as u64 / 4)?;
    Ok(plain.unwrap_or_else(|| value.clone()))
}

/// `None` where it is plain as it stands.
fn plain(value: &Value, depth: usize, seen: &mut usize) -> Result<Option<Value>, Error> {
    let Some(object) = value.as_object() else { return Ok(None) };
    let kind = object.type_name();
    // A macro is called, not written out.
    if kind.ends_with("::Macro") || kind.ends_with("::BoxedFunction") {
        return Ok(None);
    }
    if kind.ends_with("::Namespace") || kind.ends_with("::Loop") || kind.ends_with("::Module") {
        return Err(over("a `namespace` keeps texts, numbers, lists and maps, not a namespace, a loop or a module"));
    }
    if depth == 0 {
        return Err(over(format!("a `namespace` keeps values at most {DEPTH} deep")));
    }
    match object.repr() {
        ObjectRepr::Map => {
            let pairs: Vec<(Value, Value)> = object.try_iter_pairs().into_iter().flatten().take(VALUES + 1).collect();
            counted(pairs.len(), seen)?;
            let mut changed = !kind.starts_with("indexmap::");
            let mut rebuilt = Vec::with_capacity(pairs.len());
            for (key, value) in pairs {
                let (new_key, new_value) = (plain(&key, depth - 1, seen)?, plain(&value, depth - 1, seen)?);
                changed |= new_key.is_some() || new_value.is_some();
                rebuilt.push((new_key.unwrap_or(key), new_value.unwrap_or(value)));
            }
            Ok(changed.then(|| Value::from_pairs(rebuilt)))
        }
        ObjectRepr::Seq | ObjectRepr::Iterable => {
            let values: Vec<Value> = object.try_iter().into_iter().flatten().take(VALUES + 1).collect();
            counted(values.len(), seen)?;
            let (list, tuple) = (holds::<Vec<Value>>(object), holds::<Tuple>(object));
            let mut changed = !list && !tuple;
            let mut rebuilt = Vec::with_capacity(values.len());
            for value in values {
                let new = plain(&value, depth - 1, seen)?;
                changed |= new.is_some();
                rebuilt.push(new.unwrap_or(value));
            }
            Ok(changed.then(|| if tuple { Value::from(Tuple::from(rebuilt)) } else { Value::from(rebuilt) }))
        }
        _ => Ok(None),
    }
}

fn holds<T: Object + 'static>(object: &DynObject) -> bool {
    object.downcast_ref::<T>().is_some()
}

fn counted(values: usize, seen: &mut usize) -> Result<(), Error> {
    *seen += values;
    match *seen > VALUES {
        true => Err(over(format!("a `namespace` keeps at most {VALUES} values at a time"))),
        false => Ok(()),
    }
}

/// Python's methods, those that make much of little only where the steps left pay for it.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    for value in args.iter().chain((value.kind() != ValueKind::Map).then_some(value)) {
        shown(state, value)?;
    }
    if let Some(text) = value.as_str() {
        let arg = |at: usize| args.get(at).and_then(Value::as_str).unwrap_or("");
        let made = match name {
            "replace" => {
                let limit = args.get(2).and_then(Value::as_usize).unwrap_or(usize::MAX);
                // Counting is as much work as replacing.
                text.matches(arg(0)).count().min(limit).saturating_mul(arg(1).len()).saturating_add(text.len())
            }
            "join" => {
                let size = args.first().map(|list| shown(state, list)).transpose()?.unwrap_or_default();
                size.values.saturating_mul(text.len()).saturating_add(size.bytes)
            }
            "split" if arg(0).is_empty() => text.len().saturating_mul(16),
            "split" => text.matches(arg(0)).count().saturating_mul(32),
            "splitlines" => text.matches('\n').count().saturating_mul(32),
            "format" => widths(text).saturating_add(text.len()),
            _ => 0,
        };
        if state.fuel_levels().is_some_and(|(_, left)| made / BYTES > left as usize) {
            return Err(ErrorKind::OutOfFuel.into());
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// The bytes of filling that the widths and precisions in a text for `format` ask for, at most.
fn widths(text: &str) -> usize {
    text.split(|c: char| !c.is_ascii_digit())
        .filter(|digits| !digits.is_empty())
        .map(|digits| digits.parse().unwrap_or(usize::MAX))
        .fold(0, usize::saturating_add)
}

#[cfg(test)]
mod tests;
