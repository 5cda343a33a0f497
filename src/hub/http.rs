//! Requests to the hub: what may be tried again, where the token goes, how a file arrives.

use super::cache::{Repo, is_commit, make_folder};
use super::source::{RepoKind, Source};
use crate::problem::Problem;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use ureq::http::{HeaderMap, Response};
use ureq::{Agent, Body};

/// Why something did not come. `Hub::explain` has the words.
pub(super) enum Failure {
    Gated,
    NoRepo,
    NoRevision,
    NoEntry,
    Status(u16),
    /// Not the answer of a hub.
    Answer(String),
    Corrupt,
    Unreachable(String),
    Stopped,
    /// The cache folder's fault.
    Problem(Box<Problem>),
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Failure {
        Failure::Problem(Box::new(problem))
    }
}

/// A file of a commit, as the hub lists it.
pub(super) struct Listed {
    pub(super) name: String,
    pub(super) size: Option<u64>,
    /// SHA-256 of a large file, git's id of a small one.
    etag: Option<String>,
}

pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<Listed>,
}

/// A request that is worth another try, and when the server wants it.
struct Again {
    why: String,
    after: Option<Duration>,
}

enum Outcome {
    Again(Again),
    Failed(Failure),
}

impl<T: Into<Failure>> From<T> for Outcome {
    fn from(failure: T) -> Outcome {
        Outcome::Failed(failure.into())
    }
}

const LONGEST_WAIT: Duration = Duration::from_secs(60);
const REDIRECTS: usize = 10;

pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    tries: u32,
    first_wait: Duration,
}

impl Client {
    pub(super) fn new(endpoint: &str, token: Option<String>, tries: u32, first_wait: Duration) -> Client {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            // Redirects are followed here, so that the token stays with its host.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("pipe/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .build()
            .into();
        Client { agent, endpoint: endpoint.into(), token, tries: tries.max(1), first_wait }
    }

    /// The commit of a revision and all its files.
    pub(super) fn listing(&self, source: &Source, stop: &AtomicBool) -> Result<Listing, Failure> {
        let kind = if source.kind == RepoKind::Dataset { "datasets" } else { "models" };
        let url =
            format!("{}/api/{kind}/{}/revision/{}?blobs=true", self.endpoint, source.repo, escaped(&source.revision));
        let value: Value = self.patiently(stop, &mut || {
            let mut response = self.send("GET", &url, 0)?;
            response.body_mut().with_config().limit(64 << 20).read_json().map_err(|error| match error {
                ureq::Error::Json(error) => Outcome::Failed(Failure::Answer(error.to_string())),
                other => Outcome::Again(Again { why: other.to_string(), after: None }),
            })
        })?;
        let commit =
            value["sha"].as_str().filter(|sha| is_commit(sha)).ok_or(Failure::Answer("it names no commit".into()))?;
        let files = value["siblings"].as_array().ok_or(Failure::Answer("it lists no files".into()))?;
        let files = files.iter().filter_map(|file| {
            let large = &file["lfs"];
            Some(Listed {
                name: file["rfilename"].as_str()?.to_string(),
                size: large["size"].as_u64().or_else(|| file["size"].as_u64()),
                etag: large["sha256"].as_str().or_else(|| file["blobId"].as_str()).map(String::from),
            })
        });
        Ok(Listing { commit: commit.to_string(), files: files.collect() })
    }

    /// Brings a file into the cache. Other processes that want the same blob wait for this one.
    pub(super) fn download(
        &self,
        source: &Source,
        commit: &str,
        file: &Listed,
        repo: &Repo,
        report: &mut dyn FnMut(u64),
        stop: &AtomicBool,
    ) -> Result<(), Failure> {
        let url = format!("{}/{}/resolve/{commit}/{}", self.endpoint, place(source), escaped(&file.name));
        let etag = match &file.etag {
            Some(etag) => etag.clone(),
            None => self.patiently(stop, &mut || etag_of(self.send("HEAD", &url, 0)?.headers()))?,
        };
        if etag.is_empty() || !etag.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')) {
            return Err(Failure::Answer("a file has no usable ETag".into()));
        }
        let lock = repo.lock_file(&etag)?;
        wait_for(&lock, stop)?;
        let whole =
            std::fs::metadata(repo.blob(&etag)).is_ok_and(|data| file.size.is_none_or(|size| size == data.len()));
        if !whole {
            self.bring(&url, &etag, file.size, repo, report, stop)?;
        }
        repo.link(commit, &file.name, &etag)?;
        Ok(())
    }

    /// Streams a file into `ETAG.incomplete`, continuing what is there, checks it and gives it its name.
    fn bring(
        &self,
        url: &str,
        etag: &str,
        size: Option<u64>,
        repo: &Repo,
        report: &mut dyn FnMut(u64),
        stop: &AtomicBool,
    ) -> Result<(), Failure> {
        let path = repo.incomplete(etag);
        make_folder(&path)?;
        // Only what can be checked afterwards is continued; small files come again as a whole.
        let checked = etag.len() == 64;
        for _ in 0..2 {
            if !checked {
                remove(&path)?;
            }
            let mut hasher = Sha256::new();
            let mut done = hash_file(&path, &mut hasher)?;
            if size.is_some_and(|size| done > size) {
                remove(&path)?;
                (hasher, done) = (Sha256::new(), 0);
            }
            report(done);
            let mut arrival = Arrival { path: &path, hasher, done, size };
            if size != Some(done) || done == 0 {
                let mut best = done;
                let mut fruitless = 0;
                while let Err(again) = self.receive(url, &mut arrival, report, stop) {
                    let again = match again {
                        Outcome::Failed(failure) => return Err(failure),
                        Outcome::Again(again) => again,
                    };
                    // A connection that keeps breaking but brings something each time is not given up.
                    fruitless = if arrival.done > best { 1 } else { fruitless + 1 };
                    best = best.max(arrival.done);
                    if fruitless >= self.tries {
                        return Err(Failure::Unreachable(again.why));
                    }
                    self.pause(fruitless, again.after, stop)?;
                }
            }
            let sum: String = arrival.hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            if !checked || sum == etag.to_lowercase() {
                repo.publish(etag)?;
                return Ok(());
            }
            remove(&path)?;
        }
        Err(Failure::Corrupt)
    }

    /// One request for the rest of a file.
    fn receive(
        &self,
        url: &str,
        arrival: &mut Arrival,
        report: &mut dyn FnMut(u64),
        stop: &AtomicBool,
    ) -> Result<(), Outcome> {
        let mut response = match self.send("GET", url, arrival.done) {
            // Nothing of the file lies behind what is there, so what is there is not its beginning.
            Err(Outcome::Failed(Failure::Status(416))) if arrival.done > 0 => {
                arrival.restart()?;
                self.send("GET", url, 0)?
            }
            other => other?,
        };
        if arrival.done > 0 && (response.status() != 206 || range_start(response.headers()) != Some(arrival.done)) {
            // The server sends another part than the one asked for: begin again, with what it sends if that is all.
            arrival.restart()?;
            if response.status() != 200 {
                response = self.send("GET", url, 0)?;
            }
        }
        let announced: Option<u64> = text(response.headers(), "content-length").and_then(|length| length.parse().ok());
        let expected = arrival.size.or(announced.map(|length| arrival.done + length));
        let broken = |error: &io::Error| Outcome::Again(Again { why: error.to_string(), after: None });
        let mut file = arrival.open()?;
        let mut body = response.into_body().into_with_config().limit(u64::MAX).reader();
        let mut buffer = vec![0; 1 << 18];
        loop {
            if stop.load(Ordering::Relaxed) {
                return Err(Outcome::Failed(Failure::Stopped));
            }
            let read = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(broken(&error)),
            };
            arrival.write(&mut file, &buffer[..read])?;
            report(arrival.done);
        }
        match expected {
            Some(expected) if arrival.done < expected => {
                Err(broken(&io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended early")))
            }
            Some(expected) if arrival.done > expected => {
                arrival.restart()?;
                Err(broken(&io::Error::new(io::ErrorKind::InvalidData, "more bytes came than the file has")))
            }
            _ => Ok(()),
        }
    }

    /// Sends a request, follows redirects, and sorts the answer: usable, worth another try, or final.
    /// `from`: the first byte wanted.
    fn send(&self, method: &str, url: &str, from: u64) -> Result<Response<Body>, Outcome> {
        let mut url = url.to_string();
        for _ in 0..REDIRECTS {
            let mut request =
                ureq::http::Request::builder().method(method).uri(&url).header("accept-encoding", "identity");
            if from > 0 {
                request = request.header("range", format!("bytes={from}-"));
            }
            if let Some(token) = self.token.as_ref().filter(|_| same_host(&url, &self.endpoint)) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            // The error would quote the header: a token with a line end in it must not be shown.
            let request =
                request.body(()).map_err(|_| Failure::Answer("an address or the token is malformed".into()))?;
            let response = self.agent.run(request).map_err(|error| Again { why: error.to_string(), after: None })?;
            let status = response.status().as_u16();
            if (200..300).contains(&status) {
                return Ok(response);
            }
            if !matches!(status, 301 | 302 | 303 | 307 | 308) {
                return Err(refusal(status, response.headers()));
            }
            if method == "HEAD" && text(response.headers(), "x-linked-etag").is_some() {
                return Ok(response);
            }
            let target = text(response.headers(), "location").and_then(|location| absolute(&url, location));
            url = target.ok_or(Failure::Answer("a redirect leads nowhere".into()))?;
            if self.endpoint.starts_with("https://") && !url.starts_with("https://") {
                return Err(Failure::Answer("a redirect leaves https".into()).into());
            }
        }
        Err(Failure::Answer("too many redirects".into()).into())
    }

    /// Runs a request until it works, fails for good, or has been tried often enough.
    fn patiently<T>(&self, stop: &AtomicBool, request: &mut dyn FnMut() -> Result<T, Outcome>) -> Result<T, Failure> {
        let mut tried = 0;
        loop {
            match request() {
                Ok(value) => return Ok(value),
                Err(Outcome::Failed(failure)) => return Err(failure),
                Err(Outcome::Again(again)) => {
                    tried += 1;
                    if tried >= self.tries {
                        return Err(Failure::Unreachable(again.why));
                    }
                    self.pause(tried, again.after, stop)?;
                }
            }
        }
    }

    /// Waits as long as the server asks, or twice as long as the last time.
    fn pause(&self, tried: u32, after: Option<Duration>, stop: &AtomicBool) -> Result<(), Failure> {
        let doubled = self.first_wait.saturating_mul(1 << tried.saturating_sub(1).min(16));
        let end = Instant::now() + after.unwrap_or(doubled).min(LONGEST_WAIT);
        loop {
            if stop.load(Ordering::Relaxed) {
                return Err(Failure::Stopped);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(100)));
        }
    }
}

impl From<Again> for Outcome {
    fn from(again: Again) -> Outcome {
        Outcome::Again(again)
    }
}

/// The bytes of a file that have come.
struct Arrival<'a> {
    path: &'a Path,
    hasher: Sha256,
    done: u64,
    size: Option<u64>,
}

impl Arrival<'_> {
    fn open(&self) -> Result<File, Problem> {
        File::options()
            .create(true)
            .append(true)
            .open(self.path)
            .map_err(|error| Problem::io("hub::cache", "open", self.path, &error))
    }

    fn write(&mut self, file: &mut File, bytes: &[u8]) -> Result<(), Problem> {
        file.write_all(bytes).map_err(|error| Problem::io("hub::cache", "write", self.path, &error))?;
        self.hasher.update(bytes);
        self.done += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> Result<(), Problem> {
        remove(self.path)?;
        self.hasher = Sha256::new();
        self.done = 0;
        Ok(())
    }
}

fn remove(path: &Path) -> Result<(), Problem> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Problem::io("hub::cache", "remove", path, &error)),
        _ => Ok(()),
    }
}

/// Feeds what is there to the hasher; its length. Zero if there is no file.
fn hash_file(path: &Path, hasher: &mut Sha256) -> Result<u64, Problem> {
    let failed = |error: io::Error| Problem::io("hub::cache", "read", path, &error);
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(failed(error)),
    };
    let (mut buffer, mut length) = (vec![0; 1 << 18], 0);
    loop {
        let read = file.read(&mut buffer).map_err(failed)?;
        if read == 0 {
            return Ok(length);
        }
        hasher.update(&buffer[..read]);
        length += read as u64;
    }
}

/// Takes the lock, looking at `stop` while another process has it. Released when the file is closed.
fn wait_for(lock: &File, stop: &AtomicBool) -> Result<(), Failure> {
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if stop.load(Ordering::Relaxed) => return Err(Failure::Stopped),
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(50)),
            Err(TryLockError::Error(error)) => {
                return Err(Problem::new("hub::cache", format!("the cache cannot be locked: {error}")).into());
            }
        }
    }
}

fn refusal(status: u16, headers: &HeaderMap) -> Outcome {
    let failure = match (status, text(headers, "x-error-code")) {
        (_, Some("GatedRepo")) => Failure::Gated,
        (_, Some("RepoNotFound" | "DisabledRepo")) => Failure::NoRepo,
        (_, Some("RevisionNotFound")) => Failure::NoRevision,
        (_, Some("EntryNotFound")) => Failure::NoEntry,
        (401 | 404, _) => Failure::NoRepo,
        (403, _) => Failure::Gated,
        (408 | 425 | 429 | 500..=599, _) => {
            let after = text(headers, "retry-after").and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
            return Outcome::Again(Again { why: format!("it answered {status}"), after });
        }
        _ => Failure::Status(status),
    };
    Outcome::Failed(failure)
}

fn etag_of(headers: &HeaderMap) -> Result<String, Outcome> {
    let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
    let etag = etag.ok_or(Failure::Answer("a file has no ETag".into()))?;
    Ok(etag.trim_start_matches("W/").trim_matches('"').to_string())
}

fn range_start(headers: &HeaderMap) -> Option<u64> {
    text(headers, "content-range")?.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// Where a repository is below the endpoint.
pub(super) fn place(source: &Source) -> String {
    if source.kind == RepoKind::Dataset { format!("datasets/{}", source.repo) } else { source.repo.clone() }
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
    &url[..end]
}

fn same_host(url: &str, endpoint: &str) -> bool {
    origin(url).eq_ignore_ascii_case(origin(endpoint))
}

fn absolute(base: &str, location: &str) -> Option<String> {
    if location.starts_with("http://") || location.starts_with("https://") {
        Some(location.to_string())
    } else if location.starts_with('/') && !location.starts_with("//") {
        Some(format!("{}{location}", origin(base)))
    } else {
        None
    }
}

/// A path with everything escaped that an address does not take as it is.
fn escaped(path: &str) -> String {
    let mut text = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~' | b'/') {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_belongs_to_one_scheme_host_and_port() {
        let hub = "https://huggingface.co";
        assert!(same_host("https://HuggingFace.co/a/b?x=1", hub));
        for other in [
            "http://huggingface.co/a",
            "https://huggingface.co:444/a",
            "https://huggingface.co.evil.org/a",
            "https://evil.org/huggingface.co",
            "https://huggingface.co@evil.org/",
        ] {
            assert!(!same_host(other, hub), "{other}");
        }
    }

    #[test]
    fn addresses_are_escaped_and_redirects_resolved() {
        assert_eq!(escaped("a b/ü#?.json"), "a%20b/%C3%BC%23%3F.json");
        assert_eq!(absolute("https://h.co/a/b", "/c").as_deref(), Some("https://h.co/c"));
        assert_eq!(absolute("https://h.co/a/b", "//evil.org/c"), None);
        assert_eq!(absolute("https://h.co/a/b", "c"), None);
    }
}
