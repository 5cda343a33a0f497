//! What must hold of what was compiled, beyond that it was.

use crate::compile::Compiled;
use crate::units::{Unit, is_ptx};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Tools that are looked for; what cannot be had is not asked.
pub struct Tools {
    pub ptxas: Option<PathBuf>,
    pub nvdisasm: Option<PathBuf>,
}

/// All that is wrong, each with its unit, kernel and architecture.
pub fn problems(tools: &Tools, scratch: &Path, unit: &Unit, arch: &str, compiled: &Compiled) -> Vec<String> {
    let mut wrong = Vec::new();
    for (kernel, taken) in &compiled.kernels {
        let whose = format!("{}, {arch}: kernel `{kernel}`", unit.name);
        if taken.spills > 0 {
            wrong.push(format!("{whose} spills {} bytes", taken.spills));
        }
        if let Some(most) = unit.registers.filter(|most| taken.registers > *most) {
            wrong.push(format!("{whose} takes {} registers; kernels/manifest.toml allows {most}", taken.registers));
        }
        if taken.shared > 0 {
            wrong.push(format!("{whose} has {} bytes of static shared memory; ours is all dynamic", taken.shared));
        }
    }
    let asked = match (is_ptx(arch), &tools.ptxas, &tools.nvdisasm) {
        (true, Some(ptxas), _) => assembles(ptxas, arch, &compiled.bytes),
        (false, _, Some(nvdisasm)) if !unit.expect.is_empty() => {
            contains(nvdisasm, &scratch.join(unit.blob(arch)), &compiled.bytes, &unit.expect)
        }
        _ => Ok(()),
    };
    wrong.extend(asked.err().map(|error| format!("{}, {arch}: {error}", unit.name)));
    wrong
}

/// Whether the assembler takes the PTX, whose version we lowered. For the oldest real architecture of it.
fn assembles(ptxas: &Path, arch: &str, ptx: &[u8]) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: {error}", ptxas.display());
    let real = arch.replace("compute_", "sm_");
    let mut child = Command::new(ptxas)
        .args(["--gpu-name", &real, "--output-file", "/dev/null", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    // It may stop reading at the first mistake; what it says then is the better message.
    let _ = child.stdin.take().expect("piped").write_all(ptx);
    let output = child.wait_with_output().map_err(failed)?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ptxas refuses the PTX: {}", String::from_utf8_lossy(&output.stderr).trim_end())),
    }
}

/// Whether the instructions of a cubin have all `expected` mnemonics.
fn contains(nvdisasm: &Path, scratch: &Path, cubin: &[u8], expected: &[String]) -> Result<(), String> {
    std::fs::write(scratch, cubin).map_err(|error| format!("{}: {error}", scratch.display()))?;
    let output = Command::new(nvdisasm).arg("-c").arg(scratch).output();
    let _ = std::fs::remove_file(scratch);
    let output = output.map_err(|error| format!("{}: {error}", nvdisasm.display()))?;
    if !output.status.success() {
        return Err(format!("nvdisasm: {}", String::from_utf8_lossy(&output.stderr).trim_end()));
    }
    let listing = String::from_utf8_lossy(&output.stdout);
    let missing = missing(&listing, expected);
    if missing.is_empty() { Ok(()) } else { Err(format!("no instruction {}", missing.join(", "))) }
}

/// A mnemonic is a word of the listing, up to its first dot: `LDSM` is there in `LDSM.16.M88.4 R4, [R2]`.
fn missing<'e>(listing: &str, expected: &'e [String]) -> Vec<&'e str> {
    let words: std::collections::BTreeSet<&str> =
        listing.split_whitespace().map(|word| word.split(['.', ';']).next().unwrap_or(word)).collect();
    expected.iter().map(String::as_str).filter(|mnemonic| !words.contains(mnemonic)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_mnemonic_is_named() {
        let listing = "        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;\n  /*0020*/  @P0 BRA `(.L_1) ;\n";
        let expected = ["LDSM", "HMMA", "BRA"].map(str::to_string);
        assert_eq!(missing(listing, &expected), ["HMMA"]);
    }
}
