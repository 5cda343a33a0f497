//! Who is let in, which path does what, and one request from its body to its last token.
//!
//! One file, for it is the course of one request: what is counted, logged and given back at its end is the same whichever
//! way it ends.

use super::ask::{Form, Wanted, Wish, unknown_model};
use super::http::{Body, Connection, Gone, Head, Purse, Reply};
use super::refusal::Refusal;
use super::reply::{Frame, Told, Usage};
use super::service::{Bounds, Service};
use super::text::Shown;
use super::work::{Gauges, Job, Piece};
use crate::generation::Ask;
use crate::generation::Finish;
use crate::random::Stream;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Between two looks at whether a client is still there, or the server is to stop.
const LOOK: Duration = Duration::from_millis(100);
/// The status, in logs and counts, of a request whose client went away; none was sent.
const GONE: u16 = 499;
/// Connections that wait to be told that there are too many.
const TURNED_AWAY: usize = 64;
/// JSON and chat templates nest to known depths.
const STACK_BYTES: usize = 2 << 20;

/// What one request came to: facts for a log, nothing of what was said.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The method and path, or that they are unknown.
    pub what: &'static str,
    /// The HTTP status that was answered.
    pub status: u16,
    /// Tokens of the prompt; 0 where none was read.
    pub prompt_tokens: usize,
    /// Tokens made, of all choices together.
    pub completion_tokens: usize,
    /// From the headers of the request to the end of the answer.
    pub seconds: f64,
    /// Whether tokens were sent as they came.
    pub streamed: bool,
    /// The client went away before the end.
    pub cancelled: bool,
    /// Why nothing, or only a part, was answered: the problem's code.
    pub problem: Option<String>,
}

/// What all connections share.
struct Shared<'a> {
    service: &'a Service,
    jobs: Sender<Job>,
    gauges: &'a Gauges,
    stop: &'a AtomicBool,
    log: &'a (dyn Fn(&Entry) + Sync),
    /// Time is up: what is at work is dropped.
    cut: AtomicBool,
    purse: Purse,
    connections: AtomicUsize,
    requests: AtomicUsize,
    /// Requests that named no seed, or that need a name.
    counter: AtomicU64,
    counts: Mutex<Counts>,
    /// When it began, in seconds since 1970.
    began: u64,
}

/// What `/metrics` tells.
#[derive(Default)]
struct Counts {
    requests: BTreeMap<(&'static str, u16), u64>,
    prompt_tokens: u64,
    completion_tokens: u64,
    cancelled: u64,
}

/// Answers at `listener` until `stop` is set, and then until all connections have ended, within bounds. What is asked
/// for goes to `jobs`, see [`super::decode`].
pub fn answer(
    listener: &TcpListener,
    service: &Service,
    jobs: Sender<Job>,
    gauges: &Gauges,
    stop: &AtomicBool,
    log: &(dyn Fn(&Entry) + Sync),
) {
    let shared = Shared {
        service,
        jobs,
        gauges,
        stop,
        log,
        cut: AtomicBool::new(false),
        purse: Purse { left: AtomicUsize::new(service.bounds.bodies_bytes) },
        connections: AtomicUsize::new(0),
        requests: AtomicUsize::new(0),
        counter: AtomicU64::new(0),
        counts: Mutex::default(),
        began: now(),
    };
    let shared = &shared;
    thread::scope(|scope| {
        let (away, turned_away) = mpsc::sync_channel::<TcpStream>(TURNED_AWAY);
        scope.spawn(move || turned_away.into_iter().for_each(|stream| shared.turn_away(stream)));
        while !stop.load(Ordering::Relaxed) {
            let Some(stream) = accept(listener) else { continue };
            let Some(held) = Held::take(&shared.connections, service.bounds.connections) else {
                // Where even these are too many, it is closed without a word.
                let _ = away.try_send(stream);
                continue;
            };
            let serve = move || {
                let _held = held;
                let _ = catch_unwind(AssertUnwindSafe(|| shared.connection(stream)));
            };
            // Refused where the system has no thread to give: the connection closes.
            let _ = thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, serve);
        }
        drop(away);
        let until = Instant::now() + service.bounds.drain_time;
        while shared.connections.load(Ordering::Relaxed) > 0 && Instant::now() < until {
            thread::sleep(LOOK / 10);
        }
        shared.cut.store(true, Ordering::Relaxed);
    });
}

/// The next connection, if one comes soon.
fn accept(listener: &TcpListener) -> Option<TcpStream> {
    let mut wait = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, alive during the call.
    let ready = unsafe { libc::poll(&raw mut wait, 1, LOOK.as_millis() as libc::c_int) };
    if ready <= 0 {
        return None;
    }
    match listener.accept() {
        Ok((stream, _)) => Some(stream),
        Err(_) => {
            // Too many open files, most likely: some will be closed.
            thread::sleep(LOOK / 10);
            None
        }
    }
}

/// One of a bounded number, until it is dropped.
struct Held<'a>(&'a AtomicUsize);

impl<'a> Held<'a> {
    fn take(of: &'a AtomicUsize, most: usize) -> Option<Held<'a>> {
        let more = |count: usize| (count < most).then_some(count + 1);
        of.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Held(of))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Tells the engine that nobody waits any more, however the thread that waited ended.
struct Waiting(Arc<AtomicBool>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Route {
    Health,
    Metrics,
    Models,
    Model,
    Complete(Form),
}

/// What a request came to, so far as its connection is concerned.
enum Answer {
    Reply(Reply),
    /// It has been written; whether another may follow.
    Streamed(bool),
    Gone,
}

impl From<Gone> for Answer {
    fn from(_: Gone) -> Answer {
        Answer::Gone
    }
}

/// Why the pieces of a job end early.
enum Early {
    /// The client is gone.
    Gone,
    Refused(Refusal),
}

fn json_reply(status: u16, value: &Value) -> Reply {
    Reply { status, content_type: "application/json", headers: Vec::new(), body: value.to_string().into_bytes() }
}

fn refusal_reply(refusal: &Refusal) -> Reply {
    Reply { headers: refusal.headers.clone(), ..json_reply(refusal.status, &refusal.json()) }
}

fn stopping() -> Refusal {
    Refusal::new(503, "the server is stopping").code("stopping").header("Retry-After", "5")
}

impl<'a> Shared<'a> {
    fn bounds(&self) -> &'a Bounds {
        &self.service.bounds
    }

    fn next(&self) -> u64 {
        self.counter.fetch_add(1, Ordering::Relaxed)
    }

    fn turn_away(&self, stream: TcpStream) {
        let refusal = Refusal::busy("too many connections at once");
        if let Some(mut connection) = Connection::new(stream, self.bounds(), self.stop) {
            connection.respond(None, &refusal_reply(&refusal), false);
        }
        self.tell(&mut Entry::new("(connection)"), Instant::now(), &Err(refusal));
    }

    /// The requests of one connection, one after another.
    fn connection(&self, stream: TcpStream) {
        let Some(mut connection) = Connection::new(stream, self.bounds(), self.stop) else { return };
        let mut first = true;
        loop {
            let head = match connection.head(first) {
                Ok(Some(head)) => head,
                Ok(None) => return,
                Err(refusal) => {
                    connection.respond(None, &refusal_reply(&refusal), false);
                    return self.tell(&mut Entry::new("(unreadable)"), Instant::now(), &Err(refusal));
                }
            };
            if !self.request(&mut connection, &head) {
                return;
            }
            first = false;
        }
    }

    /// Whether the connection goes on.
    fn request(&self, connection: &mut Connection, head: &Head) -> bool {
        let began = Instant::now();
        let mut entry = Entry::new("(unknown path)");
        // While a body is unread, what follows on the connection is not a request.
        let mut unread = head.has_body();
        let answer = self.answer(connection, head, &mut entry, &mut unread);
        self.tell(&mut entry, began, &answer);
        // An idle connection keeps its place: none is kept when places get scarce.
        let room = self.connections.load(Ordering::Relaxed) * 4 <= self.bounds().connections * 3;
        match answer {
            Ok(Answer::Reply(reply)) => connection.respond(Some(head), &reply, room && !unread),
            Err(refusal) => connection.respond(Some(head), &refusal_reply(&refusal), room && !unread),
            Ok(Answer::Streamed(keep)) => {
                if !keep {
                    connection.close();
                }
                keep
            }
            Ok(Answer::Gone) => false,
        }
    }

    fn tell(&self, entry: &mut Entry, began: Instant, answer: &Result<Answer, Refusal>) {
        match answer {
            Ok(Answer::Reply(reply)) => entry.status = reply.status,
            Ok(Answer::Streamed(_)) => entry.status = 200,
            Ok(Answer::Gone) => (entry.cancelled, entry.status) = (true, GONE),
            Err(refusal) => {
                entry.status = refusal.status;
                entry.problem = entry.problem.take().or(refusal.code.map(String::from));
            }
        }
        entry.seconds = began.elapsed().as_secs_f64();
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.requests.entry((entry.what, entry.status)).or_default() += 1;
        counts.prompt_tokens += entry.prompt_tokens as u64;
        counts.completion_tokens += entry.completion_tokens as u64;
        counts.cancelled += u64::from(entry.cancelled);
        drop(counts);
        (self.log)(entry);
    }

    fn answer(
        &self,
        connection: &mut Connection,
        head: &Head,
        entry: &mut Entry,
        unread: &mut bool,
    ) -> Result<Answer, Refusal> {
        let (route, method, what) = match head.path.as_str() {
            "/health" => (Route::Health, "GET", "GET /health"),
            "/metrics" => (Route::Metrics, "GET", "GET /metrics"),
            "/v1/models" => (Route::Models, "GET", "GET /v1/models"),
            "/v1/chat/completions" => (Route::Complete(Form::Chat), "POST", "POST /v1/chat/completions"),
            "/v1/completions" => (Route::Complete(Form::Text), "POST", "POST /v1/completions"),
            path if path.starts_with("/v1/models/") => (Route::Model, "GET", "GET /v1/models/NAME"),
            _ => {
                let known = "/v1/chat/completions, /v1/completions, /v1/models, /health and /metrics";
                return Err(Refusal::new(404, format!("there is no such path; there are {known}")).code("unknown_url"));
            }
        };
        entry.what = what;
        if head.method != method && !(method == "GET" && head.method == "HEAD") {
            return Err(Refusal::new(405, format!("this path takes {method} alone")).header("Allow", method));
        }
        if route == Route::Health {
            return Ok(Answer::Reply(json_reply(200, &json!({ "status": "ok" }))));
        }
        self.authorise(head)?;
        match route {
            Route::Health => unreachable!("answered above, without a key"),
            Route::Metrics => Ok(Answer::Reply(Reply {
                status: 200,
                content_type: "text/plain; version=0.0.4; charset=utf-8",
                headers: Vec::new(),
                body: self.metrics().into_bytes(),
            })),
            Route::Models => {
                Ok(Answer::Reply(json_reply(200, &json!({ "object": "list", "data": [self.model_json()] }))))
            }
            Route::Model => match head.path.trim_start_matches("/v1/models/") {
                name if name == self.service.name => Ok(Answer::Reply(json_reply(200, &self.model_json()))),
                name => Err(unknown_model(name, self.service)),
            },
            Route::Complete(form) => self.complete(connection, head, form, entry, unread),
        }
    }

    fn authorise(&self, head: &Head) -> Result<(), Refusal> {
        let Some(key) = &self.service.key else { return Ok(()) };
        let given = head.bearer.as_deref().unwrap_or_default().as_bytes();
        // All bytes are looked at, so that the time tells nothing of them.
        let differs = key.bytes().enumerate().fold(0, |sum, (i, byte)| sum | (byte ^ given.get(i).unwrap_or(&!byte)));
        match given.len() == key.len() && differs == 0 {
            true => Ok(()),
            false => {
                let message = "the key of this server is asked for: `Authorization: Bearer KEY`";
                Err(Refusal::new(401, message).code("invalid_api_key").header("WWW-Authenticate", "Bearer"))
            }
        }
    }

    fn model_json(&self) -> Value {
        json!({
            "id": self.service.name, "object": "model", "created": self.began, "owned_by": "pipe",
            "root": self.service.fingerprint, "max_model_len": self.service.context,
        })
    }

    fn metrics(&self) -> String {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::from("# TYPE pipe_requests_total counter\n");
        for ((what, status), count) in &counts.requests {
            let _ = writeln!(text, "pipe_requests_total{{what=\"{what}\",status=\"{status}\"}} {count}");
        }
        for (name, kind, value) in [
            ("pipe_prompt_tokens_total", "counter", counts.prompt_tokens),
            ("pipe_completion_tokens_total", "counter", counts.completion_tokens),
            ("pipe_requests_cancelled_total", "counter", counts.cancelled),
            ("pipe_requests", "gauge", self.requests.load(Ordering::Relaxed) as u64),
            ("pipe_connections", "gauge", self.connections.load(Ordering::Relaxed) as u64),
            ("pipe_completions_live", "gauge", self.gauges.live.load(Ordering::Relaxed) as u64),
            ("pipe_completions_waiting", "gauge", self.gauges.waiting.load(Ordering::Relaxed) as u64),
        ] {
            let _ = writeln!(text, "# TYPE {name} {kind}\n{name} {value}");
        }
        text
    }

    fn complete(
        &self,
        connection: &mut Connection,
        head: &Head,
        form: Form,
        entry: &mut Entry,
        unread: &mut bool,
    ) -> Result<Answer, Refusal> {
        if head.content_type.as_deref() != Some("application/json") {
            return Err(Refusal::new(415, "the body has to be JSON, and said to be: `Content-Type: application/json`"));
        }
        let body: Body = connection.body(head, &self.purse)?;
        *unread = false;
        if self.stop.load(Ordering::Relaxed) {
            return Err(stopping());
        }
        let held = Held::take(&self.requests, self.bounds().requests);
        let _held = held.ok_or_else(|| Refusal::busy("too many requests at once"))?;
        let number = self.next();
        let fresh = Stream::named(self.service.seed, &["serve", "seed"]).u64(number);
        let wanted = Wanted::read(form, &body.bytes, self.service, fresh)?;
        drop(body);
        let name = Stream::named(self.service.seed, &["serve", "name"]).u64(number);
        let frame = Frame {
            form,
            id: format!("{}-{name:016x}", if form == Form::Chat { "chatcmpl" } else { "cmpl" }),
            created: now(),
            model: self.service.name.clone(),
            fingerprint: self.service.fingerprint.clone(),
        };
        entry.streamed = wanted.stream;
        let mut pieces = self.submit(&wanted)?;
        // What is wrong with a request is said before a stream begins.
        match pieces.next(self, connection) {
            Ok(Piece::Refused(problem)) => {
                entry.problem = Some(problem.code.to_string());
                return Err(Refusal::new(400, problem.message));
            }
            Ok(_) => {}
            Err(Early::Gone) => return Ok(Answer::Gone),
            Err(Early::Refused(refusal)) => return Err(refusal),
        }
        entry.prompt_tokens = wanted.prompts.iter().map(|wish| wish.ids.len()).sum();
        match wanted.stream {
            true => Ok(self.stream(connection, head, &wanted, &frame, &mut pieces, entry).unwrap_or(Answer::Gone)),
            false => self.whole(connection, &wanted, &frame, &mut pieces, entry),
        }
    }

    fn submit(&self, wanted: &Wanted) -> Result<Pieces, Refusal> {
        let mut asks = Vec::new();
        for Wish { ids, sampling } in &wanted.prompts {
            // A completion is a function of prompt, seed and its number among those of the prompt.
            asks.extend((0..wanted.n as u64).map(|sample| Ask {
                ids: ids.clone(),
                stream: sample,
                sampling: sampling.clone(),
                top_logprobs: wanted.logprobs.unwrap_or(0),
            }));
        }
        let (to, receiver) = mpsc::channel();
        let waiting = Waiting(Arc::default());
        let job = Job { asks, to, gone: waiting.0.clone() };
        self.jobs.send(job).map_err(|_| stopping())?;
        Ok(Pieces { receiver, looked: Instant::now(), _waiting: waiting })
    }

    fn whole(
        &self,
        connection: &Connection,
        wanted: &Wanted,
        frame: &Frame,
        pieces: &mut Pieces,
        entry: &mut Entry,
    ) -> Result<Answer, Refusal> {
        let mut choices = self.choices(wanted);
        let mut left = choices.len();
        while left > 0 {
            match pieces.next(self, connection) {
                Ok(Piece::Token { choice, id, logprob, top }) => {
                    choices[choice].token(self.service, id, logprob, top);
                }
                Ok(Piece::End { choice, completion }) => {
                    entry.completion_tokens += completion.ids.len();
                    choices[choice].end(&completion.text, completion.finish);
                    choices[choice].text = completion.text;
                    left -= 1;
                }
                Ok(Piece::Failed(problem)) => {
                    entry.problem = Some(problem.code.to_string());
                    return Err(Refusal::new(500, problem.message));
                }
                Ok(Piece::Begun | Piece::Refused(_)) => {}
                Err(Early::Gone) => return Ok(Answer::Gone),
                Err(Early::Refused(refusal)) => return Err(refusal),
            }
        }
        let usage = Usage { prompt: entry.prompt_tokens, completion: entry.completion_tokens };
        let finished = choices.iter_mut().enumerate().map(|(index, choice)| {
            let told = choice.due();
            frame.choice(index, &choice.text, told.as_deref(), choice.finish.unwrap_or(Finish::Length))
        });
        Ok(Answer::Reply(json_reply(200, &frame.whole(finished.collect(), usage))))
    }

    fn stream(
        &self,
        connection: &mut Connection,
        head: &Head,
        wanted: &Wanted,
        frame: &Frame,
        pieces: &mut Pieces,
        entry: &mut Entry,
    ) -> Result<Answer, Gone> {
        let within = wanted.usage.then_some(None);
        connection.begin(head, "text/event-stream; charset=utf-8")?;
        let mut choices = self.choices(wanted);
        for index in 0..choices.len() {
            if let Some(role) = frame.role(index) {
                event(connection, head, &frame.part(vec![role], within))?;
            }
        }
        let mut left = choices.len();
        while left > 0 {
            let (index, finish) = match pieces.next(self, connection) {
                Ok(Piece::Token { choice, id, logprob, top }) => {
                    choices[choice].token(self.service, id, logprob, top);
                    (choice, None)
                }
                Ok(Piece::End { choice, completion }) => {
                    entry.completion_tokens += completion.ids.len();
                    choices[choice].end(&completion.text, completion.finish);
                    left -= 1;
                    (choice, Some(completion.finish))
                }
                Ok(Piece::Begun | Piece::Refused(_)) => continue,
                Ok(Piece::Failed(problem)) => {
                    entry.problem = Some(problem.code.to_string());
                    event(connection, head, &Refusal::new(500, problem.message).json())?;
                    return Ok(Answer::Streamed(connection.end(head)));
                }
                Err(Early::Gone) => return Ok(Answer::Gone),
                Err(Early::Refused(refusal)) => {
                    entry.problem = refusal.code.map(String::from);
                    event(connection, head, &refusal.json())?;
                    return Ok(Answer::Streamed(connection.end(head)));
                }
            };
            let choice = &mut choices[index];
            let (text, told) = (std::mem::take(&mut choice.text), choice.due());
            let new = !text.is_empty() || told.as_ref().is_some_and(|told| !told.is_empty());
            // The end is a part of its own, as OpenAI's is.
            if new {
                event(connection, head, &frame.part(vec![frame.delta(index, &text, told.as_deref(), None)], within))?;
            }
            if finish.is_some() {
                event(connection, head, &frame.part(vec![frame.delta(index, "", None, finish)], within))?;
            }
        }
        if wanted.usage {
            let usage = Usage { prompt: entry.prompt_tokens, completion: entry.completion_tokens };
            event(connection, head, &frame.part(Vec::new(), Some(Some(usage))))?;
        }
        connection.part(head, b"data: [DONE]\n\n")?;
        Ok(Answer::Streamed(connection.end(head)))
    }

    fn choices<'w>(&self, wanted: &'w Wanted) -> Vec<Choice<'w>> {
        let early = self.service.tokenizer.is_byte_level();
        let choice = |wish: &'w Wish| Choice {
            shown: Shown::new(&wish.sampling.stop, early),
            ends: &wish.sampling.stop_ids,
            text: String::new(),
            told: wanted.logprobs.map(|_| Vec::new()),
            finish: None,
        };
        wanted.prompts.iter().flat_map(|wish| (0..wanted.n).map(move |_| choice(wish))).collect()
    }
}

fn event(connection: &mut Connection, head: &Head, value: &Value) -> Result<(), Gone> {
    connection.part(head, format!("data: {value}\n\n").as_bytes())
}

/// The pieces of a job as they come.
struct Pieces {
    receiver: Receiver<Piece>,
    looked: Instant,
    _waiting: Waiting,
}

impl Pieces {
    fn next(&mut self, shared: &Shared, connection: &Connection) -> Result<Piece, Early> {
        loop {
            if self.looked.elapsed() >= LOOK {
                self.looked = Instant::now();
                if shared.cut.load(Ordering::Relaxed) {
                    return Err(Early::Refused(stopping()));
                }
                if !connection.is_alive() {
                    return Err(Early::Gone);
                }
            }
            match self.receiver.recv_timeout(LOOK) {
                Ok(piece) => return Ok(piece),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(Early::Refused(stopping())),
            }
        }
    }
}

/// A completion on its way out.
struct Choice<'w> {
    shown: Shown<'w>,
    /// Ids that end it and are not shown.
    ends: &'w [u32],
    /// Shown, and not sent yet.
    text: String,
    /// Tokens whose text was not sent yet; `None` if nobody wants them.
    told: Option<Vec<Told>>,
    finish: Option<Finish>,
}

impl Choice<'_> {
    fn token(&mut self, service: &Service, id: u32, logprob: f32, top: Vec<(u32, f32)>) {
        if self.ends.contains(&id) {
            return;
        }
        let bytes = service.tokenizer.bytes(id);
        let place = self.shown.place(&bytes);
        self.text += &self.shown.push(&bytes);
        if let Some(told) = &mut self.told {
            let top = top.into_iter().map(|(id, logprob)| (service.tokenizer.bytes(id), logprob)).collect();
            told.push(Told { bytes, logprob, top, place });
        }
    }

    fn end(&mut self, text: &str, finish: Finish) {
        self.text += &self.shown.end(text);
        self.finish = Some(finish);
    }

    /// The tokens that belong to what is shown by now. Those behind a stop text never do.
    fn due(&mut self) -> Option<Vec<Told>> {
        let sent = self.shown.sent();
        let told = self.told.as_mut()?;
        let due = told.iter().position(|told| told.place.0 >= sent).unwrap_or(told.len());
        Some(told.drain(..due).collect())
    }
}

impl Entry {
    fn new(what: &'static str) -> Entry {
        Entry {
            what,
            status: 0,
            prompt_tokens: 0,
            completion_tokens: 0,
            seconds: 0.0,
            streamed: false,
            cancelled: false,
            problem: None,
        }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
