//! What one `.cu` became, compiled: for each architecture a cubin (machine code), and PTX, which the driver compiles for
//! devices that came after us. Which of these a device runs is decided here.

use crate::problem::{Exit, Problem};
use std::fmt;

/// Kernels that were compiled together.
#[derive(Debug)]
pub struct Unit {
    /// `<stem>` of the `.cu`, or `<stem>-<variant>`.
    pub name: &'static str,
    /// Each a name for [`super::Gpu::launch`]; no two units share one.
    pub kernels: &'static [&'static str],
    /// What it became, for each architecture.
    pub blobs: &'static [Blob],
}

/// A unit for one architecture.
pub struct Blob {
    /// `sm_90a` for a cubin, `compute_80` for PTX.
    pub arch: &'static str,
    /// By zstd.
    pub packed: &'static [u8],
}

/// What a device can do, in NVIDIA's numbers: 8.0 for an A100, 9.0 for an H100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Capability {
    /// The number before the point.
    pub major: u32,
    /// The number behind the point.
    pub minor: u32,
}

impl Unit {
    /// What a device of this capability runs: the cubin made for exactly it, or else one made for a lower
    /// minor version of its major one, or else the PTX. `device` is its name.
    pub fn blob_for(&self, capability: Capability, device: &str) -> Result<&Blob, Problem> {
        let cubins = || self.blobs.iter().filter(|blob| !blob.is_ptx());
        let exact = cubins().find(|blob| blob.capability() == capability);
        // What has a letter behind its number uses instructions that only that architecture has.
        let related = || {
            let below = |blob: &&Blob| blob.capability().major == capability.major && blob.capability() < capability;
            cubins().filter(|blob| !blob.is_specific()).filter(below).max_by_key(|blob| blob.capability())
        };
        let ptx = || {
            let older = self.blobs.iter().filter(|blob| blob.is_ptx() && blob.capability() <= capability);
            older.max_by_key(|blob| blob.capability())
        };
        exact.or_else(related).or_else(ptx).ok_or_else(|| {
            let there: Vec<&str> = self.blobs.iter().map(|blob| blob.arch).collect();
            let help = if !there.is_empty() && self.blobs.iter().all(Blob::is_specific) {
                "they use instructions that only it has: the launcher has to choose other kernels here"
            } else {
                "add its architecture to kernels/manifest.toml and run `cargo xtask kernels`"
            };
            Problem::new("cuda::no_kernel", format!("the kernels of `{}` do not run on {device}", self.name))
                .note(format!("its compute capability is {capability}; they were compiled for {}", there.join(", ")))
                .help(help)
                .exit(Exit::Missing)
        })
    }
}

impl Blob {
    /// Whether the driver has to compile it.
    pub fn is_ptx(&self) -> bool {
        self.arch.starts_with("compute_")
    }

    /// Whether it is for one architecture alone, as `sm_90a` is.
    fn is_specific(&self) -> bool {
        self.arch.ends_with(|last: char| last.is_ascii_alphabetic())
    }

    fn capability(&self) -> Capability {
        let number = self.arch.trim_start_matches(|c: char| !c.is_ascii_digit());
        let number = number.trim_end_matches(|c: char| !c.is_ascii_digit());
        let number: u32 = number.parse().expect("architectures are written sm_N or compute_N");
        Capability { major: number / 10, minor: number % 10 }
    }

    /// A cubin, or PTX with the zero byte that the driver wants at its end.
    pub fn unpack(&self) -> Vec<u8> {
        let mut bytes = zstd::decode_all(self.packed).expect("what was embedded was packed whole");
        if self.is_ptx() {
            bytes.push(0);
        }
        bytes
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes packed)", self.arch, self.packed.len())
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn blob(arch: &'static str) -> Blob {
        Blob { arch, packed: &[] }
    }

    const BLOBS: &[Blob] = &[
        blob("sm_80"),
        blob("sm_86"),
        blob("sm_90a"),
        blob("sm_100a"),
        blob("sm_120a"),
        blob("compute_80"),
        blob("compute_90"),
    ];

    fn chosen(blobs: &'static [Blob], major: u32, minor: u32) -> Result<&'static str, Problem> {
        static_unit(blobs).blob_for(Capability { major, minor }, "a GPU").map(|blob| blob.arch)
    }

    fn static_unit(blobs: &'static [Blob]) -> &'static Unit {
        Box::leak(Box::new(Unit { name: "sum", kernels: &["sum"], blobs }))
    }

    #[test]
    fn the_nearest_of_what_runs_is_chosen() {
        let table = [
            ((8, 0), "sm_80"),
            ((8, 6), "sm_86"),
            // Same major version, lower minor one: the highest such.
            ((8, 9), "sm_86"),
            ((9, 0), "sm_90a"),
            // Not sm_100a, which is for 10.0 alone.
            ((10, 3), "compute_90"),
            ((12, 0), "sm_120a"),
            ((12, 1), "compute_90"),
            ((13, 0), "compute_90"),
        ];
        for ((major, minor), arch) in table {
            assert_eq!(chosen(BLOBS, major, minor).unwrap(), arch, "{major}.{minor}");
        }
    }

    #[test]
    fn what_cannot_run_says_what_there_is() {
        for (blobs, major, minor) in [(BLOBS, 7, 5), (&BLOBS[2..3], 9, 1), (&BLOBS[1..2], 8, 0), (&[], 8, 0)] {
            let problem = chosen(blobs, major, minor).unwrap_err();
            assert_eq!((problem.code, problem.exit), ("cuda::no_kernel", Exit::Missing));
            assert!(problem.message.contains("a GPU") && problem.notes[0].contains(&format!("{major}.{minor}")));
            assert!(blobs.iter().all(|blob| problem.notes[0].contains(blob.arch)), "{problem}");
        }
        // What is for one architecture alone is not to be compiled for another.
        let problem = chosen(&BLOBS[2..3], 10, 0).unwrap_err();
        assert!(problem.help[0].contains("the launcher has to choose other kernels"), "{problem}");
    }
}
