//! Paid replies, kept: one file of JSON lines per model, appended to and synced before a reply counts.
//!
//! A line holds the request's key, the host that answered, the request's `max_tokens` and the raw body; all else
//! is read from the body again. Lines are never changed. A torn line (a kill, a full disk) is one that
//! does not read: the next writer ends it, every reader passes over it. Several processes append under
//! a lock on the file and see each other's lines.

use super::lock::lock;
use super::replies::Replies;
use super::reply::{self, Completion, Finish, Read, TOKENS_MAX};
use crate::digest::Digest;
use crate::problem::Problem;
use serde::Deserialize;
use serde_json::json;
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

pub(super) struct Journal {
    path: PathBuf,
    index: Mutex<Index>,
    pending: Mutex<Pending>,
    /// The number of the last line that is synced; held while lines are written.
    synced: Mutex<u64>,
}

#[derive(Default)]
struct Index {
    /// Bytes of the file that were read.
    read: u64,
    by_key: HashMap<String, Vec<Place>>,
    paid: HashMap<String, Paid>,
    replies: HashMap<String, Replies>,
}

#[derive(Clone, Copy)]
struct Place {
    start: u64,
    length: usize,
    max_tokens: u64,
    cut: bool,
}

/// Tokens of the replies of a host.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Paid {
    pub prompt: u64,
    pub completion: u64,
}

/// Lines that wait to be written, and the number of the last one.
#[derive(Default)]
struct Pending {
    text: String,
    last: u64,
}

#[derive(Deserialize)]
struct Kept<'a> {
    key: &'a str,
    #[serde(borrow)]
    host: Cow<'a, str>,
    max_tokens: u64,
    /// The most tokens the prompt can have had, for replies that do not say.
    prompt_bound: u64,
    #[serde(borrow)]
    body: Cow<'a, str>,
}

/// A reply to be kept.
pub(super) struct Entry<'a> {
    pub key: &'a str,
    pub host: &'a str,
    pub max_tokens: u64,
    pub prompt_bound: u64,
    pub body: &'a str,
}

impl Journal {
    pub fn new(folder: &Path, model: &str) -> Journal {
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
        let name: String = model.chars().map(plain).take(60).collect();
        let name = format!("{}-{}.jsonl", name.trim_start_matches('.'), &Digest::of(model.as_bytes()).hex()[..8]);
        Journal {
            path: folder.join(name),
            index: Mutex::default(),
            pending: Mutex::default(),
            synced: Mutex::default(),
        }
    }

    /// Whether a reply is there that answers a request with this limit: one that was not cut, or was
    /// cut by no smaller limit.
    pub fn has(&self, key: &str, max_tokens: u64) -> bool {
        self.place(key, max_tokens).is_some()
    }

    pub fn get(&self, key: &str, max_tokens: u64) -> Result<Option<Completion>, Problem> {
        let Some(place) = self.place(key, max_tokens) else { return Ok(None) };
        let mut bytes = vec![0; place.length];
        let read = File::open(&self.path).and_then(|file| file.read_exact_at(&mut bytes, place.start));
        read.map_err(|error| Problem::io("remote::journal", "read", &self.path, &error))?;
        let line = serde_json::from_slice::<Kept>(&bytes).ok().filter(|line| line.key == key);
        match line.map(|line| reply::read(&line.body)) {
            Some(Read::Completion(completion)) => Ok(Some(completion)),
            _ => {
                let message = format!("`{}` changed while it was read", self.path.display());
                Err(Problem::new("remote::journal", message).help("run again"))
            }
        }
    }

    fn place(&self, key: &str, max_tokens: u64) -> Option<Place> {
        let index = lock(&self.index);
        let places = index.by_key.get(key)?.iter();
        // The first that was not cut; else the longest.
        let usable = places.filter(|place| !place.cut || place.max_tokens >= max_tokens);
        let longest = |place: &Place| if place.cut { u64::MAX - place.max_tokens } else { 0 };
        usable.min_by_key(|place| (place.cut, longest(place), place.start)).copied()
    }

    pub fn paid(&self, host: &str) -> Paid {
        lock(&self.index).paid.get(host).copied().unwrap_or_default()
    }

    /// What the replies of a host were like.
    pub fn replies(&self, host: &str) -> Replies {
        lock(&self.index).replies.get(host).copied().unwrap_or_default()
    }

    /// Takes in what was appended since the last time, by whomever.
    pub fn refresh(&self) -> Result<(), Problem> {
        let failed = |error: std::io::Error| Problem::io("remote::journal", "read", &self.path, &error);
        let mut index = lock(&self.index);
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                *index = Index::default();
                return Ok(());
            }
            Err(error) => return Err(failed(error)),
        };
        let length = file.metadata().map_err(failed)?.len();
        if length < index.read {
            // Somebody threw it away, and another has begun.
            *index = Index::default();
        }
        if length == index.read {
            return Ok(());
        }
        file.seek(SeekFrom::Start(index.read)).map_err(failed)?;
        let mut reader = BufReader::with_capacity(1 << 16, file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(failed)?;
            // A line without its end may still be on its way.
            if read == 0 || line.last() != Some(&b'\n') {
                return Ok(());
            }
            index.take(&line);
            index.read += read as u64;
        }
    }

    /// Appends a reply; returns when it is on the disk. Those that come while others are written are
    /// written together.
    pub fn add(&self, entry: &Entry) -> Result<(), Problem> {
        let line = json!({
            "key": entry.key, "host": entry.host, "max_tokens": entry.max_tokens,
            "prompt_bound": entry.prompt_bound, "body": entry.body,
        });
        let mine = {
            let mut pending = lock(&self.pending);
            pending.text += &format!("{line}\n");
            pending.last += 1;
            pending.last
        };
        let mut synced = lock(&self.synced);
        if *synced >= mine {
            return Ok(());
        }
        let (text, last) = {
            let mut pending = lock(&self.pending);
            (std::mem::take(&mut pending.text), pending.last)
        };
        if let Err(problem) = self.write(text.as_bytes()) {
            // Paid for: whoever comes next tries again.
            lock(&self.pending).text.insert_str(0, &text);
            return Err(problem);
        }
        *synced = last;
        // Before any of those who wait for these lines goes on and looks for its own.
        self.refresh()
    }

    fn write(&self, lines: &[u8]) -> Result<(), Problem> {
        let failed = |doing: &str, error: std::io::Error| {
            let full = matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
            let problem = Problem::io("remote::journal", doing, &self.path, &error);
            if full {
                problem.help("free some space and run again: replies that are in the journal are kept")
            } else {
                problem
            }
        };
        if let Some(folder) = self.path.parent() {
            std::fs::create_dir_all(folder).map_err(|error| failed("create", error))?;
        }
        let new = !self.path.exists();
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&self.path)
            .map_err(|error| failed("open", error))?;
        let mut write = || {
            file.lock()?;
            let length = file.metadata()?.len();
            let mut end = [b'\n'];
            if length > 0 {
                file.read_exact_at(&mut end, length - 1)?;
            }
            // Ends the line that a kill has torn.
            if end != *b"\n" {
                file.write_all(b"\n")?;
            }
            file.write_all(lines)?;
            file.sync_data()?;
            if new && let Some(folder) = self.path.parent() {
                File::open(folder)?.sync_all()?;
            }
            file.unlock()
        };
        write().map_err(|error| failed("write", error))
    }
}

impl Index {
    fn take(&mut self, bytes: &[u8]) {
        let Ok(line) = serde_json::from_slice::<Kept>(bytes) else { return };
        let Read::Completion(completion) = reply::read(&line.body) else { return };
        let (prompt, made) = match completion.usage {
            Some(usage) => (usage.prompt_tokens, usage.completion_tokens),
            // Not told, so what it can have been at most.
            None => (line.prompt_bound.min(TOKENS_MAX), line.max_tokens.min(TOKENS_MAX)),
        };
        self.replies.entry(line.host.to_string()).or_default().add(line.prompt_bound.min(TOKENS_MAX), &completion);
        let paid = self.paid.entry(line.host.into_owned()).or_default();
        paid.prompt += prompt;
        paid.completion += made;
        let cut = completion.finish == Finish::Length;
        let place = Place { start: self.read, length: bytes.len(), max_tokens: line.max_tokens, cut };
        self.by_key.entry(line.key.to_string()).or_default().push(place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(text: &str, finish: &str) -> String {
        json!({"choices": [{"message": {"content": text}, "finish_reason": finish}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5}})
        .to_string()
    }

    fn add(journal: &Journal, key: &str, max_tokens: u64, body: &str) {
        journal.add(&Entry { key, host: "h", max_tokens, prompt_bound: 99, body }).unwrap();
    }

    fn text(journal: &Journal, key: &str, max_tokens: u64) -> Option<String> {
        journal.get(key, max_tokens).unwrap().map(|completion| completion.answer)
    }

    #[test]
    fn a_cut_reply_answers_no_longer_request_and_a_whole_one_any() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::new(folder.path(), "deep/model:1");
        add(&journal, "a", 10, &body("short", "length"));
        add(&journal, "b", 10, &body("whole", "stop"));
        assert_eq!(text(&journal, "a", 10).as_deref(), Some("short"));
        assert_eq!(text(&journal, "a", 5).as_deref(), Some("short"));
        assert!(!journal.has("a", 11));
        assert_eq!(text(&journal, "b", 1000).as_deref(), Some("whole"));
        add(&journal, "a", 20, &body("longer", "length"));
        assert_eq!(text(&journal, "a", 10).as_deref(), Some("longer"));
        add(&journal, "a", 30, &body("all of it", "stop"));
        assert_eq!(text(&journal, "a", 10).as_deref(), Some("all of it"));
        assert_eq!(journal.paid("h"), Paid { prompt: 40, completion: 20 });
        assert_eq!(journal.paid("elsewhere"), Paid::default());
    }

    /// Found by `fuzz/`: another whole reply, asked for under a larger limit, took its place.
    #[test]
    fn the_first_whole_reply_stays_the_one() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::new(folder.path(), "m");
        add(&journal, "a", 3, &body("first", "stop"));
        add(&journal, "a", 5, &body("second", "stop"));
        assert_eq!(text(&journal, "a", 5).as_deref(), Some("first"));
    }

    #[test]
    fn two_writers_see_each_other_and_a_torn_line_costs_only_itself() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (Journal::new(folder.path(), "m"), Journal::new(folder.path(), "m"));
        add(&one, "a", 10, &body("first", "stop"));
        OpenOptions::new().append(true).open(&one.path).unwrap().write_all(b"{\"key\":\"zz\",\"bo").unwrap();
        two.refresh().unwrap();
        assert!(two.has("a", 10) && !two.has("zz", 10));
        add(&two, "b", 10, &body("second", "stop"));
        one.refresh().unwrap();
        assert_eq!(text(&one, "b", 10).as_deref(), Some("second"));
        let fresh = Journal::new(folder.path(), "m");
        fresh.refresh().unwrap();
        assert_eq!((text(&fresh, "a", 1).as_deref(), text(&fresh, "b", 1).as_deref()), (Some("first"), Some("second")));
        std::fs::remove_file(&one.path).unwrap();
        one.refresh().unwrap();
        assert!(!one.has("a", 10));
    }

    #[test]
    fn replies_that_come_together_are_all_kept() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::new(folder.path(), "m");
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let journal = &journal;
                scope.spawn(move || {
                    for i in 0..20 {
                        add(journal, &format!("{thread}-{i}"), 10, &body(&format!("{thread} {i}"), "stop"));
                    }
                });
            }
        });
        let fresh = Journal::new(folder.path(), "m");
        fresh.refresh().unwrap();
        for thread in 0..8 {
            for i in 0..20 {
                assert_eq!(text(&fresh, &format!("{thread}-{i}"), 10), Some(format!("{thread} {i}")));
            }
        }
    }
}
