//! Generation: requests in at any time, tokens out, many at once.
//!
//! A request waits until there are pages for its longest end, so that it never waits midway; first come, first
//! served. Then its prompt is run, packed with others, and from there on it advances by one token per step, together
//! with all that live. One that has ended leaves at once. Keys and values lie in pages: requests with the same prompt
//! share those that its tokens fill, whether they come together or one after another, and of the page that it fills
//! in part each has a copy.
//!
//! None of this changes what comes out: a request has the same tokens alone as in any company, to the bit, because
//! every row is computed by itself, has its own [`Sampling`] and draws its own random numbers.

use super::device::DeviceDecoder;
use super::host::HostDecoder;
use super::pages::{Held, Pages};
use super::request::{Ask, Beginning, Completion, Draw, Event, Finish, Limits, Live, MOST_TOP, Prompt, Ticket};
use super::sampling::Sampling;
use crate::model::Config;
use crate::model::placed::Placed;
use crate::model::sizes::{
    DEVICE_PAGE, HOST_PAGE, KNOWN, MOST_LIVE, PROMPT_TOKENS, most_live_on_host, pages_of, pages_on_host,
};
use crate::problem::{Exit, Problem};
use std::collections::VecDeque;

/// Completes `prompts`, in order. `decode` turns ids to text (without special tokens, if that is wanted).
/// `on_step` is told how many are finished, at least once per token; its `Err` ends the work. `Err` also for a prompt
/// that [`Engine::submit`] refuses, before anything runs.
pub fn generate(
    placed: &Placed,
    prompts: &[Prompt],
    sampling: &Sampling,
    decode: &dyn Fn(&[u32]) -> String,
    on_step: &mut dyn FnMut(usize) -> Result<(), Problem>,
    limits: &Limits,
) -> Result<Vec<Completion>, Problem> {
    let ask = |Prompt { ids, stream }: &Prompt| {
        let (ids, sampling) = (ids.clone(), sampling.clone());
        Ask { ids, stream: *stream, sampling, top_logprobs: 0 }
    };
    complete(placed, prompts.iter().map(ask).collect(), decode, on_step, limits)
}

/// The same of requests with parameters of their own.
pub fn complete(
    placed: &Placed,
    asks: Vec<Ask>,
    decode: &dyn Fn(&[u32]) -> String,
    on_step: &mut dyn FnMut(usize) -> Result<(), Problem>,
    limits: &Limits,
) -> Result<Vec<Completion>, Problem> {
    let Some(prompt) = asks.iter().map(|ask| ask.ids.len()).max() else {
        on_step(0)?;
        return Ok(Vec::new());
    };
    let longest = |ask: &Ask| ask.ids.len().saturating_add(ask.sampling.max_tokens);
    let limits = Limits {
        live: limits.live.min(asks.len()),
        longest: limits.longest.min(asks.iter().map(longest).max().unwrap_or(0)),
        prompt: limits.prompt.min(prompt),
        ..limits.clone()
    };
    let mut completions: Vec<Option<Completion>> = asks.iter().map(|_| None).collect();
    let mut engine = Engine::new(placed, limits, decode)?;
    for ask in asks {
        engine.submit(ask)?;
    }
    let mut finished = 0;
    while !engine.is_idle() {
        for event in engine.step()? {
            if let Event::End { ticket, completion } = event {
                completions[ticket.0 as usize] = Some(completion);
                finished += 1;
            }
        }
        on_step(finished)?;
    }
    engine.end();
    Ok(completions.into_iter().flatten().collect())
}

/// Takes requests and gives their tokens, step by step. After an `Err` of [`Engine::step`] it is of no more use.
pub struct Engine<'m> {
    config: &'m Config,
    decode: &'m dyn Fn(&[u32]) -> String,
    place: Place<'m>,
    /// Completions that it runs at once.
    width: usize,
    /// Tokens of the longest request, and of its prompt.
    longest: usize,
    prompt: usize,
    pages: Pages,
    /// Prompts that need not be run again, the one used last at the end.
    known: Vec<Known>,
    waiting: VecDeque<Live>,
    live: Vec<Live>,
    /// Of those that had nothing to wait for.
    ended: Vec<Event>,
    tickets: u64,
}

/// A prompt that was run.
struct Known {
    ids: Vec<u32>,
    held: Held,
    /// Where the logits after it are kept.
    slot: usize,
}

/// Runs prompts and tokens and draws from what comes out.
enum Place<'m> {
    Host(Box<HostDecoder<'m>>),
    Device(Box<DeviceDecoder<'m>>),
}

impl Place<'_> {
    /// Tokens of a page.
    fn page(&self) -> usize {
        match self {
            Place::Host(_) => HOST_PAGE,
            Place::Device(_) => DEVICE_PAGE,
        }
    }

    /// How many there are.
    fn pages(&self) -> usize {
        match self {
            Place::Host(host) => host.pages(),
            Place::Device(device) => device.pages(),
        }
    }

    /// Runs prompts and draws the first token of each of `new`, which are the rows from `first` on.
    fn begin(&mut self, new: &[Live], first: usize, beginning: &Beginning) -> Result<Vec<Draw>, Problem> {
        match self {
            Place::Host(host) => Ok(host.begin(new, beginning)),
            Place::Device(device) => device.begin(new, first, beginning),
        }
    }

    /// One token further for all.
    fn step(&mut self, live: &[Live]) -> Result<Vec<Draw>, Problem> {
        match self {
            Place::Host(host) => Ok(host.step(live)),
            Place::Device(device) => device.step(live),
        }
    }
}

impl<'m> Engine<'m> {
    /// `decode` turns ids to text: for stop texts, and for the text of completions. `Err` if a device has not the
    /// memory.
    pub fn new(
        placed: &'m Placed,
        limits: Limits,
        decode: &'m dyn Fn(&[u32]) -> String,
    ) -> Result<Engine<'m>, Problem> {
        let config = placed.config();
        let longest = limits.longest.min(config.max_position_embeddings).max(1);
        let prompt = limits.prompt.min(longest);
        let (width, place) = match placed {
            Placed::Host(side) => {
                let width = limits.live.clamp(1, most_live_on_host(config));
                let count = pages_on_host(config, width, longest).min(limits.pages);
                (width, Place::Host(Box::new(HostDecoder::new(&side.model, longest, count))))
            }
            Placed::Device(side) => {
                let width = limits.live.clamp(1, MOST_LIVE);
                let decoder = DeviceDecoder::new(&side.model, &limits, width, longest, prompt)?;
                (width, Place::Device(Box::new(decoder)))
            }
        };
        Ok(Engine {
            config,
            decode,
            pages: Pages::new(place.pages()),
            place,
            width,
            longest,
            prompt,
            known: Vec::new(),
            waiting: VecDeque::new(),
            live: Vec::new(),
            ended: Vec::new(),
            tickets: 0,
        })
    }

    /// Takes a request. `Err` if it can never be done: an empty prompt, an id without a row in the embedding, more
    /// tokens than the context or than there are pages for, parameters that mean nothing. Then nothing has changed.
    pub fn submit(&mut self, ask: Ask) -> Result<Ticket, Problem> {
        self.check(&ask)?;
        let Ask { ids, stream, sampling, top_logprobs } = ask;
        let ticket = Ticket(self.tickets);
        self.tickets += 1;
        if sampling.max_tokens == 0 {
            let (text, finish) = ((self.decode)(&[]), Finish::Length);
            let completion = Completion { ids: Vec::new(), text, finish, logprobs: Vec::new() };
            self.ended.push(Event::End { ticket, completion });
            return Ok(ticket);
        }
        let (prompt_len, held, logprobs) = (ids.len(), Held::default(), Vec::new());
        self.waiting.push_back(Live { ticket, ids, prompt_len, stream, sampling, top_logprobs, held, logprobs });
        Ok(ticket)
    }

    fn check(&self, ask: &Ask) -> Result<(), Problem> {
        let Ask { ids, sampling, top_logprobs, .. } = ask;
        if ids.is_empty() {
            return Err(Problem::new("model::empty_prompt", "a prompt has no tokens"));
        }
        self.config.check_ids(ids)?;
        sampling.check()?;
        if *top_logprobs > MOST_TOP {
            let message = format!("{top_logprobs} of the likeliest tokens are asked for, and {MOST_TOP} are told");
            return Err(Problem::new("model::top_logprobs", message));
        }
        let all = ids.len().saturating_add(sampling.max_tokens);
        if all > self.longest || ids.len() > self.prompt {
            let (prompt, most) = (ids.len(), sampling.max_tokens);
            let message = format!(
                "a prompt of {prompt} tokens and {most} new ones do not fit a context of {} tokens",
                self.longest
            );
            let problem = Problem::new("model::context", message);
            return Err(match self.longest.checked_sub(prompt).filter(|left| *left > 0 && prompt <= self.prompt) {
                Some(left) => problem.help(format!("`max_tokens` may be up to {left}")),
                None => problem.help("shorten the prompt"),
            });
        }
        let (page, wanted) = (self.place.page(), pages_of(all, self.place.page()));
        if wanted > self.pages.count() {
            let (there, wanted) = (self.pages.count() * page, wanted * page);
            let message =
                format!("there is room for {there} tokens of keys and values, and one completion may need {wanted}");
            return Err(match &self.place {
                Place::Host(_) => Problem::new("model::pages", message).help("lower `max_tokens`"),
                Place::Device(_) => Problem::new("cuda::out_of_memory", message)
                    .exit(Exit::Missing)
                    .help("lower `max_tokens`, or end what else uses the device: `nvidia-smi` lists it")
                    .help("or run on the CPU: `--device cpu`"),
            });
        }
        Ok(())
    }

    /// Forgets a request; its pages are free at once. Nothing happens if it has ended.
    pub fn cancel(&mut self, ticket: Ticket) {
        self.ended.retain(|event| !matches!(event, Event::End { ticket: other, .. } if *other == ticket));
        self.waiting.retain(|one| one.ticket != ticket);
        if let Some(at) = self.live.iter().position(|one| one.ticket == ticket) {
            self.pages.release(&mut self.live.swap_remove(at).held);
        }
    }

    /// Whether a step would do nothing.
    pub fn is_idle(&self) -> bool {
        self.live.is_empty() && self.waiting.is_empty() && self.ended.is_empty()
    }

    /// Requests that have not begun.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Completions in the making.
    pub fn live(&self) -> usize {
        self.live.len()
    }

    /// One token further for all that live; then as many as there is room for begin and get their first one. `Err`
    /// (`model::not_finite`) if the model has diverged.
    pub fn step(&mut self) -> Result<Vec<Event>, Problem> {
        let mut events = std::mem::take(&mut self.ended);
        if !self.live.is_empty() {
            let page = self.place.page();
            for one in &mut self.live {
                while one.held.pages().len() * page < one.ids.len() {
                    self.pages.take(&mut one.held);
                }
            }
            let drawn = self.place.step(&self.live)?;
            self.advance(0, drawn, &mut events)?;
        }
        let (mut places, mut tokens) = (self.width - self.live.len(), 0);
        loop {
            let first = self.live.len();
            let beginning = self.admit(places, &mut tokens);
            if self.live.len() == first {
                return Ok(events);
            }
            places -= self.live.len() - first;
            let drawn = self.place.begin(&self.live[first..], first, &beginning)?;
            self.advance(first, drawn, &mut events)?;
        }
    }

    /// Lets the next in line begin, at most `most`, while there is room for them and `tokens`, those of the prompts
    /// that this step has run, are not too many.
    fn admit(&mut self, most: usize, tokens: &mut usize) -> Beginning {
        let (first, page) = (self.live.len(), self.place.page());
        let mut new = Beginning::default();
        while self.live.len() - first < most
            && let Some(next) = self.waiting.front()
        {
            let begun = self.live.len() > first;
            let (ids, len, all) = (&next.ids, next.ids.len(), next.ids.len() + next.sampling.max_tokens);
            let known = self.known.iter().position(|known| known.ids == *ids);
            let running = new.runs.iter().position(|&run| self.live[first + run].prompt() == ids);
            if begun && known.is_some() != new.runs.is_empty() {
                break;
            }
            let runs = known.is_none() && running.is_none();
            if runs && *tokens > 0 && *tokens + len > PROMPT_TOKENS {
                break;
            }
            let (whole, shared) = (len / page, if runs { 0 } else { len / page });
            let Some(mut held) = self.pages.promise(pages_of(all, page) - shared) else {
                // Prompts that are kept make room, that of the next in line only if nobody will.
                let other = self.known.iter().position(|known| known.ids != *ids && self.pages.frees(&known.held));
                match other.or(known.filter(|_| self.live.is_empty())).filter(|_| !begun) {
                    Some(at) => self.forget(at),
                    None => break,
                };
                continue;
            };
            let source = match (known, running) {
                (Some(at), _) => {
                    // Used last.
                    let known = self.known.remove(at);
                    self.known.push(known);
                    self.known.last().map(|known| known.held.pages())
                }
                (None, Some(place)) => Some(self.live[first + new.runs[place]].held.pages()),
                (None, None) => None,
            };
            self.pages.share(&mut held, source.map_or(&[], |pages| &pages[..whole]));
            while held.pages().len() * page < len {
                self.pages.take(&mut held);
            }
            match source {
                Some(source) => {
                    let row = |pages: &[u32], token: usize| pages[token / page] * page as u32 + (token % page) as u32;
                    new.from.extend((whole * page..len).map(|token| row(source, token)));
                    new.to.extend((whole * page..len).map(|token| row(held.pages(), token)));
                }
                None => {
                    *tokens += len;
                    new.runs.push(self.live.len() - first);
                }
            }
            new.prompt.push(match (known, running) {
                (Some(_), _) => self.known[self.known.len() - 1].slot,
                (None, Some(place)) => place,
                (None, None) => new.runs.len() - 1,
            });
            let Some(mut next) = self.waiting.pop_front() else { break };
            next.held = held;
            self.live.push(next);
        }
        self.remember(first, &mut new);
        new
    }

    /// Keeps the last of the prompts that are about to be run.
    fn remember(&mut self, first: usize, new: &mut Beginning) {
        let places = new.runs.len().saturating_sub(KNOWN)..new.runs.len();
        for place in places {
            if self.known.len() == KNOWN {
                self.forget(0);
            }
            let writer = &self.live[first + new.runs[place]];
            let mut held = Held::default();
            self.pages.share(&mut held, writer.held.pages());
            let slot = (0..KNOWN).find(|slot| self.known.iter().all(|known| known.slot != *slot)).unwrap_or(0);
            self.known.push(Known { ids: writer.prompt().to_vec(), held, slot });
            new.keep.push(slot);
        }
    }

    /// Called when nobody waits or lives.
    fn end(mut self) {
        while !self.known.is_empty() {
            self.forget(0);
        }
        assert!(self.pages.all_free(), "pages are lost: {:?}", self.pages);
    }

    fn forget(&mut self, at: usize) {
        self.pages.release(&mut self.known.remove(at).held);
    }

    /// Gives the completions from `first` on the tokens that were drawn for them and takes out those that have ended.
    fn advance(&mut self, first: usize, drawn: Vec<Draw>, events: &mut Vec<Event>) -> Result<(), Problem> {
        for (one, Draw { id, logprob, top }) in self.live[first..].iter_mut().zip(drawn) {
            one.ids.push(id);
            one.logprobs.push(logprob);
            if !logprob.is_finite() {
                let (at, prompt) = (one.logprobs.len(), one.ticket.0 + 1);
                let message = format!("the logits of token {at} of prompt {prompt} are not finite");
                return Err(Problem::new("model::not_finite", message)
                    .note("the weights are finite, so an activation overflowed: the model has diverged in training"));
            }
            events.push(Event::Token { ticket: one.ticket, id, logprob, top });
        }
        // From the end, so that what takes the place of one that goes has been looked at, and few change places.
        for at in (first..self.live.len()).rev() {
            let one = &self.live[at];
            if let Some((finish, text)) = finish(&one.ids[one.prompt_len..], &one.sampling, self.decode) {
                let mut one = self.live.swap_remove(at);
                self.pages.release(&mut one.held);
                let (ids, logprobs) = (one.ids.split_off(one.prompt_len), one.logprobs);
                events.push(Event::End { ticket: one.ticket, completion: Completion { ids, text, finish, logprobs } });
            }
        }
        Ok(())
    }
}

/// Whether a completion is over, and then its text.
fn finish(ids: &[u32], sampling: &Sampling, decode: &dyn Fn(&[u32]) -> String) -> Option<(Finish, String)> {
    if let Some((last, before)) = ids.split_last()
        && sampling.stop_ids.contains(last)
    {
        return Some((Finish::Stop, cut(decode(before), &sampling.stop).0));
    }
    // A token is at least one byte, so a new stop text lies within that many last tokens; a few more keep
    // the first character of the tail whole.
    let tail = sampling.stop.iter().map(|stop| stop.len() + 4).max().unwrap_or(0).min(ids.len());
    if tail > 0 && cut(decode(&ids[ids.len() - tail..]), &sampling.stop).1 {
        let (text, found) = cut(decode(ids), &sampling.stop);
        if found {
            return Some((Finish::Stop, text));
        }
    }
    (ids.len() >= sampling.max_tokens).then(|| (Finish::Length, decode(ids)))
}

/// The text before the first of the stop texts, and whether there was one.
fn cut(mut text: String, stop: &[String]) -> (String, bool) {
    match stop.iter().filter_map(|stop| text.find(stop.as_str())).min() {
        Some(at) => {
            text.truncate(at);
            (text, true)
        }
        None => (text, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letters(ids: &[u32]) -> String {
        ids.iter().map(|&id| char::from(b'a' + id as u8)).collect()
    }

    fn stopping(stop: &[&str], stop_ids: &[u32]) -> Sampling {
        let stop = stop.iter().map(|stop| stop.to_string()).collect();
        Sampling { max_tokens: 6, stop, stop_ids: stop_ids.to_vec(), ..Sampling::default() }
    }

    #[test]
    fn a_stop_text_may_span_tokens_and_is_cut_off() {
        let sampling = stopping(&["cd", "zz"], &[]);
        assert_eq!(finish(&[0, 1, 2], &sampling, &letters), None);
        assert_eq!(finish(&[0, 1, 2, 3], &sampling, &letters), Some((Finish::Stop, "ab".into())));
    }

    #[test]
    fn a_stop_id_is_not_part_of_the_text() {
        assert_eq!(finish(&[0, 1, 9], &stopping(&[], &[9]), &letters), Some((Finish::Stop, "ab".into())));
    }

    #[test]
    fn the_length_ends_it_otherwise() {
        assert_eq!(finish(&[0; 5], &stopping(&["b"], &[9]), &letters), None);
        assert_eq!(finish(&[0; 6], &stopping(&["b"], &[9]), &letters), Some((Finish::Length, "aaaaaa".into())));
        assert_eq!(
            finish(&[], &Sampling { max_tokens: 0, ..Sampling::default() }, &letters),
            Some((Finish::Length, "".into()))
        );
    }
}
