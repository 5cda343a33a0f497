//! One connection: requests in, replies out, HTTP/1.1 and 1.0. `httparse` reads the heads; here are the bounds: how
//! large and how slow a request may be, and what happens to a connection that asks for more.

use super::refusal::Refusal;
use super::service::Bounds;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Longest request line and headers together.
const HEAD_BYTES: usize = 32 << 10;
const HEADERS: usize = 64;
/// Longest line with the size of a chunk, and all trailers.
const CHUNK_LINE: usize = 4 << 10;
/// Between two looks at whether the server is to stop.
const SLICE: Duration = Duration::from_millis(100);
/// A refused client may go on sending for so long, and so much, before the connection is cut.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 8 << 20;

/// What stands before a body.
pub(super) struct Head {
    pub method: String,
    /// Without query.
    pub path: String,
    pub bearer: Option<String>,
    /// In lower case and without parameters.
    pub content_type: Option<String>,
    /// HTTP/1.0.
    pub old: bool,
    /// The client wants to ask more on this connection.
    keep: bool,
    /// It waits for a word before it sends the body.
    expects: bool,
    length: Length,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Length {
    Bytes(usize),
    Chunked,
}

impl Head {
    pub fn has_body(&self) -> bool {
        self.length != Length::Bytes(0)
    }

    fn is_head(&self) -> bool {
        self.method == "HEAD"
    }
}

/// What all requests together may hold of memory.
pub(super) struct Purse {
    pub left: AtomicUsize,
}

/// A body, given back to the purse when it is dropped.
pub(super) struct Body<'p> {
    pub bytes: Vec<u8>,
    purse: &'p Purse,
    taken: usize,
}

impl<'p> Body<'p> {
    fn new(purse: &'p Purse) -> Body<'p> {
        Body { bytes: Vec::new(), purse, taken: 0 }
    }

    fn take(&mut self, bytes: usize) -> Result<(), Refusal> {
        let less = |left: usize| left.checked_sub(bytes);
        match self.purse.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) {
            Ok(_) => {
                self.taken += bytes;
                Ok(())
            }
            Err(_) => Err(Refusal::busy("too many large requests at once")),
        }
    }
}

impl Drop for Body<'_> {
    fn drop(&mut self) {
        self.purse.left.fetch_add(self.taken, Ordering::Relaxed);
    }
}

/// What is answered.
pub(super) struct Reply {
    pub status: u16,
    pub content_type: &'static str,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
}

pub(super) struct Connection<'a> {
    stream: TcpStream,
    /// What came and was not looked at yet.
    buffer: Vec<u8>,
    bounds: &'a Bounds,
    stopping: &'a AtomicBool,
}

enum Filled {
    Some,
    /// The other end is gone, or nothing is to be waited for.
    End,
    Late,
}

impl<'a> Connection<'a> {
    pub fn new(stream: TcpStream, bounds: &'a Bounds, stopping: &'a AtomicBool) -> Option<Connection<'a>> {
        stream.set_nonblocking(false).ok()?;
        stream.set_nodelay(true).ok()?;
        Some(Connection { stream, buffer: Vec::new(), bounds, stopping })
    }

    /// The next request; none if the client wants nothing more, or the server is to stop.
    pub fn head(&mut self, first: bool) -> Result<Option<Head>, Refusal> {
        let patience = if first { self.bounds.head_time } else { self.bounds.idle_time };
        let until = Instant::now() + patience;
        while self.buffer.is_empty() {
            if !matches!(self.fill(until, true), Filled::Some) {
                return Ok(None);
            }
        }
        let until = Instant::now() + self.bounds.head_time;
        loop {
            if let Some((head, length)) = read_head(&self.buffer)? {
                self.buffer.drain(..length);
                return Ok(Some(head));
            }
            if self.buffer.len() >= HEAD_BYTES {
                return Err(Refusal::new(431, format!("the headers are longer than {HEAD_BYTES} bytes")));
            }
            match self.fill(until, false) {
                Filled::Some => {}
                Filled::End => return Ok(None),
                Filled::Late => return Err(Refusal::new(408, "the request took too long to arrive")),
            }
        }
    }

    /// The body that belongs to a head. After an `Err` the rest of it may still be on its way: [`Connection::close`].
    pub fn body<'p>(&mut self, head: &Head, purse: &'p Purse) -> Result<Body<'p>, Refusal> {
        let mut body = Body::new(purse);
        let too_long = || Refusal::new(413, format!("the body is longer than {} bytes", self.bounds.body_bytes));
        if let Length::Bytes(length) = head.length {
            if length > self.bounds.body_bytes {
                return Err(too_long());
            }
            body.take(length)?;
        }
        if head.expects && self.buffer.is_empty() {
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n").map_err(|_| gone())?;
        }
        let until = Instant::now() + self.bounds.body_time;
        match head.length {
            Length::Bytes(length) => {
                while self.buffer.len() < length {
                    self.more(until)?;
                }
                body.bytes = self.buffer.drain(..length).collect();
            }
            Length::Chunked => self.chunks(&mut body, until)?,
        }
        Ok(body)
    }

    fn chunks(&mut self, body: &mut Body, until: Instant) -> Result<(), Refusal> {
        let broken = || Refusal::new(400, "the chunks of the body are not as HTTP has them");
        // Where in the buffer the next chunk begins: what is read is taken out once per look at the socket.
        let mut at = 0;
        loop {
            match httparse::parse_chunk_size(&self.buffer[at..]).map_err(|_| broken())? {
                httparse::Status::Complete((line, size)) => {
                    let size = usize::try_from(size).unwrap_or(usize::MAX);
                    if size > self.bounds.body_bytes - body.bytes.len() {
                        let bound = self.bounds.body_bytes;
                        return Err(Refusal::new(413, format!("the body is longer than {bound} bytes")));
                    }
                    at += line;
                    if size == 0 {
                        self.buffer.drain(..at);
                        return self.trailers(until);
                    }
                    body.take(size)?;
                    while self.buffer.len() < at + size + 2 {
                        self.buffer.drain(..at);
                        at = 0;
                        self.more(until)?;
                    }
                    body.bytes.extend_from_slice(&self.buffer[at..at + size]);
                    if &self.buffer[at + size..at + size + 2] != b"\r\n" {
                        return Err(broken());
                    }
                    at += size + 2;
                }
                httparse::Status::Partial if self.buffer.len() - at > CHUNK_LINE => return Err(broken()),
                httparse::Status::Partial => {
                    self.buffer.drain(..at);
                    at = 0;
                    self.more(until)?;
                }
            }
        }
    }

    /// What may follow the last chunk: read and passed over.
    fn trailers(&mut self, until: Instant) -> Result<(), Refusal> {
        let mut total = 0;
        loop {
            match self.buffer.iter().position(|byte| *byte == b'\n') {
                Some(end) => {
                    let last = matches!(&self.buffer[..end], [] | [b'\r']);
                    total += end + 1;
                    self.buffer.drain(..=end);
                    if last {
                        return Ok(());
                    }
                }
                None => self.more(until)?,
            }
            if total.max(self.buffer.len()) > HEAD_BYTES {
                return Err(Refusal::new(431, "the trailers are too long"));
            }
        }
    }

    fn more(&mut self, until: Instant) -> Result<(), Refusal> {
        match self.fill(until, false) {
            Filled::Some => Ok(()),
            Filled::End => Err(gone()),
            Filled::Late => Err(Refusal::new(408, "the body took too long to arrive")),
        }
    }

    /// Waits for bytes. `idle`: not if the server is to stop.
    fn fill(&mut self, until: Instant, idle: bool) -> Filled {
        let mut bytes = [0; 16 << 10];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Filled::Late;
            }
            if idle && self.stopping.load(Ordering::Relaxed) {
                return Filled::End;
            }
            if self.stream.set_read_timeout(Some(left.clamp(Duration::from_millis(1), SLICE))).is_err() {
                return Filled::End;
            }
            match self.stream.read(&mut bytes) {
                Ok(0) => return Filled::End,
                Ok(read) => {
                    self.buffer.extend_from_slice(&bytes[..read]);
                    return Filled::Some;
                }
                Err(error) if waits(error.kind()) => {}
                Err(_) => return Filled::End,
            }
        }
    }

    /// Whether the client is still there to be answered. One that has closed its own side counts as gone.
    pub fn is_alive(&self) -> bool {
        if self.stream.set_nonblocking(true).is_err() {
            return false;
        }
        let peeked = self.stream.peek(&mut [0]);
        self.stream.set_nonblocking(false).is_ok()
            && match peeked {
                Ok(length) => length > 0,
                Err(error) => waits(error.kind()),
            }
    }

    /// Writes a reply. Whether another request may follow on the connection.
    pub fn respond(&mut self, head: Option<&Head>, reply: &Reply, may_keep: bool) -> bool {
        let keep = may_keep && head.is_some_and(|head| head.keep) && !self.stopping.load(Ordering::Relaxed);
        let mut bytes = opening(reply.status, reply.content_type, &reply.headers, keep);
        bytes.extend_from_slice(format!("Content-Length: {}\r\n\r\n", reply.body.len()).as_bytes());
        if !head.is_some_and(Head::is_head) {
            bytes.extend_from_slice(&reply.body);
        }
        let written = self.write(&bytes);
        if !keep {
            self.close();
        }
        keep && written.is_ok()
    }

    /// Begins a reply of which the length is not known yet.
    pub fn begin(&mut self, head: &Head, content_type: &'static str) -> Result<(), Gone> {
        let keep = head.keep && !head.old && !self.stopping.load(Ordering::Relaxed);
        let mut headers = vec![("Cache-Control", "no-cache".to_string()), ("X-Accel-Buffering", "no".to_string())];
        if !head.old {
            headers.push(("Transfer-Encoding", "chunked".to_string()));
        }
        let mut bytes = opening(200, content_type, &headers, keep);
        bytes.extend_from_slice(b"\r\n");
        self.write(&bytes)
    }

    pub fn part(&mut self, head: &Head, part: &[u8]) -> Result<(), Gone> {
        match head.old {
            true => self.write(part),
            false => self.write(&[format!("{:x}\r\n", part.len()).as_bytes(), part, b"\r\n"].concat()),
        }
    }

    /// Ends such a reply. Whether another request may follow.
    pub fn end(&mut self, head: &Head) -> bool {
        let written = if head.old { Ok(()) } else { self.write(b"0\r\n\r\n") };
        written.is_ok() && head.keep && !head.old && !self.stopping.load(Ordering::Relaxed)
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<(), Gone> {
        let until = Instant::now() + self.bounds.write_time;
        while !bytes.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Gone);
            }
            self.stream.set_write_timeout(Some(left.max(Duration::from_millis(1)))).map_err(|_| Gone)?;
            match self.stream.write(bytes) {
                Ok(0) => return Err(Gone),
                Ok(written) => bytes = &bytes[written..],
                Err(error) if waits(error.kind()) => {}
                Err(_) => return Err(Gone),
            }
        }
        Ok(())
    }

    /// Ends the connection so that what was written is read: a socket closed over unread bytes is reset, and the
    /// reply with it.
    pub fn close(&mut self) {
        let until = Instant::now() + LINGER;
        let mut passed = 0;
        self.buffer.clear();
        let _ = self.stream.shutdown(Shutdown::Write);
        while passed < LINGER_BYTES && matches!(self.fill(until, true), Filled::Some) {
            passed += self.buffer.len();
            self.buffer.clear();
        }
    }
}

/// The client does not read any more.
pub(super) struct Gone;

/// Nobody reads this one.
fn gone() -> Refusal {
    Refusal::new(400, "the body ended before its end")
}

fn waits(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

fn opening(status: u16, content_type: &str, headers: &[(&'static str, String)], keep: bool) -> Vec<u8> {
    let connection = if keep { "keep-alive" } else { "close" };
    let mut text = format!(
        "HTTP/1.1 {status} {}\r\nServer: pipe\r\nContent-Type: {content_type}\r\nConnection: {connection}\r\n",
        reason(status)
    );
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    text.into_bytes()
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        417 => "Expectation Failed",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Internal Server Error",
    }
}

/// A head and its length, once it is whole.
fn read_head(bytes: &[u8]) -> Result<Option<(Head, usize)>, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(Refusal::new(431, format!("there are more than {HEADERS} headers")));
        }
        Err(httparse::Error::Version) => return Err(Refusal::new(505, "HTTP/1.1 and HTTP/1.0 are spoken here")),
        Err(error) => return Err(Refusal::new(400, format!("this is not HTTP: {error}"))),
    };
    let old = request.version == Some(0);
    let mut head = Head {
        method: request.method.unwrap_or_default().to_string(),
        path: path_of(request.path.unwrap_or_default()),
        bearer: None,
        content_type: None,
        old,
        keep: !old,
        expects: false,
        length: Length::Bytes(0),
    };
    let mut lengths = Vec::new();
    let mut chunked = false;
    for header in request.headers.iter() {
        // A value that is not UTF-8 is none of those that are read here, or a wrong one.
        let value = String::from_utf8_lossy(header.value);
        let value = value.trim();
        match header.name.to_ascii_lowercase().as_str() {
            "content-length" => lengths.push(value.to_string()),
            "transfer-encoding" if value.eq_ignore_ascii_case("chunked") && !chunked && !old => chunked = true,
            "transfer-encoding" => {
                return Err(Refusal::new(501, "of the transfer encodings, `chunked` alone is understood"));
            }
            "connection" => {
                for word in value.split(',').map(|word| word.trim().to_ascii_lowercase()) {
                    match word.as_str() {
                        "close" => head.keep = false,
                        "keep-alive" => head.keep = true,
                        _ => {}
                    }
                }
            }
            "expect" if value.eq_ignore_ascii_case("100-continue") => head.expects = !old,
            "expect" => return Err(Refusal::new(417, "of what may be expected, `100-continue` alone is understood")),
            "authorization" => {
                let (scheme, key) = value.split_once(' ').unwrap_or((value, ""));
                if scheme.eq_ignore_ascii_case("bearer") {
                    head.bearer = Some(key.trim().to_string());
                }
            }
            "content-type" => {
                head.content_type = Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase());
            }
            _ => {}
        }
    }
    // Two lengths that differ, or a length and chunks: whoever stands between may have believed the other one.
    if lengths.windows(2).any(|pair| pair[0] != pair[1]) || (chunked && !lengths.is_empty()) {
        return Err(Refusal::new(400, "the request says twice how long it is"));
    }
    if let Some(text) = lengths.first() {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        match (digits, text.parse()) {
            (true, Ok(length)) => head.length = Length::Bytes(length),
            // More digits than a length can have.
            (true, Err(_)) => head.length = Length::Bytes(usize::MAX),
            (false, _) => return Err(Refusal::new(400, "`Content-Length` is no number")),
        }
    }
    if chunked {
        head.length = Length::Chunked;
    }
    Ok(Some((head, length)))
}

/// RFC 3986: a letter, then letters, digits, `+`, `-` and `.`.
fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'))
}

/// `/v1/models/a b` of `/v1/models/a%20b?x` and of `http://host/v1/models/a%20b?x`; `*` of `*` (RFC 9112, 3.2).
fn path_of(target: &str) -> String {
    let path = match target.find([':', '/', '?', '#']) {
        // Absolute form: only where a scheme comes first.
        Some(at) if target[at..].starts_with("://") && is_scheme(&target[..at]) => {
            let rest = &target[at + 3..];
            rest.find(['/', '?', '#']).map_or("/", |at| if rest[at..].starts_with('/') { &rest[at..] } else { "/" })
        }
        _ => target,
    };
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let [first, after @ ..] = rest {
        let hex = |digit: &u8| char::from(*digit).to_digit(16);
        match after {
            [high, low, more @ ..] if *first == b'%' && hex(high).is_some() && hex(low).is_some() => {
                bytes.push((hex(high).unwrap_or(0) * 16 + hex(low).unwrap_or(0)) as u8);
                rest = more;
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Result<Option<(Head, usize)>, u16> {
        read_head(text.as_bytes()).map_err(|refusal| refusal.status)
    }

    #[test]
    fn a_head_is_read_with_what_is_used_of_it() {
        let text = "POST /v1/models/a%5Bb%5d%zz?key=1 HTTP/1.1\r\nAUTHORIZATION: bearer  k \r\n\
            content-type: Application/JSON; charset=utf-8\r\nContent-Length: 3\r\n\r\nabc";
        let (head, length) = head(text).unwrap().unwrap();
        assert_eq!((head.method.as_str(), head.path.as_str()), ("POST", "/v1/models/a[b]%zz"));
        assert_eq!((head.bearer.as_deref(), head.content_type.as_deref()), (Some("k"), Some("application/json")));
        assert!(head.keep && !head.old && !head.expects && head.length == Length::Bytes(3));
        assert_eq!(&text[length..], "abc");
    }

    #[test]
    fn a_target_is_a_path_or_begins_with_a_scheme() {
        let cases = [
            ("/v1/models?u=http://a/b", "/v1/models"),
            ("/v1/models#http://a/b", "/v1/models"),
            ("/http://a/b", "/http://a/b"),
            ("/a:b/c://d", "/a:b/c://d"),
            ("http://host:1/v1/x?y", "/v1/x"),
            ("HTTPS://host/v1/x?u=http://a/b", "/v1/x"),
            ("http://host", "/"),
            ("http://host?u=/a/b", "/"),
            ("*", "*"),
            ("://host/v1", "://host/v1"),
            ("1a://host/v1", "1a://host/v1"),
        ];
        for (target, path) in cases {
            assert_eq!(path_of(target), path, "{target}");
        }
    }

    #[test]
    fn a_head_is_whole_or_not_yet_there() {
        let text = "GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n";
        for end in 0..text.len() {
            assert!(head(&text[..end]).unwrap().is_none(), "{end}");
        }
        let (head, _) = head(text).unwrap().unwrap();
        assert!(head.old && head.keep && !head.has_body());
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_not_read() {
        for (lines, status) in [
            ("Content-Length: 1\r\nContent-Length: 2\r\n", 400),
            ("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", 400),
            ("Content-Length: +1\r\n", 400),
            ("Content-Length: \r\n", 400),
            ("Transfer-Encoding: gzip, chunked\r\n", 501),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 501),
            ("Expect: a miracle\r\n", 417),
            ("Bad header\r\n", 400),
            (&"A: b\r\n".repeat(65), 431),
        ] {
            assert_eq!(head(&format!("POST / HTTP/1.1\r\n{lines}\r\n")).err(), Some(status), "{lines}");
        }
        assert_eq!(head("PRI * HTTP/2.0\r\n\r\n").err(), Some(505));
        assert_eq!(head("\u{16}\u{3}\u{1}\0\u{1}").err(), Some(400));
    }
}
