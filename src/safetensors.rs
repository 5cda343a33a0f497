//! Safetensors files: a reader that trusts nothing, and a writer whose bytes depend on the tensors alone.
//!
//! Format: <https://github.com/huggingface/safetensors#format>: an 8-byte little-endian header length, a
//! JSON header (name -> dtype, shape, byte range), then the data without holes.
//!
//! Reading is by position (`pread`), a tensor at a time through a small buffer, not by memory map: a file
//! that shrinks while it is read is then an error instead of a dead process, the pages of the file do not
//! count as memory of this process, and no value needs to be aligned. Nothing is allocated from a number
//! in a file before that number has been compared with the file's length.
//!
//! The writer orders names, pads the header so that data starts at a multiple of 64, and streams: one
//! tensor is in memory at a time. (The `safetensors` crate writes its metadata in hash order.)
//!
//! One file, for it is one format: what the reader refuses is what the writer must not write, and the tests hold the one
//! against the other.

use crate::files::Files;
use crate::problem::{Exit, Problem};
use half::{bf16, f16};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The weights of a checkpoint in a single file.
pub const MODEL_FILE: &str = "model.safetensors";
/// The index of a checkpoint in several files: which file holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The weights of an adapter, in one file.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";

/// Upstream refuses longer headers too.
const HEADER_LIMIT: u64 = 100_000_000;
/// Bytes read at once; a multiple of every element size.
const CHUNK: usize = 1 << 20;

/// How the elements of a tensor are stored. Other types may stand in a file but are not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// 32 bits.
    F32,
    /// 16 bits, 10 of them of the fraction.
    F16,
    /// 16 bits, the upper half of an f32.
    Bf16,
    /// A known type that no weight may have; the number is its size in bytes.
    Other(&'static str, usize),
}

impl Element {
    fn named(name: &str) -> Option<Element> {
        Some(match name {
            "F32" => Element::F32,
            "F16" => Element::F16,
            "BF16" => Element::Bf16,
            "F64" => Element::Other("F64", 8),
            "I64" => Element::Other("I64", 8),
            "U64" => Element::Other("U64", 8),
            "I32" => Element::Other("I32", 4),
            "U32" => Element::Other("U32", 4),
            "I16" => Element::Other("I16", 2),
            "U16" => Element::Other("U16", 2),
            "I8" => Element::Other("I8", 1),
            "U8" => Element::Other("U8", 1),
            "BOOL" => Element::Other("BOOL", 1),
            "F8_E4M3" => Element::Other("F8_E4M3", 1),
            "F8_E5M2" => Element::Other("F8_E5M2", 1),
            _ => return None,
        })
    }

    /// As the format spells it, such as `BF16`.
    pub fn name(self) -> &'static str {
        match self {
            Element::F32 => "F32",
            Element::F16 => "F16",
            Element::Bf16 => "BF16",
            Element::Other(name, _) => name,
        }
    }

    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::F16 | Element::Bf16 => 2,
            Element::Other(_, size) => size,
        }
    }

    /// As `config.json` spells it.
    pub fn torch_name(self) -> &'static str {
        match self {
            Element::F32 => "float32",
            Element::F16 => "float16",
            Element::Bf16 => "bfloat16",
            Element::Other(name, _) => name,
        }
    }
}

/// Where one tensor lies.
#[derive(Debug, Clone)]
struct Entry {
    file: usize,
    element: Element,
    shape: Vec<usize>,
    /// From the start of the file.
    offset: u64,
    bytes: u64,
}

/// The tensors of one or several safetensors files, opened and checked, not yet read.
pub struct Tensors {
    files: Vec<(PathBuf, File)>,
    by_name: BTreeMap<String, Entry>,
}

impl Tensors {
    /// The weights of a model folder: `model.safetensors`, or the shards its index names.
    pub fn of_model(files: &Files) -> Result<Tensors, Problem> {
        if let Some(path) = files.get(MODEL_FILE) {
            return Tensors::open(path);
        }
        let Some(index) = files.get(INDEX_FILE) else {
            return Err(Problem::new(
                "model::no_weights",
                format!("a model needs `{MODEL_FILE}` or `{INDEX_FILE}`, and neither is there"),
            )
            .exit(Exit::Missing)
            .note(match files.iter().find(|(name, _)| name.ends_with(".bin") || name.ends_with(".gguf")) {
                Some((other, _)) => format!("`{other}` is there, but only safetensors are read"),
                None => format!("the folder holds {} files", files.len()),
            }));
        };
        let mut tensors = Tensors { files: Vec::new(), by_name: BTreeMap::new() };
        let weight_map = read_index(index)?;
        let mut shards: Vec<&String> = weight_map.values().collect();
        shards.sort();
        shards.dedup();
        for shard in shards {
            let path = files.get(shard).ok_or_else(|| {
                let names = weight_map.iter().filter(|(_, file)| *file == shard).map(|(name, _)| name.as_str());
                Problem::new("model::missing_shard", format!("the index names the shard `{shard}`, which is not there"))
                    .exit(Exit::Missing)
                    .at_file(index)
                    .note(format!("it should hold {}", shorten(names)))
            })?;
            tensors.add(path)?;
        }
        for (name, shard) in &weight_map {
            match tensors.by_name.get(name) {
                Some(entry) if tensors.files[entry.file].0.as_path() == files.get(shard).unwrap_or(Path::new("")) => {}
                _ => {
                    return Err(damaged(
                        index,
                        format!("the index places `{name}` in `{shard}`, which does not hold it"),
                    ));
                }
            }
        }
        Ok(tensors)
    }

    /// One file.
    pub fn open(path: &Path) -> Result<Tensors, Problem> {
        let mut tensors = Tensors { files: Vec::new(), by_name: BTreeMap::new() };
        tensors.add(path)?;
        Ok(tensors)
    }

    fn add(&mut self, path: &Path) -> Result<(), Problem> {
        let file = File::open(path).map_err(|error| Problem::io("model::read", "open", path, &error))?;
        for (name, mut entry) in read_header(path, &file)? {
            entry.file = self.files.len();
            if let Some(first) = self.by_name.insert(name.clone(), entry) {
                return Err(damaged(path, format!("the tensor `{name}` stands in two files"))
                    .note(format!("the other is `{}`", self.files[first.file].0.display())));
            }
        }
        self.files.push((path.to_path_buf(), file));
        Ok(())
    }

    /// In name order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// Its dimensions, slowest first; `None` if there is no such tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.by_name.get(name).map(|entry| entry.shape.as_slice())
    }

    /// How its elements are stored; `None` if there is no such tensor.
    pub fn element(&self, name: &str) -> Option<Element> {
        self.by_name.get(name).map(|entry| entry.element)
    }

    /// The file that holds `name`, or the first one.
    pub fn path(&self, name: &str) -> &Path {
        let at = self.by_name.get(name).map_or(0, |entry| entry.file);
        self.files.get(at).map_or(Path::new(""), |(path, _)| path.as_path())
    }

    fn entry(&self, name: &str, shape: &[usize]) -> Result<(&Entry, &Path, &File), Problem> {
        let entry = self.by_name.get(name).ok_or_else(|| {
            let near = self.names().filter(|have| have.ends_with(last_words(name))).take(3);
            let problem = Problem::new("model::missing_tensor", format!("the weights have no tensor `{name}`"))
                .exit(Exit::Missing)
                .at_file(self.path(name));
            match shorten(near) {
                near if near.is_empty() => problem,
                near => problem.note(format!("they have {near}")),
            }
        })?;
        let (path, file) = &self.files[entry.file];
        if entry.shape != shape {
            return Err(Problem::new(
                "model::wrong_shape",
                format!("the tensor `{name}` has shape {:?} where the configuration needs {shape:?}", entry.shape),
            )
            .at_file(path));
        }
        Ok((entry, path, file))
    }

    /// Reads `name`, which must have `shape`, as f32. `Err` if it is missing, of another shape or type,
    /// or holds a NaN or an infinity.
    pub fn f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Problem> {
        let (entry, path, file) = self.entry(name, shape)?;
        let mut values = Vec::with_capacity(entry.bytes as usize / entry.element.size());
        read_chunks(path, file, entry, |bytes| match entry.element {
            Element::F32 => {
                values.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
                Ok(())
            }
            Element::Bf16 => {
                values.extend(bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()));
                Ok(())
            }
            Element::F16 => {
                values.extend(bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()));
                Ok(())
            }
            Element::Other(kind, _) => Err(wrong_type(path, name, kind)),
        })?;
        finite(path, name, values.iter().position(|value| !value.is_finite()), values.len())?;
        Ok(values)
    }

    /// Reads `name` as bf16; f32 and f16 are rounded to nearest, ties to even.
    pub fn bf16(&self, name: &str, shape: &[usize]) -> Result<Vec<bf16>, Problem> {
        let (entry, path, file) = self.entry(name, shape)?;
        let mut values = Vec::with_capacity(entry.bytes as usize / entry.element.size());
        read_chunks(path, file, entry, |bytes| match entry.element {
            Element::Bf16 => {
                values.extend(bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b)));
                Ok(())
            }
            Element::F32 => {
                values.extend(bytes.as_chunks::<4>().0.iter().map(|b| bf16::from_f32(f32::from_le_bytes(*b))));
                Ok(())
            }
            Element::F16 => {
                values.extend(bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_f32(f16::from_le_bytes(*b).to_f32())));
                Ok(())
            }
            Element::Other(kind, _) => Err(wrong_type(path, name, kind)),
        })?;
        finite(path, name, values.iter().position(|value| !value.is_finite()), values.len())?;
        Ok(values)
    }
}

fn read_chunks(
    path: &Path,
    file: &File,
    entry: &Entry,
    mut take: impl FnMut(&[u8]) -> Result<(), Problem>,
) -> Result<(), Problem> {
    let mut buffer = vec![0; CHUNK.min(entry.bytes as usize)];
    let mut done = 0;
    while done < entry.bytes {
        let size = CHUNK.min((entry.bytes - done) as usize);
        file.read_exact_at(&mut buffer[..size], entry.offset + done)
            .map_err(|error| Problem::io("model::read", "read", path, &error))?;
        take(&buffer[..size])?;
        done += size as u64;
    }
    Ok(())
}

fn wrong_type(path: &Path, name: &str, kind: &str) -> Problem {
    Problem::new("model::wrong_dtype", format!("the tensor `{name}` is stored as {kind}; F32, F16 and BF16 are read"))
        .at_file(path)
}

fn finite(path: &Path, name: &str, bad: Option<usize>, len: usize) -> Result<(), Problem> {
    match bad {
        None => Ok(()),
        Some(at) => Err(Problem::new("model::not_finite", format!("the tensor `{name}` holds a NaN or an infinity"))
            .at_file(path)
            .note(format!("the first is element {at} of {len}"))),
    }
}

fn damaged(path: &Path, message: String) -> Problem {
    Problem::new("model::damaged_weights", message).at_file(path)
}

/// `mlp.up.weight` of `model.layers.3.mlp.up.weight`: what a near miss shares.
fn last_words(name: &str) -> &str {
    let from = name.rmatch_indices('.').nth(1).map_or(0, |(at, _)| at);
    &name[from..]
}

fn shorten<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<String> = names.map(|name| format!("`{name}`")).collect();
    match names.len() {
        0..=3 => names.join(", "),
        n => format!("{} and {} more", names[..3].join(", "), n - 3),
    }
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>, Problem> {
    let text = std::fs::read_to_string(path).map_err(|error| Problem::io("model::read", "read", path, &error))?;
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| damaged(path, format!("the index is not JSON: {error}")))?;
    let map = value.get("weight_map").and_then(|map| map.as_object());
    let map = map.ok_or_else(|| damaged(path, "the index has no object `weight_map`".into()))?;
    if map.is_empty() {
        return Err(damaged(path, "the index names no tensor".into()));
    }
    map.iter()
        .map(|(name, shard)| match shard.as_str() {
            Some(shard) => Ok((name.clone(), shard.to_string())),
            None => Err(damaged(path, format!("the index gives no file name for `{name}`"))),
        })
        .collect()
}

/// The header's members in order; a map would hide a name that stands twice.
struct Members(Vec<(String, serde_json::Value)>);

impl<'de> serde::Deserialize<'de> for Members {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visit;
        impl<'de> serde::de::Visitor<'de> for Visit {
            type Value = Members;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Visit)
    }
}

/// Every tensor of a file, checked: ranges lie in the file, follow each other without overlap or hole,
/// cover it to its end, and agree with dtype and shape.
fn read_header(path: &Path, file: &File) -> Result<BTreeMap<String, Entry>, Problem> {
    let io = |error: std::io::Error| Problem::io("model::read", "read", path, &error);
    let length = file.metadata().map_err(io)?.len();
    if length < 8 {
        return Err(damaged(path, format!("the file is cut off: {length} bytes, a header needs at least 8")));
    }
    let mut size = [0; 8];
    file.read_exact_at(&mut size, 0).map_err(io)?;
    let size = u64::from_le_bytes(size);
    if size > HEADER_LIMIT || size > length - 8 {
        return Err(damaged(path, format!("the header claims {size} bytes in a file of {length}")));
    }
    let mut header = vec![0; size as usize];
    file.read_exact_at(&mut header, 8).map_err(io)?;
    let Members(members) =
        serde_json::from_slice(&header).map_err(|error| damaged(path, format!("the header is not JSON: {error}")))?;
    let start = 8 + size;
    let mut entries = BTreeMap::new();
    for (name, value) in members {
        if name == "__metadata__" {
            continue;
        }
        let entry = read_entry(&value, start, length)
            .map_err(|why| damaged(path, format!("the header entry of `{name}` is wrong: {why}")))?;
        if entries.insert(name.clone(), entry).is_some() {
            return Err(damaged(path, format!("the header names `{name}` twice")));
        }
    }
    let mut order: Vec<(&String, &Entry)> = entries.iter().collect();
    order.sort_by_key(|(_, entry)| (entry.offset, entry.bytes));
    let mut end = start;
    for (name, entry) in order {
        if entry.offset != end {
            let what = if entry.offset < end { "overlaps the one before" } else { "leaves a hole before it" };
            return Err(damaged(path, format!("the data of `{name}` {what}"))
                .note(format!("it starts at byte {} of the file, expected {end}", entry.offset)));
        }
        end += entry.bytes;
    }
    if end != length {
        return Err(damaged(path, format!("the file has {length} bytes where its header needs {end}")));
    }
    Ok(entries)
}

fn read_entry(value: &serde_json::Value, start: u64, length: u64) -> Result<Entry, String> {
    let dtype = value.get("dtype").and_then(|dtype| dtype.as_str()).ok_or("no `dtype`")?;
    let element = Element::named(dtype).ok_or_else(|| format!("dtype `{dtype}` is not known"))?;
    let numbers = |key: &str| -> Result<Vec<u64>, String> {
        let list = value.get(key).and_then(|list| list.as_array()).ok_or_else(|| format!("no list `{key}`"))?;
        list.iter().map(|n| n.as_u64().ok_or_else(|| format!("`{key}` holds {n}"))).collect()
    };
    let shape = numbers("shape")?;
    let offsets = numbers("data_offsets")?;
    let [from, to] = offsets[..] else { return Err(format!("`data_offsets` has {} numbers", offsets.len())) };
    let data = length - start;
    if from > to || to > data {
        return Err(format!("bytes {from} to {to} do not lie in the {data} bytes of data"));
    }
    let bytes = shape.iter().try_fold(element.size() as u64, |product, &n| product.checked_mul(n));
    if bytes != Some(to - from) {
        return Err(format!("shape {shape:?} of {dtype} does not fill bytes {from} to {to}"));
    }
    // Each dimension of a tensor with data is at most the file's length; only empty tensors may exceed it.
    let shape = shape
        .into_iter()
        .map(|n| usize::try_from(n).map_err(|_| format!("dimension {n}")))
        .collect::<Result<_, _>>()?;
    Ok(Entry { file: 0, element, shape, offset: start + from, bytes: to - from })
}

/// Writes a safetensors file: `tensors` as (name, shape), `values(i)` giving the f32 values of the i-th,
/// each stored as `element` (f16 and bf16 round to nearest even). Names are ordered, metadata is
/// `{"format": "pt"}` as transformers asks for. The bytes depend on nothing else.
pub fn write<'a>(
    path: &Path,
    element: Element,
    tensors: &[(String, Vec<usize>)],
    mut values: impl FnMut(usize) -> Result<Cow<'a, [f32]>, Problem>,
) -> Result<(), Problem> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by(|&a, &b| tensors[a].0.cmp(&tensors[b].0));
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
    let mut offset = 0;
    for &i in &order {
        let (name, shape) = &tensors[i];
        let bytes = shape.iter().product::<usize>() * element.size();
        let entry =
            serde_json::json!({"dtype": element.name(), "shape": shape, "data_offsets": [offset, offset + bytes]});
        header.insert(name.clone(), entry);
        offset += bytes;
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    while !(header.len() + 8).is_multiple_of(64) {
        header.push(b' ');
    }
    let io = |error: std::io::Error| Problem::io("model::write", "write", path, &error);
    let mut out = BufWriter::with_capacity(CHUNK, File::create(path).map_err(io)?);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    out.write_all(&header).map_err(io)?;
    for &i in &order {
        let values = values(i)?;
        assert_eq!(values.len(), tensors[i].1.iter().product::<usize>(), "values of `{}` fill its shape", tensors[i].0);
        write_values(&mut out, element, &values).map_err(io)?;
    }
    let file = out.into_inner().map_err(|error| io(error.into_error()))?;
    file.sync_all().map_err(io)
}

fn write_values(out: &mut impl Write, element: Element, values: &[f32]) -> std::io::Result<()> {
    let mut bytes = Vec::with_capacity(CHUNK);
    for values in values.chunks(CHUNK / 4) {
        bytes.clear();
        match element {
            Element::F32 => bytes.extend(values.iter().flat_map(|v| v.to_le_bytes())),
            Element::F16 => bytes.extend(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes())),
            Element::Bf16 => bytes.extend(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes())),
            Element::Other(name, _) => unreachable!("weights are not written as {name}"),
        }
        out.write_all(&bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tiny(dir: &Path) -> PathBuf {
        let path = dir.join(MODEL_FILE);
        let tensors = [("b".to_string(), vec![2, 3]), ("a".to_string(), vec![5])];
        write(&path, Element::F32, &tensors, |i| {
            Ok(Cow::Owned((0..if i == 0 { 6 } else { 5 }).map(|v| v as f32 - 2.5).collect()))
        })
        .unwrap();
        path
    }

    /// A file with this header and `data` bytes of zeros.
    fn with_header(dir: &Path, header: &str, data: usize) -> PathBuf {
        let path = dir.join(MODEL_FILE);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(std::iter::repeat_n(0, data));
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn refused(path: &Path, words: &str) {
        let problem = Tensors::open(path).err().expect("the file is refused");
        assert_eq!(problem.code, "model::damaged_weights");
        assert!(problem.message.contains(words), "{problem} should say {words}");
        assert_eq!(problem.places[0].file, path);
    }

    #[test]
    fn what_is_written_is_read_back_and_another_reader_agrees() {
        let dir = tempfile::tempdir().unwrap();
        let path = tiny(dir.path());
        let bytes = std::fs::read(&path).unwrap();
        let other = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(other.tensor("b").unwrap().shape(), [2, 3]);
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert_eq!(start % 64, 0, "data is aligned");
        let tensors = Tensors::open(&path).unwrap();
        assert_eq!(tensors.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(tensors.f32("b", &[2, 3]).unwrap(), [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]);
        assert_eq!(tensors.bf16("a", &[5]).unwrap()[4].to_f32(), 1.5);
    }

    #[test]
    fn the_same_tensors_give_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let first = std::fs::read(tiny(dir.path())).unwrap();
        assert_eq!(first, std::fs::read(tiny(dir.path())).unwrap());
    }

    #[test]
    fn halves_round_to_nearest_even_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        for element in [Element::F16, Element::Bf16] {
            let path = dir.path().join("half.safetensors");
            write(&path, element, &[("x".into(), vec![3])], |_| Ok(Cow::Owned(vec![1.0, -0.333_333_34, 1e-3])))
                .unwrap();
            let back = Tensors::open(&path).unwrap().f32("x", &[3]).unwrap();
            assert!((back[1] + 1.0 / 3.0).abs() <= 2e-3 && back[0] == 1.0, "{back:?}");
        }
    }

    #[test]
    fn a_truncated_file_is_refused_at_any_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = tiny(dir.path());
        let bytes = std::fs::read(&path).unwrap();
        for length in 0..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            let problem = Tensors::open(&path).err().expect("a truncated file is refused");
            assert_eq!(problem.code, "model::damaged_weights");
        }
    }

    #[test]
    fn an_oversized_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = tiny(dir.path());
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.push(0);
        std::fs::write(&path, bytes).unwrap();
        refused(&path, "where its header needs");
    }

    #[test]
    fn a_header_longer_than_the_file_allocates_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(MODEL_FILE);
        std::fs::write(&path, [0xff; 64]).unwrap();
        refused(&path, "claims 18446744073709551615 bytes");
    }

    #[test]
    fn a_lying_header_is_refused_and_the_tensor_named() {
        let dir = tempfile::tempdir().unwrap();
        let entry = |name: &str, shape: &str, from: u64, to: u64| {
            format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}"#)
        };
        let two = |a: String, b: String| format!("{{{a},{b}}}");
        let cases = [
            (two(entry("a", "[2]", 0, 8), entry("b", "[2]", 4, 12)), 12, "`b` overlaps"),
            (two(entry("a", "[2]", 0, 8), entry("b", "[2]", 12, 20)), 20, "`b` leaves a hole"),
            (two(entry("a", "[2]", 0, 8), entry("a", "[2]", 8, 16)), 16, "`a` twice"),
            (format!("{{{}}}", entry("a", "[3]", 0, 8)), 8, "does not fill"),
            (format!("{{{}}}", entry("a", "[4]", 0, 16)), 8, "do not lie in"),
            (format!("{{{}}}", entry("a", "[2]", 8, 0)), 8, "do not lie in"),
            (format!("{{{}}}", entry("a", "[4611686018427387904,4]", 0, 8)), 8, "does not fill"),
            (format!("{{{}}}", entry("a", "[-1]", 0, 8)), 8, "`shape` holds -1"),
            (r#"{"a":{"dtype":"Q4","shape":[2],"data_offsets":[0,8]}}"#.into(), 8, "`Q4` is not known"),
            (r#"{"a":7}"#.into(), 0, "no `dtype`"),
            ("[]".into(), 0, "not JSON"),
            ("{".into(), 0, "not JSON"),
        ];
        for (header, data, words) in cases {
            refused(&with_header(dir.path(), &header, data), words);
        }
    }

    #[test]
    fn a_missing_tensor_and_a_wrong_shape_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let tensors = Tensors::open(&tiny(dir.path())).unwrap();
        let problem = tensors.f32("c", &[1]).unwrap_err();
        assert!(problem.code == "model::missing_tensor" && problem.message.contains("`c`"), "{problem}");
        let problem = tensors.f32("a", &[4]).unwrap_err();
        assert!(problem.code == "model::wrong_shape" && problem.message.contains("[5] where"), "{problem}");
    }

    #[test]
    fn a_nan_or_an_infinity_is_found_and_the_tensor_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nan.safetensors");
        for bad in [f32::NAN, f32::INFINITY] {
            write(&path, Element::F32, &[("w".into(), vec![3])], |_| Ok(Cow::Owned(vec![0.0, bad, 0.0]))).unwrap();
            let tensors = Tensors::open(&path).unwrap();
            for problem in [tensors.f32("w", &[3]).unwrap_err(), tensors.bf16("w", &[3]).unwrap_err()] {
                assert!(
                    problem.code == "model::not_finite" && problem.notes[0].contains("element 1 of 3"),
                    "{problem}"
                );
            }
        }
    }

    fn shards(dir: &Path, index: &str) -> Files {
        for (file, tensor) in [("model-1.safetensors", "a"), ("model-2.safetensors", "b")] {
            write(&dir.join(file), Element::F32, &[(tensor.into(), vec![1])], |_| Ok(Cow::Owned(vec![1.0]))).unwrap();
        }
        std::fs::write(dir.join(INDEX_FILE), index).unwrap();
        Files::from_dir(dir).unwrap()
    }

    #[test]
    fn a_sharded_checkpoint_is_read_through_its_index() {
        let dir = tempfile::tempdir().unwrap();
        let files = shards(dir.path(), r#"{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}"#);
        let tensors = Tensors::of_model(&files).unwrap();
        assert_eq!(tensors.f32("b", &[1]).unwrap(), [1.0]);
        assert!(tensors.path("b").ends_with("model-2.safetensors"));
    }

    #[test]
    fn an_index_that_is_wrong_is_refused() {
        for (index, code, words) in [
            (
                r#"{"weight_map":{"a":"model-1.safetensors","c":"model-3.safetensors"}}"#,
                "model::missing_shard",
                "model-3",
            ),
            (r#"{"weight_map":{"b":"model-1.safetensors"}}"#, "model::damaged_weights", "does not hold it"),
            (r#"{"weight_map":{"a":3}}"#, "model::damaged_weights", "no file name for `a`"),
            (r#"{"weight_map":{}}"#, "model::damaged_weights", "names no tensor"),
            (r#"{}"#, "model::damaged_weights", "no object `weight_map`"),
            ("nonsense", "model::damaged_weights", "not JSON"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let problem = Tensors::of_model(&shards(dir.path(), index)).err().expect("the index is refused");
            assert!(problem.code == code && problem.message.contains(words), "{problem}");
        }
    }

    #[test]
    fn a_folder_without_safetensors_says_what_is_there_instead() {
        let mut files = Files::default();
        files.insert("pytorch_model.bin", "x");
        let problem = Tensors::of_model(&files).err().expect("refused");
        assert!(problem.notes[0].contains("pytorch_model.bin"), "{problem}");
        assert_eq!(problem.exit, Exit::Missing);
    }

    proptest! {
        /// Whatever bytes of the header change, reading ends in values or a problem, and no tensor claims
        /// more than the file holds.
        #[test]
        fn no_change_of_header_bytes_makes_the_reader_panic(changes in prop::collection::vec((0usize..400, any::<u8>()), 1..6)) {
            let dir = tempfile::tempdir().unwrap();
            let path = tiny(dir.path());
            let mut bytes = std::fs::read(&path).unwrap();
            let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            for (at, byte) in changes {
                bytes[at % header] = byte;
            }
            std::fs::write(&path, &bytes).unwrap();
            if let Ok(tensors) = Tensors::open(&path) {
                for name in tensors.names() {
                    let shape = tensors.shape(name).unwrap().to_vec();
                    match tensors.f32(name, &shape) {
                        Ok(values) => prop_assert!(values.len() * 2 <= bytes.len()),
                        Err(problem) => prop_assert!(problem.code.starts_with("model::")),
                    }
                }
            }
        }
    }
}
