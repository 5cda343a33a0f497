//! What is known about a finished stage: its artifact, and how it came to be.
//!
//! A record is one JSON file, `stages/ab/<fingerprint>.json`, written once and never changed. It
//! carries a checksum over itself, so that a record with flipped bytes is told from one that says
//! something else.

use crate::digest::{Digest, Encoder};
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

/// One file of an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Relative, `/`-separated.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// Of its bytes.
    pub digest: Digest,
}

/// An immutable set of named files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// In name order.
    pub entries: Vec<Entry>,
    /// Over the sorted (name, size, digest) list; what enters the fingerprints of others.
    pub digest: Digest,
}

impl Artifact {
    /// Of these files, in any order.
    pub fn new(mut entries: Vec<Entry>) -> Artifact {
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let mut encoder = Encoder::new("pipe artifact 1");
        for entry in &entries {
            encoder.field(entry.name.as_bytes());
            encoder.field(&entry.size.to_le_bytes());
            encoder.field(entry.digest.as_bytes());
        }
        let digest = encoder.finish();
        Artifact { entries, digest }
    }

    /// In bytes, all files together.
    pub fn size(&self) -> u64 {
        self.entries.iter().fold(0, |sum, entry| sum.saturating_add(entry.size))
    }
}

/// An artifact that entered a stage, for the record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Used {
    /// Label of the cell that made it.
    pub cell: String,
    /// What it would compute.
    pub fingerprint: Digest,
    /// The digest of what it came to.
    pub artifact: Digest,
}

/// Where and how long. CPU time and memory are those of the whole process while the stage ran:
/// with `--jobs 1` they are the stage's own.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Measured {
    /// UTC, RFC 3339.
    pub started: String,
    /// UTC, RFC 3339.
    pub ended: String,
    /// How long the stage took, in seconds.
    pub wall_s: f64,
    /// Processor time of the whole process meanwhile, in seconds.
    pub process_cpu_s: f64,
    /// `VmHWM`; absent where the system does not tell.
    pub process_peak_memory_bytes: Option<u64>,
}

/// A finished stage. Everything but `artifact` is provenance: it explains, and decides nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// What was computed, as a digest of `parts`.
    pub fingerprint: Digest,
    /// `sft[size=7B]` when it was made.
    pub cell: String,
    /// The name of the stage's kind.
    pub kind: String,
    /// The fingerprint's named parts with their values.
    pub parts: BTreeMap<String, String>,
    /// Resolved parameters, those that cannot change the result included.
    pub params: Map<String, Value>,
    /// By slot.
    pub inputs: BTreeMap<String, Vec<Used>>,
    /// By key: what a `path:` or `hf:` came to.
    pub sources: BTreeMap<String, String>,
    /// What came of it.
    pub artifact: Artifact,
    /// `pipe 0.1.0`.
    pub tool: String,
    /// Host, system, processor.
    pub machine: BTreeMap<String, String>,
    /// The run that made it.
    pub run: String,
    /// When, and what it took.
    pub measured: Measured,
    /// What the stage wanted known after the run.
    pub warnings: Vec<String>,
}

/// Number of the record's layout, in each record.
const FORMAT: u64 = 1;

impl Record {
    /// Pretty JSON, a newline at the end.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut body = self.body();
        let check = checksum(&body);
        body.insert("checksum".into(), check.into());
        // A map of strings, numbers and arrays always serialises.
        let mut bytes = serde_json::to_vec_pretty(&body).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    /// The record as an object, for `pipe show --json`.
    pub fn body(&self) -> Map<String, Value> {
        let used = |used: &Used| json!({"cell": used.cell, "fingerprint": used.fingerprint.to_string(), "artifact": used.artifact.to_string()});
        let inputs: Map<String, Value> =
            self.inputs.iter().map(|(slot, all)| (slot.clone(), all.iter().map(used).collect())).collect();
        let files: Vec<Value> = self
            .artifact
            .entries
            .iter()
            .map(|e| json!({"name": e.name, "size": e.size, "digest": e.digest.to_string()}))
            .collect();
        let body = json!({
            "format": FORMAT,
            "fingerprint": self.fingerprint.to_string(),
            "cell": self.cell,
            "kind": self.kind,
            "artifact": {"digest": self.artifact.digest.to_string(), "files": files},
            "parts": self.parts,
            "params": self.params,
            "inputs": inputs,
            "sources": self.sources,
            "tool": self.tool,
            "machine": self.machine,
            "run": self.run,
            "started": self.measured.started,
            "ended": self.measured.ended,
            "wall_s": self.measured.wall_s,
            "process_cpu_s": self.measured.process_cpu_s,
            "process_peak_memory_bytes": self.measured.process_peak_memory_bytes,
            "warnings": self.warnings,
        });
        match body {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }

    /// `Err` says what is wrong with the bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Record, String> {
        let mut body: Map<String, Value> = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        let said = body.shift_remove("checksum");
        if said.as_ref().and_then(Value::as_str) != Some(checksum(&body).as_str()) {
            return Err("its checksum does not fit its content".into());
        }
        Record::read(&body).ok_or_else(|| "a field is absent or of the wrong type".into())
    }

    fn read(body: &Map<String, Value>) -> Option<Record> {
        if body.get("format")?.as_u64()? != FORMAT {
            return None;
        }
        let text = |key: &str| Some(body.get(key)?.as_str()?.to_string());
        let texts = |key: &str| -> Option<BTreeMap<String, String>> {
            body.get(key)?.as_object()?.iter().map(|(k, v)| Some((k.clone(), v.as_str()?.to_string()))).collect()
        };
        let entry = |file: &Value| {
            Some(Entry {
                name: file.get("name")?.as_str()?.to_string(),
                size: file.get("size")?.as_u64()?,
                digest: file.get("digest")?.as_str()?.parse().ok()?,
            })
        };
        let files = body.get("artifact")?.get("files")?.as_array()?;
        let artifact = Artifact::new(files.iter().map(entry).collect::<Option<_>>()?);
        if body.get("artifact")?.get("digest")?.as_str()? != artifact.digest.to_string() {
            return None;
        }
        let used = |used: &Value| {
            Some(Used {
                cell: used.get("cell")?.as_str()?.to_string(),
                fingerprint: used.get("fingerprint")?.as_str()?.parse().ok()?,
                artifact: used.get("artifact")?.as_str()?.parse().ok()?,
            })
        };
        let inputs = body.get("inputs")?.as_object()?.iter();
        Some(Record {
            fingerprint: text("fingerprint")?.parse().ok()?,
            cell: text("cell")?,
            kind: text("kind")?,
            parts: texts("parts")?,
            params: body.get("params")?.as_object()?.clone(),
            inputs: inputs
                .map(|(slot, all)| Some((slot.clone(), all.as_array()?.iter().map(used).collect::<Option<_>>()?)))
                .collect::<Option<_>>()?,
            sources: texts("sources")?,
            artifact,
            tool: text("tool")?,
            machine: texts("machine")?,
            run: text("run")?,
            measured: Measured {
                started: text("started")?,
                ended: text("ended")?,
                wall_s: body.get("wall_s")?.as_f64()?,
                process_cpu_s: body.get("process_cpu_s")?.as_f64()?,
                process_peak_memory_bytes: body.get("process_peak_memory_bytes")?.as_u64(),
            },
            warnings: body
                .get("warnings")?
                .as_array()?
                .iter()
                .map(|w| Some(w.as_str()?.to_string()))
                .collect::<Option<_>>()?,
        })
    }
}

fn checksum(body: &Map<String, Value>) -> String {
    Digest::of(serde_json::to_string(body).unwrap_or_default().as_bytes()).to_string()
}

/// `2026-11-23T12:14:15Z`.
pub fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let seconds = i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    seconds.unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let at = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_709_251_199), "2024-02-29T23:59:59Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    fn record() -> Record {
        let entry = |name: &str| Entry { name: name.into(), size: 3, digest: Digest::of(name.as_bytes()) };
        Record {
            fingerprint: Digest::of(b"f"),
            cell: "sft[size=7B]".into(),
            kind: "sft".into(),
            parts: [("spec.learning_rate".to_string(), "0.0003".to_string())].into(),
            params: json!({"learning_rate": 3e-4, "lora": {"rank": 16}}).as_object().cloned().unwrap_or_default(),
            inputs: [(
                "model".to_string(),
                vec![Used { cell: "base[size=7B]".into(), fingerprint: Digest::of(b"b"), artifact: Digest::of(b"a") }],
            )]
            .into(),
            sources: BTreeMap::new(),
            artifact: Artifact::new(vec![entry("z"), entry("a/b")]),
            tool: "pipe 0".into(),
            machine: [("host".to_string(), "h".to_string())].into(),
            run: "r".into(),
            measured: Measured { wall_s: 0.1 + 0.2, process_cpu_s: 1e-9, ..Measured::default() },
            warnings: vec!["3 rows dropped".into()],
        }
    }

    #[test]
    fn a_record_reads_back_as_it_was_written() {
        assert_eq!(Record::from_bytes(&record().to_bytes()).as_ref(), Ok(&record()));
    }

    #[test]
    fn no_single_flipped_bit_of_a_record_goes_unseen() {
        let bytes = record().to_bytes();
        for at in 0..bytes.len() {
            let mut bent = bytes.clone();
            bent[at] ^= 1;
            // Blanks between tokens are not content: such a flip either fails to parse or changes nothing.
            if let Ok(read) = Record::from_bytes(&bent) {
                assert_eq!(read, record(), "byte {at}");
            }
        }
    }

    #[test]
    fn an_artifact_is_known_by_names_sizes_and_bytes_in_any_order() {
        let entry =
            |name: &str, bytes: &[u8]| Entry { name: name.into(), size: bytes.len() as u64, digest: Digest::of(bytes) };
        let one = Artifact::new(vec![entry("a", b"x"), entry("b", b"y")]);
        assert_eq!(one.digest, Artifact::new(vec![entry("b", b"y"), entry("a", b"x")]).digest);
        assert!(one.digest != Artifact::new(vec![entry("a", b"y"), entry("b", b"x")]).digest);
        assert!(one.digest != Artifact::new(vec![entry("a", b"x")]).digest);
    }
}
