//! What bytes are: BLAKE3 digests, and the one byte encoding by which structured values enter one.

use std::fmt;
use std::io;
use std::path::Path;
use std::str::FromStr;

/// A BLAKE3 digest of content. Shown as 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Of bytes in memory.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(*blake3::hash(bytes).as_bytes())
    }

    /// Reads the file once, memory-mapped when large. Returns its digest and size in bytes.
    pub fn of_file(path: &Path) -> io::Result<(Digest, u64)> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_mmap(path)?;
        Ok((Digest(*hasher.finalize().as_bytes()), hasher.count()))
    }

    /// Reads to the end. For files that others may cut short meanwhile, which would kill a process
    /// that has them mapped. Returns the digest and the number of bytes.
    pub fn of_reader(reader: &mut impl io::Read) -> io::Result<(Digest, u64)> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(reader)?;
        Ok((Digest(*hasher.finalize().as_bytes()), hasher.count()))
    }

    /// All 32 bytes of it.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// All 64 hex digits, lower case.
    pub fn hex(&self) -> String {
        self.to_string()
    }

    /// The first twelve hex digits, for people.
    pub fn short(&self) -> String {
        self.hex()[..12].to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", self.short())
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Digest, String> {
        blake3::Hash::from_hex(text)
            .map(|hash| Digest(*hash.as_bytes()))
            .map_err(|error| format!("`{text}` is not a digest: {error}"))
    }
}

/// Digest of a sequence of fields: a type tag, then each field as its length (u64, little endian)
/// and its bytes, so that no two different sequences encode alike.
pub struct Encoder(blake3::Hasher);

impl Encoder {
    /// Begins with the tag, which says what kind of value follows.
    pub fn new(tag: &str) -> Encoder {
        let mut encoder = Encoder(blake3::Hasher::new());
        encoder.field(tag.as_bytes());
        encoder
    }

    /// Adds one field; returns itself, so that calls chain.
    pub fn field(&mut self, bytes: &[u8]) -> &mut Encoder {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// The digest of all fields so far; more may follow.
    pub fn finish(&self) -> Digest {
        Digest(*self.0.finalize().as_bytes())
    }
}
