//! One unit for one architecture: from sources to what is shipped, and what the assembler says of it.

use crate::nvrtc::Nvrtc;
use crate::units::{PTX_VERSION, Unit, is_ptx};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a kernel takes. All zero for PTX, which only the driver turns into instructions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resources {
    /// Per thread.
    pub registers: u32,
    /// Bytes per thread written and read because registers ran out.
    pub spills: u32,
    /// Bytes per thread of arrays that are not in registers, spills among them.
    pub stack: u32,
    /// Static bytes per block; ours is asked for at the launch.
    pub shared: u32,
}

pub struct Compiled {
    /// A cubin, or PTX.
    pub bytes: Vec<u8>,
    pub kernels: BTreeMap<String, Resources>,
    /// Lines of the log that are for people.
    pub warnings: String,
}

pub fn compile(nvrtc: &Nvrtc, unit: &Unit, arch: &str) -> Result<Compiled, String> {
    let output = nvrtc.compile(&unit.file, &unit.sources, &unit.options(arch), is_ptx(arch))?;
    let warnings = output.log.lines().filter(|line| !is_report(line)).collect::<Vec<_>>().join("\n");
    let warnings = warnings.trim().to_string();
    if !is_ptx(arch) {
        return Ok(Compiled { bytes: output.bytes, kernels: resources(&output.log)?, warnings });
    }
    let ptx = lowered(&crate::nvrtc::text(output.bytes))?;
    let kernels = entries(&ptx).map(|name| (name.to_string(), Resources::default())).collect();
    Ok(Compiled { bytes: ptx.into_bytes(), kernels, warnings })
}

fn is_report(line: &str) -> bool {
    let report = ["ptxas info", "Function properties", "bytes stack frame"];
    report.iter().any(|word| line.contains(word))
}

/// The kernels that a PTX text holds.
fn entries(ptx: &str) -> impl Iterator<Item = &str> {
    ptx.lines().filter_map(|line| line.strip_prefix(".visible .entry ")?.split(['(', ' ']).next())
}

/// The same text for older drivers. A hint to the assembler that is newer than the version is left out.
fn lowered(ptx: &str) -> Result<String, String> {
    let mut seen = false;
    let mut text = String::with_capacity(ptx.len());
    for line in ptx.lines() {
        if line.starts_with(".version ") {
            seen = true;
            text.push_str(".version ");
            text.push_str(PTX_VERSION);
        } else if line.contains(".pragma") && line.contains("used_bytes_mask") {
            continue;
        } else {
            text.push_str(line);
        }
        text.push('\n');
    }
    if seen { Ok(text) } else { Err("the PTX has no `.version`".to_string()) }
}

/// Reads what `ptxas -v` says of each kernel:
///
/// ```text
/// ptxas info    : Compiling entry function 'sum' for 'sm_80'
/// ptxas info    : Function properties for sum
/// ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
/// ptxas info    : Used 12 registers, used 1 barriers, 372 bytes cmem[0]
/// ```
fn resources(log: &str) -> Result<BTreeMap<String, Resources>, String> {
    let mut kernels = BTreeMap::new();
    let mut current: Option<(String, Resources)> = None;
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            current = Some((rest.split('\'').next().unwrap_or(rest).to_string(), Resources::default()));
        } else if let (Some((_, kernel)), true) = (&mut current, line.contains("bytes stack frame")) {
            kernel.stack = before(line, " bytes stack frame")?;
            kernel.spills = before(line, " bytes spill stores")? + before(line, " bytes spill loads")?;
        } else if let (Some((name, mut kernel)), true) = (current.clone(), line.contains(" registers")) {
            kernel.registers = before(line, " registers")?;
            kernel.shared = if line.contains(" bytes smem") { before(line, " bytes smem")? } else { 0 };
            kernels.insert(name, kernel);
            current = None;
        }
    }
    if kernels.is_empty() { Err(format!("no kernel in the assembler's report:\n{log}")) } else { Ok(kernels) }
}

/// The number that stands before `words`.
fn before(line: &str, words: &str) -> Result<u32, String> {
    let number = line.split_once(words).and_then(|(left, _)| left.rsplit([' ', ',']).next()?.parse().ok());
    number.ok_or_else(|| format!("cannot read `{}` in the assembler's report: {line}", words.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_of_the_assembler_is_read() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'b' for 'sm_80'\n\
            ptxas info    : Function properties for b\n\
            ptxas         .     16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n\
            ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, \
            372 bytes cmem[0]\n\
            ptxas info    : Compiling entry function 'a' for 'sm_80'\n\
            ptxas info    : Function properties for a\n    \
            0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 12 registers, used 0 barriers, 372 bytes cmem[0]\n";
        let kernels = resources(log).unwrap();
        assert_eq!(kernels["b"], Resources { registers: 255, spills: 20, stack: 16, shared: 1024 });
        assert_eq!(kernels["a"], Resources { registers: 12, ..Resources::default() });
        assert!(log.lines().all(is_report));
        assert!(resources("ptxas info    : 0 bytes gmem\n").is_err());
    }

    #[test]
    fn ptx_is_lowered_and_its_kernels_are_found() {
        let ptx = ".version 8.8\n.target sm_80\n.visible .entry sum(\n\t.pragma \"used_bytes_mask 0xfff\";\n}\n";
        let text = lowered(ptx).unwrap();
        assert_eq!(text, ".version 8.3\n.target sm_80\n.visible .entry sum(\n}\n");
        assert_eq!(entries(&text).collect::<Vec<_>>(), ["sum"]);
        assert!(lowered("").is_err());
    }
}
