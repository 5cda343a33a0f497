//! Training state on disk, for resuming with the same bits.
//!
//! One file per checkpoint, `step-00000010.checkpoint`: parameters, optimizer states, the number of
//! updates, and whatever JSON the stage adds (its place in the data, its log). Layout: a magic line, the
//! header's length (u64, little endian), a JSON header, the tensors one after another, and the BLAKE3
//! digest of all of that.
//!
//! A file appears under its name only when it is whole (temporary name, fsync, rename, fsync of the
//! folder), and its digest is checked before it is used, so neither a kill nor a damaged disk can make
//! training go on from a wrong state. The two newest are kept: if the newest is damaged, the other is used.

use super::optimizer::Optimizer;
use super::state::{StateMut, StateRef};
use crate::model::Parameter;
use crate::problem::Problem;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8] = b"pipe checkpoint 1\n";
const SUFFIX: &str = ".checkpoint";
/// How many files are kept.
const KEPT: usize = 2;
const BUFFER: usize = 1 << 20;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    step: u64,
    optimizer_steps: u64,
    caller: serde_json::Value,
    /// Name and bytes of each tensor, in file order.
    tensors: Vec<(String, u64)>,
}

/// The folder in which a run keeps its checkpoints.
pub struct Checkpoint {
    folder: PathBuf,
}

/// What was read back, beside the parameters and the optimizer, which are restored in place.
#[derive(Debug)]
pub struct Restored {
    /// The step that was saved.
    pub step: u64,
    /// What the caller gave to [`Checkpoint::save`].
    pub caller: serde_json::Value,
    /// Newer checkpoints that could not be used, and why.
    pub ignored: Vec<Problem>,
}

impl Checkpoint {
    /// Checkpoints in `folder`, which is made if it is not there.
    pub fn in_folder(folder: &Path) -> Result<Checkpoint, Problem> {
        std::fs::create_dir_all(folder)
            .map_err(|error| Problem::io("train::checkpoint", "make the folder", folder, &error))?;
        Ok(Checkpoint { folder: folder.to_path_buf() })
    }

    /// Saves everything after `step` updates; older files than the one before are removed.
    pub fn save(
        &self,
        step: u64,
        params: &[Parameter],
        optimizer: &Optimizer,
        caller: serde_json::Value,
    ) -> Result<(), Problem> {
        let path = self.folder.join(format!("step-{step:08}{SUFFIX}"));
        let io = |error: std::io::Error| Problem::io("train::checkpoint", "write", &path, &error);
        let part = path.with_extension("part");
        let tensors = tensors(params, optimizer);
        let header = Header {
            step,
            optimizer_steps: optimizer.steps(),
            caller,
            tensors: tensors.iter().map(|(name, state)| (name.clone(), state.bytes() as u64)).collect(),
        };
        let header = serde_json::to_vec(&header)
            .map_err(|error| Problem::new("train::checkpoint", format!("the checkpoint's header: {error}")))?;
        let mut out = Hashing { to: File::create(&part).map_err(io)?, hasher: blake3::Hasher::new() };
        let mut buffered = BufWriter::with_capacity(BUFFER, &mut out);
        buffered.write_all(MAGIC).map_err(io)?;
        buffered.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
        buffered.write_all(&header).map_err(io)?;
        for (_, state) in &tensors {
            match state {
                StateRef::U8(bytes) => buffered.write_all(bytes).map_err(io)?,
                StateRef::F32(values) => {
                    for values in values.chunks(BUFFER / 4) {
                        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                        buffered.write_all(&bytes).map_err(io)?;
                    }
                }
            }
        }
        buffered.flush().map_err(io)?;
        drop(buffered);
        let Hashing { mut to, hasher } = out;
        to.write_all(hasher.finalize().as_bytes()).map_err(io)?;
        to.sync_all().map_err(io)?;
        std::fs::rename(&part, &path).map_err(io)?;
        File::open(&self.folder).and_then(|folder| folder.sync_all()).map_err(io)?;
        for (_, old) in self.files()?.into_iter().skip(KEPT) {
            // A file that stays costs disk space only, and the next save tries again.
            let _ = std::fs::remove_file(old);
        }
        Ok(())
    }

    /// Restores the newest whole checkpoint into `params` and `optimizer`. `None` if there is none. `Err` if
    /// it is whole but of other parameters, which no older one could cure.
    pub fn restore(&self, params: &mut [Parameter], optimizer: &mut Optimizer) -> Result<Option<Restored>, Problem> {
        let mut ignored = Vec::new();
        for (_, path) in self.files()? {
            match verify(&path) {
                Err(problem) => ignored.push(problem),
                Ok((file, header)) => {
                    read(&path, file, &header, params, optimizer)?;
                    return Ok(Some(Restored { step: header.step, caller: header.caller, ignored }));
                }
            }
        }
        Ok(None)
    }

    /// Step and path, newest first.
    fn files(&self) -> Result<Vec<(u64, PathBuf)>, Problem> {
        let io = |error: std::io::Error| Problem::io("train::checkpoint", "list", &self.folder, &error);
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.folder).map_err(io)? {
            let path = entry.map_err(io)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let step = name.strip_prefix("step-").and_then(|name| name.strip_suffix(SUFFIX));
            if let Some(step) = step.and_then(|step| step.parse().ok()) {
                files.push((step, path));
            }
        }
        files.sort();
        files.reverse();
        Ok(files)
    }
}

impl StateRef<'_> {
    fn bytes(&self) -> usize {
        match self {
            StateRef::F32(values) => 4 * values.len(),
            StateRef::U8(values) => values.len(),
        }
    }
}

fn tensors<'a>(params: &'a [Parameter], optimizer: &'a Optimizer) -> Vec<(String, StateRef<'a>)> {
    let params = params.iter().map(|param| (param.name.clone(), StateRef::F32(&param.value)));
    params.chain(optimizer.states()).collect()
}

/// Passes bytes on and hashes them.
struct Hashing {
    to: File,
    hasher: blake3::Hasher,
}

impl Write for &mut Hashing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.to.flush()
    }
}

/// Checks the digest and parses the header; the file is left at the first tensor.
fn verify(path: &Path) -> Result<(BufReader<File>, Header), Problem> {
    let io = |error: std::io::Error| Problem::io("train::checkpoint", "read", path, &error);
    let damaged = |what: &str| {
        Problem::new("train::damaged_checkpoint", format!("the checkpoint {what}; it is ignored")).at_file(path)
    };
    let mut file = File::open(path).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    let least = (MAGIC.len() + 8 + blake3::OUT_LEN) as u64;
    if length < least {
        return Err(damaged("is cut off"));
    }
    let body = length - blake3::OUT_LEN as u64;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader((&mut file).take(body)).map_err(io)?;
    let mut digest = [0; blake3::OUT_LEN];
    file.read_exact(&mut digest).map_err(io)?;
    if *hasher.finalize().as_bytes() != digest {
        return Err(damaged("does not match its digest"));
    }
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    let mut file = BufReader::with_capacity(BUFFER, file);
    let mut magic = [0; MAGIC.len()];
    file.read_exact(&mut magic).map_err(io)?;
    let mut size = [0; 8];
    file.read_exact(&mut size).map_err(io)?;
    let size = u64::from_le_bytes(size);
    if magic != *MAGIC || size > length - least {
        return Err(damaged("is of another format"));
    }
    let mut header = vec![0; size as usize];
    file.read_exact(&mut header).map_err(io)?;
    let header: Header = serde_json::from_slice(&header).map_err(|_| damaged("has another header"))?;
    let data = header.tensors.iter().try_fold(0u64, |sum, (_, bytes)| sum.checked_add(*bytes));
    if data != Some(length - least - size) {
        return Err(damaged("has another length than its header says"));
    }
    Ok((file, header))
}

fn read(
    path: &Path,
    mut file: impl Read,
    header: &Header,
    params: &mut [Parameter],
    optimizer: &mut Optimizer,
) -> Result<(), Problem> {
    let io = |error: std::io::Error| Problem::io("train::checkpoint", "read", path, &error);
    let here: Vec<(String, u64)> =
        tensors(params, optimizer).into_iter().map(|(name, state)| (name, state.bytes() as u64)).collect();
    if here != header.tensors {
        let other = here.iter().zip(&header.tensors).find(|(a, b)| a != b);
        let (name, found) = match other {
            Some((a, b)) => (a.0.as_str(), format!("`{}` of {} bytes", b.0, b.1)),
            None => ("the parameters", format!("{} tensors where {} are trained", header.tensors.len(), here.len())),
        };
        return Err(Problem::new("train::other_checkpoint", format!("the checkpoint does not fit {name}"))
            .at_file(path)
            .note(format!("it holds {found}"))
            .help("remove the stage's work folder to start it again"));
    }
    for param in params.iter_mut() {
        read_f32(&mut file, &mut param.value).map_err(io)?;
    }
    for state in optimizer.states_mut() {
        match state {
            StateMut::F32(values) => read_f32(&mut file, values).map_err(io)?,
            StateMut::U8(values) => file.read_exact(values).map_err(io)?,
        }
    }
    optimizer.set_steps(header.optimizer_steps);
    Ok(())
}

fn read_f32(file: &mut impl Read, values: &mut [f32]) -> std::io::Result<()> {
    let mut bytes = vec![0; BUFFER.min(4 * values.len())];
    for values in values.chunks_mut(BUFFER / 4) {
        let bytes = &mut bytes[..4 * values.len()];
        file.read_exact(bytes)?;
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *value = f32::from_le_bytes(*bytes);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Gradients;
    use crate::random::Stream;
    use crate::train::{Kind, Options};
    use serde_json::json;

    fn start() -> Vec<Parameter> {
        let sizes = [("small", vec![3, 5]), ("large", vec![70, 100])];
        sizes
            .into_iter()
            .map(|(name, shape)| {
                let random = Stream::named(0, &[name]);
                let len = shape.iter().product::<usize>() as u64;
                Parameter { name: name.into(), shape, value: (0..len).map(|i| random.normal(i) as f32).collect() }
            })
            .collect()
    }

    fn train(params: &mut [Parameter], optimizer: &mut Optimizer, steps: std::ops::Range<u64>) {
        for step in steps {
            let grad = |param: &Parameter| {
                let random = Stream::named(step, &[&param.name, "gradient"]);
                (0..param.value.len()).map(|i| random.normal(i as u64) as f32).collect()
            };
            let grads = Gradients { values: params.iter().map(grad).collect() };
            optimizer.step(params, &grads, 1e-2);
        }
    }

    #[test]
    fn an_interrupted_run_ends_with_the_same_bits() {
        for kind in [Kind::AdamW, Kind::AdamW8bit] {
            let dir = tempfile::tempdir().unwrap();
            let (mut params, mut optimizer) = (start(), Optimizer::new(kind, Options::default(), &start()));
            train(&mut params, &mut optimizer, 0..10);

            let checkpoints = Checkpoint::in_folder(dir.path()).unwrap();
            let (mut first, mut first_optimizer) = (start(), Optimizer::new(kind, Options::default(), &start()));
            train(&mut first, &mut first_optimizer, 0..4);
            checkpoints.save(4, &first, &first_optimizer, json!({"loss": 0.1})).unwrap();

            let (mut again, mut again_optimizer) = (start(), Optimizer::new(kind, Options::default(), &start()));
            let restored = checkpoints.restore(&mut again, &mut again_optimizer).unwrap().unwrap();
            assert_eq!((restored.step, &restored.caller), (4, &json!({"loss": 0.1})));
            assert!(restored.ignored.is_empty());
            train(&mut again, &mut again_optimizer, 4..10);
            for (a, b) in params.iter().zip(&again) {
                assert!(a.value.iter().zip(&b.value).all(|(a, b)| a.to_bits() == b.to_bits()), "{kind:?} {}", a.name);
            }
        }
    }

    fn saved(dir: &Path, steps: &[u64]) -> Checkpoint {
        let checkpoints = Checkpoint::in_folder(dir).unwrap();
        let (mut params, mut optimizer) = (start(), Optimizer::new(Kind::AdamW8bit, Options::default(), &start()));
        for &step in steps {
            train(&mut params, &mut optimizer, step..step + 1);
            checkpoints.save(step, &params, &optimizer, json!(step)).unwrap();
        }
        checkpoints
    }

    fn restore(checkpoints: &Checkpoint) -> Option<Restored> {
        let mut optimizer = Optimizer::new(Kind::AdamW8bit, Options::default(), &start());
        checkpoints.restore(&mut start(), &mut optimizer).unwrap()
    }

    #[test]
    fn the_two_newest_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = saved(dir.path(), &[1, 2, 3, 10]);
        let steps: Vec<u64> = checkpoints.files().unwrap().into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, [10, 3]);
        assert_eq!(restore(&checkpoints).unwrap().step, 10);
    }

    #[test]
    fn a_damaged_or_half_written_checkpoint_is_ignored_and_the_one_before_is_used() {
        for damage in ["flip", "cut", "empty"] {
            let dir = tempfile::tempdir().unwrap();
            let checkpoints = saved(dir.path(), &[1, 2]);
            let path = dir.path().join("step-00000002.checkpoint");
            let mut bytes = std::fs::read(&path).unwrap();
            match damage {
                "flip" => {
                    let middle = bytes.len() / 2;
                    bytes[middle] ^= 4;
                }
                "cut" => bytes.truncate(bytes.len() - 1),
                _ => bytes.clear(),
            }
            std::fs::write(&path, bytes).unwrap();
            let restored = restore(&checkpoints).unwrap();
            assert_eq!(restored.step, 1, "{damage}");
            assert_eq!(restored.ignored[0].code, "train::damaged_checkpoint");
        }
    }

    #[test]
    fn what_a_kill_left_under_a_temporary_name_is_not_seen() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("step-00000009.part"), b"half").unwrap();
        assert!(restore(&Checkpoint::in_folder(dir.path()).unwrap()).is_none());
    }

    #[test]
    fn a_checkpoint_of_other_parameters_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = saved(dir.path(), &[1]);
        let mut other = start();
        other[1].name = "renamed".into();
        let mut optimizer = Optimizer::new(Kind::AdamW8bit, Options::default(), &other);
        let problem = checkpoints.restore(&mut other, &mut optimizer).unwrap_err();
        assert!(problem.code == "train::other_checkpoint" && problem.message.contains("renamed"), "{problem}");
    }
}
