//! From addresses of code to file and line.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// What has been asked before: starting `addr2line` takes longer than most launches.
static KNOWN: Mutex<BTreeMap<u64, String>> = Mutex::new(BTreeMap::new());

/// `faults` with each `@{address}` as file and line, if binutils' `addr2line` is there to tell.
pub fn named(faults: &str) -> String {
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let addresses: Vec<(&str, u64)> = faults
        .split("@{")
        .skip(1)
        .filter_map(|rest| rest.split_once('}'))
        .filter_map(|(text, _)| Some((text, u64::from_str_radix(text, 16).ok()?)))
        .collect();
    let fresh: Vec<u64> = addresses.iter().map(|(_, address)| *address).filter(|a| !known.contains_key(a)).collect();
    if !fresh.is_empty() {
        known.extend(lines_of(&fresh));
    }
    let mut text = faults.to_string();
    for (digits, address) in addresses {
        let line = known.get(&address).cloned().unwrap_or_else(|| format!("code address {digits}"));
        text = text.replace(&format!("@{{{digits}}}"), &line);
    }
    text
}

/// The place of each address: of the functions that were put into one another there, the innermost that is a
/// kernel's own.
fn lines_of(addresses: &[u64]) -> BTreeMap<u64, String> {
    let mut lines = BTreeMap::new();
    let Ok(program) = std::env::current_exe() else { return lines };
    let mut command = Command::new("addr2line");
    command.arg("-a").arg("-i").arg("-e").arg(program);
    // The address is where the call returns to: one byte earlier is the call.
    command.args(addresses.iter().map(|address| format!("{:#x}", address - 1)));
    let Ok(output) = command.output() else { return lines };
    let said = String::from_utf8_lossy(&output.stdout);
    // A line with the address, then one per function.
    let mut groups: Vec<Vec<&str>> = Vec::new();
    for line in said.lines() {
        if line.starts_with("0x") {
            groups.push(Vec::new());
        } else if let Some(group) = groups.last_mut() {
            group.push(line);
        }
    }
    for (address, group) in addresses.iter().zip(groups) {
        let own = group.iter().find(|line| !line.contains("emulated.hpp") && !line.contains("dev.cuh"));
        if let Some(line) = own.or(group.first())
            && !line.starts_with("??")
        {
            let file_and_line = line.rsplit('/').next().unwrap_or(line);
            lines.insert(*address, file_and_line.split(" (discriminator").next().unwrap_or(line).to_string());
        }
    }
    lines
}
