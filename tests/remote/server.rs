//! An OpenAI-compatible server on this machine, with the faults of real ones, that keeps an account of what
//! it was asked and of what it was paid for.

use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// What goes wrong with one answer to a completion.
#[derive(Clone)]
pub enum Fault {
    /// Status, further headers, body.
    Status(u16, &'static str, &'static str),
    /// This body with status 200.
    Body(Vec<u8>),
    /// A proper reply that ends in the middle, the connection with it.
    Reset,
    /// A byte now and then, for ever.
    Drip,
    /// So many bytes of blanks.
    Huge(usize),
    /// The connection ends without a word.
    Hang,
}

#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub authorization: Option<String>,
    pub body: Value,
    pub at: Instant,
}

/// What a model would say: the text (or a whole message), and how it ends.
pub type Model = Arc<dyn Fn(&Value) -> (Value, &'static str) + Send + Sync>;

struct State {
    model: Model,
    models: Option<Vec<String>>,
    /// Only those with a key may read the list.
    guarded: bool,
    latency: Duration,
    faults: VecDeque<(String, Fault)>,
    seen: Vec<Seen>,
    /// By what was asked (messages, seed), how often a whole reply was sent.
    paid: BTreeMap<String, u32>,
    /// After so many replies nobody gets one.
    hold_after: usize,
    running: usize,
    most_running: usize,
    sent_bytes: u64,
    usage: bool,
}

#[derive(Clone)]
pub struct Server {
    state: Arc<(Mutex<State>, Condvar)>,
    pub url: String,
}

/// Says the question again, with a box.
pub fn echo(body: &Value) -> (Value, &'static str) {
    (json!(format!("You said: {}. \\boxed{{7}}", question(body))), "stop")
}

pub fn question(body: &Value) -> &str {
    let messages = body["messages"].as_array().expect("messages");
    messages.last().expect("a message")["content"].as_str().expect("a text")
}

impl Server {
    pub fn start() -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let state = State {
            model: Arc::new(echo),
            models: Some(vec!["teacher-large".into(), "teacher-small".into(), "other".into()]),
            guarded: false,
            latency: Duration::ZERO,
            faults: VecDeque::new(),
            seen: Vec::new(),
            paid: BTreeMap::new(),
            hold_after: usize::MAX,
            running: 0,
            most_running: 0,
            sent_bytes: 0,
            usage: true,
        };
        let server = Server { state: Arc::new((Mutex::new(state), Condvar::new())), url };
        let accepting = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let server = accepting.clone();
                std::thread::spawn(move || server.connection(stream.unwrap()));
            }
        });
        server
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().unwrap()
    }

    pub fn model(&self, model: impl Fn(&Value) -> (Value, &'static str) + Send + Sync + 'static) {
        self.lock().model = Arc::new(model);
    }

    /// `None`: the server has no list.
    pub fn models(&self, models: Option<&[&str]>) {
        self.lock().models = models.map(|names| names.iter().map(ToString::to_string).collect());
    }

    /// Whether the list of models is for those alone who bring a key.
    pub fn guard_list(&self, guarded: bool) {
        self.lock().guarded = guarded;
    }

    pub fn latency(&self, latency: Duration) {
        self.lock().latency = latency;
    }

    pub fn no_usage(&self) {
        self.lock().usage = false;
    }

    /// The next completion whose question contains `about` goes wrong.
    pub fn fault(&self, about: &str, fault: Fault) {
        self.lock().faults.push_back((about.into(), fault));
    }

    pub fn hold_after(&self, replies: usize) {
        self.lock().hold_after = replies;
        self.state.1.notify_all();
    }

    /// Completions asked for since the last call.
    pub fn asked(&self) -> Vec<Seen> {
        let seen = std::mem::take(&mut self.lock().seen);
        seen.into_iter().filter(|seen| seen.path.ends_with("/chat/completions")).collect()
    }

    /// Everything that was asked since the last call.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.lock().seen)
    }

    pub fn faults_left(&self) -> usize {
        self.lock().faults.len()
    }

    pub fn most_running(&self) -> usize {
        self.lock().most_running
    }

    pub fn sent_bytes(&self) -> u64 {
        self.lock().sent_bytes
    }

    /// How often each thing was paid for.
    pub fn paid(&self) -> BTreeMap<String, u32> {
        self.lock().paid.clone()
    }

    fn connection(&self, mut stream: TcpStream) -> Option<()> {
        stream.set_nodelay(true).ok()?;
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        loop {
            let seen = request(&mut reader)?;
            self.lock().seen.push(seen.clone());
            if seen.path.ends_with("/models") {
                let models = self.lock().models.clone();
                let refused = self.lock().guarded && seen.authorization.is_none();
                match models {
                    _ if refused => self.respond(&mut stream, 401, "", b"{\"error\": \"no key\"}")?,
                    Some(names) => {
                        let ids: Vec<Value> = names.iter().map(|name| json!({"id": name})).collect();
                        self.respond(&mut stream, 200, "", json!({"data": ids}).to_string().as_bytes())?;
                    }
                    None => self.respond(&mut stream, 404, "", b"<html>no</html>")?,
                }
                continue;
            }
            {
                let mut state = self.lock();
                state.running += 1;
                state.most_running = state.most_running.max(state.running);
            }
            let went_on = self.complete(&mut stream, &seen);
            self.lock().running -= 1;
            went_on?;
        }
    }

    fn complete(&self, stream: &mut TcpStream, seen: &Seen) -> Option<()> {
        let (fault, model, latency, usage) = {
            let mut state = self.lock();
            let at = state.faults.iter().position(|(about, _)| question(&seen.body).contains(about));
            let fault = at.and_then(|at| state.faults.remove(at)).map(|(_, fault)| fault);
            (fault, state.model.clone(), state.latency, state.usage)
        };
        std::thread::sleep(latency);
        let (said, finish) = model(&seen.body);
        let message = if said.is_object() { said } else { json!({"role": "assistant", "content": said}) };
        let mut reply = json!({
            "id": "x", "model": format!("{}-2026", seen.body["model"].as_str().unwrap_or("")),
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        });
        if usage {
            reply["usage"] = json!({"prompt_tokens": 20, "completion_tokens": 10});
        }
        let reply = reply.to_string();
        match fault {
            None => {
                let mut state = self.lock();
                while state.paid.values().sum::<u32>() as usize >= state.hold_after {
                    state = self.state.1.wait(state).unwrap();
                }
                let asked = format!("{} {}", question(&seen.body), seen.body["seed"]);
                *state.paid.entry(asked.clone()).or_default() += 1;
                drop(state);
                let answered = self.respond(stream, 200, "", reply.as_bytes());
                // Whoever asked is gone: nothing was delivered, and nothing is charged.
                if answered.is_none() || gone(stream) {
                    *self.lock().paid.get_mut(&asked).unwrap() -= 1;
                    return None;
                }
                answered
            }
            Some(Fault::Status(status, headers, body)) => self.respond(stream, status, headers, body.as_bytes()),
            Some(Fault::Body(body)) => self.respond(stream, 200, "", &body),
            Some(Fault::Hang) => None,
            Some(Fault::Reset) => {
                let head = format!("HTTP/1.1 200 X\r\ncontent-length: {}\r\n\r\n", reply.len());
                stream.write_all(head.as_bytes()).ok()?;
                stream.write_all(&reply.as_bytes()[..reply.len() / 2]).ok()?;
                None
            }
            Some(Fault::Drip) => {
                stream.write_all(b"HTTP/1.1 200 X\r\ncontent-length: 1000000\r\n\r\n").ok()?;
                loop {
                    stream.write_all(b" ").ok()?;
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            Some(Fault::Huge(size)) => {
                let head = format!("HTTP/1.1 200 X\r\ncontent-length: {size}\r\n\r\n");
                stream.write_all(head.as_bytes()).ok()?;
                let blanks = vec![b' '; 1 << 20];
                for _ in 0..size >> 20 {
                    stream.write_all(&blanks).ok()?;
                    self.lock().sent_bytes += blanks.len() as u64;
                }
                None
            }
        }
    }

    fn respond(&self, stream: &mut TcpStream, status: u16, headers: &str, body: &[u8]) -> Option<()> {
        let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n{headers}\r\n", body.len());
        stream.write_all(&[head.as_bytes(), body].concat()).ok()?;
        stream.flush().ok()
    }
}

/// Whether the other end of a connection has closed it.
fn gone(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let peeked = stream.peek(&mut [0]);
    stream.set_nonblocking(false).unwrap();
    match peeked {
        Ok(length) => length == 0,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}

fn request(reader: &mut BufReader<TcpStream>) -> Option<Seen> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
    let path = line.split(' ').nth(1)?.to_string();
    let (mut length, mut authorization) = (0, None);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        match name.to_lowercase().as_str() {
            "content-length" => length = value.parse().ok()?,
            "authorization" => authorization = Some(value.to_string()),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    Some(Seen { path, authorization, body, at: Instant::now() })
}
