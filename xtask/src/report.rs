//! What can be known of the compiled kernels without a GPU: what they take, how many blocks of them fit a
//! multiprocessor, and of which instructions they are made. No speed: that only a GPU tells.

use crate::prebuilt::{Made, Prebuilt};
use crate::units::{self, Unit, is_ptx};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

/// Mnemonics that are counted, each a column.
const COUNTED: [&str; 15] = [
    "HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG", "LDG", "STG", "LD", "ST", "LDS", "STS", "MUFU", "SHFL", "FFMA", "BAR",
];

/// What a multiprocessor has, and in which grains it gives it. From the tables of compute capabilities in the CUDA
/// programming guide.
struct Multiprocessor {
    threads: u32,
    blocks: u32,
    /// In bytes; each block takes another kilobyte for the system.
    shared: u32,
    shared_per_block: u32,
}

const REGISTERS: u32 = 64 << 10;
const REGISTER_GRAIN: u32 = 256;
const SHARED_GRAIN: u32 = 128;
const SHARED_OF_SYSTEM: u32 = 1 << 10;
const WARP: u32 = 32;
/// A multiprocessor's four parts take whole warps.
const WARP_GRAIN: u32 = 4;

fn multiprocessor(arch: &str) -> Option<Multiprocessor> {
    let (threads, blocks, shared, shared_per_block) = match arch {
        "sm_80" => (2048, 32, 164 << 10, 163 << 10),
        "sm_89" | "sm_120" | "sm_120a" => (1536, 24, 100 << 10, 99 << 10),
        "sm_90" | "sm_90a" | "sm_100" | "sm_100a" => (2048, 32, 228 << 10, 227 << 10),
        _ => return None,
    };
    Some(Multiprocessor { threads, blocks, shared, shared_per_block })
}

/// A kernel as compiled for one architecture.
#[derive(Clone, Copy)]
struct Taken {
    registers: u32,
    threads: u32,
    shared: u32,
}

/// Blocks that a multiprocessor holds at once, and what there is no more of.
fn occupancy(of: &Multiprocessor, taken: Taken) -> (u32, &'static str) {
    let warps = taken.threads.div_ceil(WARP);
    let per_warp = (taken.registers * WARP).next_multiple_of(REGISTER_GRAIN);
    let warps_by_registers = REGISTERS / per_warp / WARP_GRAIN * WARP_GRAIN;
    let shared = (taken.shared + SHARED_OF_SYSTEM).next_multiple_of(SHARED_GRAIN);
    if taken.shared > of.shared_per_block {
        return (0, "shared memory");
    }
    let limits = [
        (warps_by_registers / warps, "registers"),
        (of.shared / shared, "shared memory"),
        (of.threads / (warps * WARP), "threads"),
        (of.blocks, "blocks"),
    ];
    // The first of the smallest.
    limits.into_iter().min_by_key(|(blocks, _)| *blocks).expect("four")
}

/// The report of all units. `Err` names what is missing of what was built.
pub fn report(
    units: &[Unit],
    made: &Made,
    prebuilt: &Prebuilt,
    nvdisasm: &Path,
    scratch: &Path,
) -> Result<String, String> {
    let mut text = String::from(
        "What the compiled kernels take, without a GPU: `cargo xtask kernels --report`.\n\
         registers and spilled bytes per thread, as the assembler says; threads: the launch bounds; shared: the most\n\
         dynamic bytes that a launch asks for, by kernels/manifest.toml; blocks: how many a multiprocessor holds, by\n\
         calculation, and what limits them; warps: as many, of those that it could hold. Then instructions in the code,\n\
         each counted once however often it runs.\n",
    );
    let head = format!("{:<36}{:<8}{:>4}{:>6}{:>8}{:>8}{:>7}  ", "", "", "reg", "spill", "threads", "shared", "blocks");
    let _ = write!(text, "\n{head}{:<14}{:>7}{:>7}", "limited by", "warps", "all");
    for mnemonic in COUNTED {
        let _ = write!(text, "{mnemonic:>8}");
    }
    text.push('\n');
    let shared = units::shared(&prebuilt.sources)?;
    for unit in units {
        let Some(archs) = made.get(&unit.name) else { return Err(format!("{} is not compiled", unit.name)) };
        let mut lines: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for arch in unit.archs.iter().filter(|arch| !is_ptx(arch)) {
            let cubin = prebuilt.blob(&unit.blob(arch))?;
            let entry = archs.get(arch).ok_or_else(|| format!("{} is not compiled for {arch}", unit.name))?;
            let listed = instructions(nvdisasm, &scratch.join(unit.blob(arch)), &cubin)?;
            for (kernel, resources) in &entry.kernels {
                let threads = launch_bounds(&cubin, kernel)
                    .ok_or_else(|| format!("{}: no launch bounds of `{kernel}`", unit.blob(arch)))?;
                let counts = listed.get(kernel).ok_or_else(|| format!("{}: no `{kernel}`", unit.blob(arch)))?;
                let shared = shared.get(kernel).copied();
                if shared.is_none() && ["LDS", "STS", "LDSM", "LDGSTS"].iter().any(|used| counts.contains_key(*used)) {
                    let kernels = prebuilt.sources.display();
                    return Err(format!(
                        "{kernels}/manifest.toml says of no shared memory of `{kernel}`, which uses it"
                    ));
                }
                let taken = Taken { registers: resources.registers, threads, shared: shared.unwrap_or(0) };
                lines.entry(kernel.clone()).or_default().push(line(arch, taken, resources.spills, counts));
            }
        }
        for (kernel, of_archs) in lines {
            for (i, line) in of_archs.iter().enumerate() {
                let _ = writeln!(text, "{:<36}{line}", if i == 0 { kernel.as_str() } else { "" });
            }
        }
    }
    Ok(text)
}

fn line(arch: &str, taken: Taken, spills: u32, counts: &BTreeMap<String, u32>) -> String {
    let Taken { registers, threads, shared } = taken;
    let mut text = format!("{arch:<8}{registers:>4}{spills:>6}{threads:>8}{shared:>8}");
    match multiprocessor(arch) {
        Some(of) => {
            let (blocks, limit) = occupancy(&of, taken);
            let warps = format!("{}/{}", blocks * threads.div_ceil(WARP), of.threads / WARP);
            let _ = write!(text, "{blocks:>7}  {limit:<14}{warps:>7}");
        }
        None => _ = write!(text, "{:>7}  {:<14}{:>7}", "?", "not known", "?"),
    }
    let _ = write!(text, "{:>7}", counts.values().sum::<u32>());
    for mnemonic in COUNTED {
        match counts.get(mnemonic) {
            Some(count) => _ = write!(text, "{count:>8}"),
            None => _ = write!(text, "{:>8}", "."),
        }
    }
    text
}

/// Kernel -> mnemonic -> how often, by NVIDIA's disassembler.
fn instructions(
    nvdisasm: &Path,
    scratch: &Path,
    cubin: &[u8],
) -> Result<BTreeMap<String, BTreeMap<String, u32>>, String> {
    std::fs::write(scratch, cubin).map_err(|error| format!("{}: {error}", scratch.display()))?;
    let output = Command::new(nvdisasm).arg("-c").arg(scratch).output();
    let _ = std::fs::remove_file(scratch);
    let output = output.map_err(|error| format!("{}: {error}", nvdisasm.display()))?;
    if !output.status.success() {
        return Err(format!("nvdisasm: {}", String::from_utf8_lossy(&output.stderr).trim_end()));
    }
    Ok(counted(&String::from_utf8_lossy(&output.stdout)))
}

/// Reads lines such as `        /*0260*/               @P0 LDG.E.128 R8, desc[UR4][R12.64] ;`, without what fills up the
/// end of the code.
fn counted(listing: &str) -> BTreeMap<String, BTreeMap<String, u32>> {
    let mut kernels: BTreeMap<String, BTreeMap<String, u32>> = BTreeMap::new();
    let mut current = None;
    for line in listing.lines() {
        if let Some(rest) = line.trim_start().strip_prefix(".section\t.text.") {
            current = rest.split(',').next().map(str::to_string);
        }
        let (Some(kernel), Some(rest)) = (&current, line.trim_start().strip_prefix("/*")) else { continue };
        let Some((_, code)) = rest.split_once("*/") else { continue };
        let mut words = code.split_whitespace().filter(|word| !word.starts_with('@') && *word != "{");
        let Some(mnemonic) = words.next().and_then(|word| word.split(['.', ';']).next()) else { continue };
        if mnemonic.is_empty() || mnemonic == "NOP" || mnemonic.starts_with("/*") {
            continue;
        }
        *kernels.entry(kernel.clone()).or_default().entry(mnemonic.to_string()).or_default() += 1;
    }
    kernels
}

/// The most threads of a block, from the cubin's notes on a kernel: entries of a format, a number, a length and so many
/// bytes; number 5 has the three sizes.
fn launch_bounds(cubin: &[u8], kernel: &str) -> Option<u32> {
    const WITH_LENGTH: u8 = 4;
    const MAX_THREADS: u8 = 5;
    let mut notes = section(cubin, &format!(".nv.info.{kernel}"))?;
    let word = |bytes: &[u8]| Some(u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?));
    while let [format, number, low, high, rest @ ..] = notes {
        let length = if *format == WITH_LENGTH { usize::from(u16::from_le_bytes([*low, *high])) } else { 0 };
        let value = rest.get(..length)?;
        if (*format, *number) == (WITH_LENGTH, MAX_THREADS) {
            return Some(word(value)? * word(value.get(4..)?)? * word(value.get(8..)?)?);
        }
        notes = &rest[length..];
    }
    None
}

/// A section of an ELF file of 64 bits, little end first.
fn section<'b>(elf: &'b [u8], name: &str) -> Option<&'b [u8]> {
    let number = |at: usize, bytes: usize| {
        let mut whole = [0; 8];
        whole[..bytes].copy_from_slice(elf.get(at..at + bytes)?);
        usize::try_from(u64::from_le_bytes(whole)).ok()
    };
    let (table, size, count, names) = (number(0x28, 8)?, number(0x3a, 2)?, number(0x3c, 2)?, number(0x3e, 2)?);
    let header = |index: usize| table + index * size;
    let contents = |index: usize| elf.get(number(header(index) + 0x18, 8)?..)?.get(..number(header(index) + 0x20, 8)?);
    let texts = contents(names)?;
    let is_named = |index: &usize| {
        let text = number(header(*index), 4).and_then(|at| texts.get(at..));
        text.is_some_and(|text| text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0)))
    };
    contents((0..count).find(is_named)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(arch: &str, registers: u32, threads: u32, shared: u32) -> (u32, &'static str) {
        occupancy(&multiprocessor(arch).unwrap(), Taken { registers, threads, shared })
    }

    /// As NVIDIA's occupancy calculator has them.
    #[test]
    fn blocks_of_a_multiprocessor_are_limited_by_what_is_scarcest() {
        assert_eq!(blocks("sm_80", 32, 256, 0), (8, "registers"));
        assert_eq!(blocks("sm_80", 16, 1024, 0), (2, "threads"));
        assert_eq!(blocks("sm_80", 16, 32, 0), (32, "blocks"));
        assert_eq!(blocks("sm_90a", 255, 128, 0), (2, "registers"));
        assert_eq!(blocks("sm_90a", 128, 256, 0), (2, "registers"));
        assert_eq!(blocks("sm_90a", 64, 128, 48 << 10), (4, "shared memory"));
        assert_eq!(blocks("sm_120a", 64, 128, 48 << 10), (2, "shared memory"));
        assert_eq!(blocks("sm_89", 40, 128, 0), (12, "registers"));
        assert_eq!(blocks("sm_89", 40, 128, 100 << 10), (0, "shared memory"));
    }

    #[test]
    fn instructions_are_counted_by_kernel() {
        let listing = "\t.section\t.text.one,\"ax\",@progbits\none:\n\
            \x20       /*0000*/                   LDC R1, c[0x0][0x28] ;\n\
            \x20       /*0010*/               @P0 LDG.E.128.CONSTANT R8, desc[UR4][R12.64] ;\n\
            \x20       /*0020*/              @!P0 LDG.E R8, desc[UR4][R12.64] ;\n\
            \x20       /*0030*/                   NOP;\n\
            \t.section\t.text.two,\"ax\",@progbits\n\
            \x20       /*0000*/                   EXIT ;\n";
        let kernels = counted(listing);
        assert_eq!(kernels["one"], BTreeMap::from([("LDC".to_string(), 1), ("LDG".to_string(), 2)]));
        assert_eq!(kernels["two"], BTreeMap::from([("EXIT".to_string(), 1)]));
    }

    #[test]
    fn what_is_no_cubin_has_no_bounds() {
        assert_eq!(launch_bounds(b"", "one"), None);
        assert_eq!(launch_bounds(&[0; 64], "one"), None);
    }
}
