//! A model behind HTTP: over real sockets, with the bundled models, and with clients as bad as they come.

mod answers;
mod clients;
mod program;

use pipe::data::Tokenizer;
use pipe::files::Files;
use pipe::model::{Device, LoadOptions, Model, Placed};
use pipe::serve::{self, Entry, Gauges, Job, Service};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub const MODEL: &str = "mini";

/// A bundled model, with the tokenizer of all of them.
pub fn mini(name: &str) -> (Model, Tokenizer) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines/mini");
    let model = Files::from_dir(&folder.join("models").join(name)).expect("a bundled model");
    let tokenizer = Files::from_dir(&folder.join("tokenizer")).expect("the bundled tokenizer");
    let model = Model::load(&[&model], &LoadOptions::default()).expect("it loads");
    (model, Tokenizer::load(&tokenizer).expect("it loads"))
}

/// A server in this process, stopped when it is dropped.
pub struct Server {
    pub address: SocketAddr,
    pub stop: Arc<AtomicBool>,
    pub log: Arc<Mutex<Vec<Entry>>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// With the smallest of the bundled models.
    pub fn start(change: impl FnOnce(&mut Service)) -> Server {
        Server::of(mini("mini-3B").0, change)
    }

    pub fn of(model: Model, change: impl FnOnce(&mut Service)) -> Server {
        let tokenizer = mini("mini-3B").1;
        let mut service = Service::new(MODEL, "fp_test", tokenizer, &model.config).expect("they belong together");
        change(&mut service);
        Server::run(move |listener, stop, log| {
            let placed = Placed::new(model, &Device::Cpu).expect("the processor");
            serve::serve(listener, &placed, &service, stop, || {}, log).expect("it serves");
        })
    }

    /// With something in the place of the engine.
    pub fn scripted(change: impl FnOnce(&mut Service), engine: impl FnOnce(Receiver<Job>) + Send + 'static) -> Server {
        let (model, tokenizer) = mini("mini-3B");
        let mut service = Service::new(MODEL, "fp_test", tokenizer, &model.config).expect("they belong together");
        change(&mut service);
        Server::run(move |listener, stop, log| {
            let (jobs, asked) = mpsc::channel();
            std::thread::scope(|scope| {
                scope.spawn(|| engine(asked));
                serve::answer(listener, &service, jobs, &Gauges::default(), stop, log);
            });
        })
    }

    fn run(body: impl FnOnce(&TcpListener, &AtomicBool, &(dyn Fn(&Entry) + Sync)) + Send + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let (stop, log) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (stopped, logged) = (stop.clone(), log.clone());
        let thread = std::thread::spawn(move || {
            body(&listener, &stopped, &|entry: &Entry| logged.lock().unwrap().push(entry.clone()));
        });
        Server { address, stop, log, thread: Some(thread) }
    }

    pub fn connect(&self) -> Client {
        Client::to(self.address)
    }

    pub fn get(&self, path: &str) -> Reply {
        self.connect().ask(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"))
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.connect().post(path, body)
    }

    /// A chat with one message of the user.
    pub fn chat(&self, text: &str, more: Value) -> Reply {
        self.post("/v1/chat/completions", &chat(text, more))
    }

    /// A number that `/metrics` tells.
    pub fn metric(&self, name: &str) -> u64 {
        let text = String::from_utf8(self.get("/metrics").body).expect("UTF-8");
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().expect("a number"))
    }

    /// Waits until a number is there.
    pub fn until(&self, name: &str, wanted: u64) {
        let begun = Instant::now();
        while self.metric(name) != wanted {
            assert!(begun.elapsed() < Duration::from_secs(20), "{name} is {}, not {wanted}", self.metric(name));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends it and waits for the end.
    pub fn end(mut self) {
        self.finish();
    }

    fn finish(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the server panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.finish();
    }
}

pub fn with(mut value: Value, more: Value) -> Value {
    value.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    value
}

pub fn chat(text: &str, more: Value) -> Value {
    with(json!({ "model": MODEL, "messages": [{ "role": "user", "content": text }] }), more)
}

pub fn text(prompt: Value, more: Value) -> Value {
    with(json!({ "model": MODEL, "prompt": prompt }), more)
}

/// A connection.
pub struct Client {
    pub stream: TcpStream,
    reader: BufReader<TcpStream>,
}

/// What came back.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }

    /// The error of a refusal, which has OpenAI's shape.
    pub fn error(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        let error = self.json()["error"].clone();
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
        assert!(error["type"].is_string() && error.get("param").is_some() && error.get("code").is_some(), "{error}");
        error
    }

    /// The events of a stream, which ended as it should.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        let text = String::from_utf8(self.body.clone()).expect("UTF-8");
        let mut events: Vec<&str> = text.split_terminator("\n\n").collect();
        assert_eq!(events.pop(), Some("data: [DONE]"), "{text}");
        events.iter().map(|event| serde_json::from_str(event.strip_prefix("data: ").expect("data")).unwrap()).collect()
    }
}

impl Client {
    pub fn to(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.set_nodelay(true).unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        Client { stream, reader }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).expect("sent");
    }

    pub fn ask(&mut self, request: impl AsRef<[u8]>) -> Reply {
        self.send(request);
        self.reply().expect("a reply")
    }

    pub fn post(&mut self, path: &str, body: &Value) -> Reply {
        self.ask(post(path, &body.to_string()))
    }

    /// The next line as it stands; `None` at the end.
    pub fn line(&mut self) -> Option<String> {
        let mut line = Vec::new();
        match self.reader.read_until(b'\n', &mut line) {
            Ok(read) if read > 0 => Some(String::from_utf8(line).expect("UTF-8").trim_end().to_string()),
            _ => None,
        }
    }

    /// Status and headers.
    pub fn opening(&mut self) -> Option<Reply> {
        let status = self.line()?.split(' ').nth(1)?.parse().ok()?;
        let mut headers = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                return Some(Reply { status, headers, body: Vec::new() });
            }
            let (name, value) = line.split_once(": ").expect("a header");
            headers.push((name.to_string(), value.to_string()));
        }
    }

    /// A whole reply; `None` if the connection was closed before its end.
    pub fn reply(&mut self) -> Option<Reply> {
        let mut reply = self.opening()?;
        if let Some(length) = reply.header("content-length") {
            reply.body = vec![0; length.parse().expect("a length")];
            self.reader.read_exact(&mut reply.body).ok()?;
        } else if reply.header("transfer-encoding") == Some("chunked") {
            loop {
                let size = usize::from_str_radix(&self.line()?, 16).expect("a size");
                let mut chunk = vec![0; size + 2];
                self.reader.read_exact(&mut chunk).ok()?;
                assert_eq!(&chunk[size..], b"\r\n");
                reply.body.extend_from_slice(&chunk[..size]);
                if size == 0 {
                    break;
                }
            }
        } else {
            self.reader.read_to_end(&mut reply.body).ok()?;
        }
        Some(reply)
    }

    /// Whether the server has closed the connection.
    pub fn is_closed(&mut self) -> bool {
        self.reader.fill_buf().is_ok_and(<[u8]>::is_empty)
    }
}

pub fn post(path: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}
