//! A small hub on this machine: the two addresses that matter, a second host for large files, and the
//! faults of real networks.

use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What goes wrong with one answer.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// So many bytes of the body, then nothing for a long time.
    Stall(usize),
    /// A status, with headers.
    Status(u16, &'static str),
    /// A byte of the body is another one.
    Flip,
    /// The whole file with status 200, whatever range was asked for.
    IgnoreRange,
    /// The connection ends without an answer.
    Hang,
}

#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
}

#[derive(Default)]
struct State {
    /// Repository (`OWNER/NAME`, `datasets/OWNER/NAME`) to its files.
    repos: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// For requests whose path contains the text, in order.
    faults: VecDeque<(String, Fault)>,
    requests: Vec<Request>,
    /// Whether the listing gives ETags and sizes.
    terse: bool,
}

/// Files of at least so many bytes are "large": they have a SHA-256 and lie on the other host.
pub const LARGE: usize = 1000;
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

#[derive(Clone)]
pub struct Server {
    state: Arc<Mutex<State>>,
    pub endpoint: String,
    /// Where large files are.
    pub store: String,
}

impl Server {
    pub fn start() -> Server {
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [endpoint, store] = [&listeners[0], &listeners[1]].map(|l| format!("http://{}", l.local_addr().unwrap()));
        let server = Server { state: Arc::default(), endpoint, store };
        for listener in listeners {
            let server = server.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let server = server.clone();
                    std::thread::spawn(move || server.answer(&mut stream.unwrap()));
                }
            });
        }
        server
    }

    pub fn put(&self, repo: &str, name: &str, bytes: &[u8]) {
        self.state.lock().unwrap().repos.entry(repo.into()).or_default().insert(name.into(), bytes.to_vec());
    }

    pub fn terse(&self) {
        self.state.lock().unwrap().terse = true;
    }

    /// The next answer to a request whose path contains `path` goes wrong.
    pub fn fault(&self, path: &str, fault: Fault) {
        self.state.lock().unwrap().faults.push_back((path.into(), fault));
    }

    /// Requests since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    pub fn faults_left(&self) -> usize {
        self.state.lock().unwrap().faults.len()
    }

    fn answer(&self, stream: &mut TcpStream) -> Option<()> {
        let request = read(stream)?;
        let (fault, terse) = {
            let mut state = self.state.lock().unwrap();
            state.requests.push(request.clone());
            let at = state.faults.iter().position(|(path, _)| request.path.contains(path));
            (at.and_then(|at| state.faults.remove(at)).map(|(_, fault)| fault), state.terse)
        };
        match fault {
            Some(Fault::Hang) => return None,
            Some(Fault::Status(status, headers)) => return respond(stream, status, headers, b"no", None),
            _ => {}
        }
        let path = request.path.split('?').next().unwrap();
        if let Some(rest) = path.strip_prefix("/api/") {
            let (repo, _) = rest.split_once("/revision/")?;
            let body = self.listing(repo.strip_prefix("models/").unwrap_or(repo), terse);
            return match body {
                Some(body) => respond(stream, 200, "content-type: application/json\r\n", body.as_bytes(), None),
                None => respond(stream, 404, "x-error-code: RepoNotFound\r\n", b"", None),
            };
        }
        let (repo, rest) = path[1..].split_once("/resolve/")?;
        let (_, name) = rest.split_once('/')?;
        let repo = repo.strip_prefix("store/").unwrap_or(repo);
        let Some(bytes) = self.state.lock().unwrap().repos.get(repo).and_then(|files| files.get(name)).cloned() else {
            return respond(stream, 404, "x-error-code: EntryNotFound\r\n", b"", None);
        };
        if bytes.len() >= LARGE && !path.starts_with("/store/") {
            let headers = format!(
                "location: {}/store{path}?signature=SECRET\r\nx-linked-etag: \"{}\"\r\n",
                self.store,
                etag(&bytes)
            );
            return respond(stream, 302, &headers, b"", None);
        }
        let range = request.headers.get("range").filter(|_| !matches!(fault, Some(Fault::IgnoreRange)));
        let start: usize = range.map_or(0, |range| range["bytes=".len()..range.len() - 1].parse().unwrap());
        if start >= bytes.len() && start > 0 {
            return respond(stream, 416, "", b"", None);
        }
        let mut body = bytes[start..].to_vec();
        if matches!(fault, Some(Fault::Flip)) {
            *body.last_mut().unwrap() ^= 1;
        }
        let mut headers = format!("etag: \"{}\"\r\n", etag(&bytes));
        if range.is_some() {
            headers += &format!("content-range: bytes {start}-{}/{}\r\n", bytes.len() - 1, bytes.len());
        }
        if request.method == "HEAD" {
            return respond(stream, 200, &headers, b"", None);
        }
        respond(stream, if range.is_some() { 206 } else { 200 }, &headers, &body, fault)
    }

    fn listing(&self, repo: &str, terse: bool) -> Option<String> {
        let state = self.state.lock().unwrap();
        let files = state.repos.get(repo)?.iter().map(|(name, bytes)| match (terse, bytes.len() >= LARGE) {
            (true, _) => serde_json::json!({"rfilename": name}),
            (false, true) => serde_json::json!({"rfilename": name, "size": bytes.len(), "blobId": "ab".repeat(20),
                "lfs": {"sha256": etag(bytes), "size": bytes.len(), "pointerSize": 130}}),
            (false, false) => serde_json::json!({"rfilename": name, "size": bytes.len(), "blobId": etag(bytes)}),
        });
        Some(serde_json::json!({"sha": COMMIT, "siblings": files.collect::<Vec<_>>()}).to_string())
    }
}

/// SHA-256 of a large file; forty digits for a small one.
pub fn etag(bytes: &[u8]) -> String {
    let sum: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    if bytes.len() >= LARGE { sum } else { sum[..40].to_string() }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_string(), words.next()?.to_string());
    let headers = lines
        .map_while(|line| line.ok().filter(|line| !line.is_empty()))
        .filter_map(|line| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_string())))
        .collect();
    Some(Request { method, path, headers })
}

fn respond(stream: &mut TcpStream, status: u16, headers: &str, body: &[u8], fault: Option<Fault>) -> Option<()> {
    let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n{headers}\r\n", body.len());
    stream.write_all(head.as_bytes()).ok()?;
    match fault {
        Some(Fault::Cut(length)) => stream.write_all(&body[..length.min(body.len())]).ok()?,
        Some(Fault::Stall(length)) => {
            stream.write_all(&body[..length.min(body.len())]).ok()?;
            std::thread::sleep(Duration::from_secs(120));
        }
        _ => stream.write_all(body).ok()?,
    }
    stream.flush().ok()
}
