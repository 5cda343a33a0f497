//! Time, processor and memory of this process, as the system tells them.

use std::collections::BTreeMap;
use std::fs;

/// CPU seconds of the process and of the programs it waited for, user and system together.
pub fn process_cpu_s() -> f64 {
    // Fields 14 to 17 of `/proc/self/stat`, counted after the program's name, which may hold blanks.
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
    let ticks: u64 = fields.skip(11).take(4).filter_map(|field| field.parse::<u64>().ok()).sum();
    // USER_HZ is 100 on every Linux this runs on.
    ticks as f64 / 100.0
}

/// The largest resident size since the start, or since [`reset_peak`].
pub fn peak_memory_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Lets the peak begin anew, where the system allows it.
pub fn reset_peak() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// Host, system and processor, for the record.
pub fn machine() -> BTreeMap<String, String> {
    let first_line = |path: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().next().unwrap_or_default().trim().to_string()
    };
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    [
        ("host", first_line("/proc/sys/kernel/hostname")),
        ("system", format!("{} {}", std::env::consts::OS, first_line("/proc/sys/kernel/osrelease"))),
        ("architecture", std::env::consts::ARCH.to_string()),
        ("processor", model.map_or(String::new(), |(_, name)| name.trim().to_string())),
        ("threads", threads.to_string()),
    ]
    .into_iter()
    .filter(|(_, value)| !value.is_empty())
    .map(|(name, value)| (name.to_string(), value))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_covers_what_is_held_and_cpu_time_grows() {
        let before = process_cpu_s();
        let held = vec![1u8; 64 << 20];
        assert!(peak_memory_bytes().is_none_or(|peak| peak >= held.len() as u64));
        let mut x = held.iter().map(|&b| u64::from(b)).sum::<u64>();
        while process_cpu_s() < before + 0.02 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        }
        assert!(std::hint::black_box(x) != 0);
        assert!(machine().contains_key("architecture"));
    }
}
