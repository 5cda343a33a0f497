//! What the fuzz targets share: how one input becomes several files, where they lie, what every refusal
//! has to look like, and the seeds from which mutation starts.

pub mod seeds;

use pipe::files::Files;
use pipe::problem::Problem;
use std::borrow::Cow;
use std::panic;
use std::path::Path;

/// What a target does before its first input. Parallel work is done where it is asked for: one thread, the
/// same coverage each time, and no waiting for others.
pub fn start(target: &str) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread();
    pool.build_global().expect("nothing has run in parallel yet");
    seeds::plant(target);
}

/// Stands between the parts of an input. Text, so that a reproducer can be read and written by hand.
pub const CUT: &[u8] = b"\n%%%\n";

/// The parts of an input; the last takes what is left, those that are not there are empty.
pub fn parts<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut parts: [&[u8]; N] = [&[]; N];
    let mut rest = input;
    for (i, part) in parts.iter_mut().enumerate() {
        let cut = rest.windows(CUT.len()).position(|window| window == CUT);
        match cut.filter(|_| i + 1 < N) {
            Some(at) => (*part, rest) = (&rest[..at], &rest[at + CUT.len()..]),
            None => {
                *part = rest;
                break;
            }
        }
    }
    parts
}

/// The opposite of [`parts`].
pub fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.join(CUT)
}

/// A part as text; bytes that are not UTF-8 are replaced.
pub fn text(part: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(part)
}

/// A folder of its own for one input, removed with it.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Folder {
        Folder(tempfile::tempdir().expect("a temporary folder can be made"))
    }

    /// A folder with these files.
    pub fn with(files: &[(&str, &[u8])]) -> Folder {
        let folder = Folder::new();
        files.iter().for_each(|(name, bytes)| folder.put(name, bytes));
        folder
    }

    /// Writes a file, folders above it included.
    pub fn put(&self, name: &str, bytes: &[u8]) {
        let path = self.path().join(name);
        let made = std::fs::create_dir_all(path.parent().unwrap_or(self.path()));
        made.and_then(|()| std::fs::write(&path, bytes)).expect("the temporary folder can be written");
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path().join(name)).unwrap_or_default()
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn files(&self) -> Files {
        Files::from_dir(self.path()).expect("the temporary folder can be listed")
    }
}

impl Default for Folder {
    fn default() -> Folder {
        Folder::new()
    }
}

/// What every refusal keeps: a code with an area, words, and a length somebody can read.
pub fn check(problem: &Problem) {
    let (area, name) = problem.code.split_once("::").expect("a code is area::name");
    assert!(!area.is_empty() && !name.is_empty() && !problem.message.is_empty(), "{problem}");
    assert!(problem.notes.len() <= 1_000 && problem.help.len() <= 1_000, "{}", problem.code);
    let _ = problem.to_string();
}

/// The value, or nothing after a look at the refusal.
pub fn taken<T>(result: Result<T, Problem>) -> Option<T> {
    result.inspect_err(check).ok()
}

/// For work that is to catch panics of a library by itself: the fuzzer's hook would end the process before
/// anything can be caught. What is not caught still ends it, with the message of the panic.
pub fn quietly<T>(work: impl FnOnce() -> T) -> T {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let made = panic::catch_unwind(panic::AssertUnwindSafe(work));
    panic::set_hook(hook);
    made.unwrap_or_else(|payload| {
        let said = payload.downcast_ref::<String>().map(String::as_str);
        panic!("not contained: {}", said.or(payload.downcast_ref::<&str>().copied()).unwrap_or("?"))
    })
}

/// Bytes to which data of a made-up safetensors file is filled up.
const DATA_LIMIT: u64 = 1 << 20;

/// A safetensors file: the part as it stands, or, where it begins with `{`, a header (one line) and data.
/// The length is put in front, and the data is repeated to what the header claims, so that mutations
/// of the header are not all lost in a wrong length.
pub fn safetensors(part: &[u8]) -> Cow<'_, [u8]> {
    if !part.starts_with(b"{") {
        return part.into();
    }
    let (header, data) = split_line(part);
    let claimed = serde_json::from_slice::<serde_json::Value>(header).unwrap_or_default();
    let ends = claimed.as_object().into_iter().flatten().filter_map(|(_, entry)| entry["data_offsets"][1].as_u64());
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.extend(filled(data, ends.max().unwrap_or(0)));
    file.into()
}

/// `data` repeated to `length` bytes, at most [`DATA_LIMIT`]; zeros where there is nothing to repeat.
pub fn filled(data: &[u8], length: u64) -> Vec<u8> {
    let data = if data.is_empty() { &[0] } else { data };
    data.iter().copied().cycle().take(length.min(DATA_LIMIT) as usize).collect()
}

/// The first line and what follows it.
pub fn split_line(part: &[u8]) -> (&[u8], &[u8]) {
    match part.iter().position(|&byte| byte == b'\n') {
        Some(at) => (&part[..at], &part[at + 1..]),
        None => (part, &[]),
    }
}
