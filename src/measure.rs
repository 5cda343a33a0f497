//! Time, processor and memory of this process, as the system tells them.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

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

/// Memory of this machine, or what a control group leaves of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// Bytes there are in all.
    pub total: u64,
    /// What can be had now without swapping.
    pub available: u64,
}

/// `None` where the system does not tell.
pub fn host_memory() -> Option<HostMemory> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut memory = of_meminfo(&meminfo)?;
    for limit in limits(&groups, Path::new("/sys/fs/cgroup")) {
        memory.total = memory.total.min(limit.total);
        memory.available = memory.available.min(limit.available);
    }
    Some(memory)
}

fn of_meminfo(text: &str) -> Option<HostMemory> {
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
    };
    let total = kib("MemTotal")?;
    Some(HostMemory { total, available: kib("MemAvailable").unwrap_or(total) })
}

/// The limits of the control groups this process is in, and of those around them, in either version's layout.
fn limits(groups: &str, root: &Path) -> Vec<HostMemory> {
    let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let mut found = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (top, limit, usage, cache) = match controllers {
            "" => (root.to_path_buf(), "memory.max", "memory.current", "inactive_file "),
            names if names.split(',').any(|name| name == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
            }
            _ => continue,
        };
        // A container sees its own group as the top, whatever the path says.
        let inside = top.join(path.trim_start_matches('/'));
        for group in inside.ancestors().take_while(|group| group.starts_with(&top)) {
            // Unlimited is a word, or a number that no machine has.
            let Some(total) = number(group.join(limit)).filter(|total| *total < 1 << 60) else { continue };
            let used = number(group.join(usage)).unwrap_or(0);
            // Pages of files that nobody holds are given up first.
            let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
            let idle = stat.lines().find_map(|line| line.strip_prefix(cache)?.parse::<u64>().ok()).unwrap_or(0);
            found.push(HostMemory { total, available: total.saturating_sub(used.saturating_sub(idle)) });
        }
    }
    found
}

/// Bytes that are free for this user on the file system of `path`, or of the nearest folder above that is there.
pub fn disk_free(path: &Path) -> Option<u64> {
    let absolute = std::path::absolute(path).ok()?;
    let there = absolute.ancestors().find(|path| path.exists())?;
    let name = CString::new(there.as_os_str().as_bytes()).ok()?;
    let mut found = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the name ends with zero, and the structure is as large as the call writes.
    let done = unsafe { libc::statvfs(name.as_ptr(), found.as_mut_ptr()) };
    if done != 0 {
        return None;
    }
    // SAFETY: written by the call, which succeeded.
    let found = unsafe { found.assume_init() };
    Some(found.f_bavail.saturating_mul(found.f_frsize))
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

/// `812 MiB`, `3.4 GiB`.
pub fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return match value < 10.0 && unit != "B" {
                true => format!("{value:.1} {unit}"),
                false => format!("{value:.0} {unit}"),
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_narrowest_control_group_says_how_much_memory_there_is() {
        let root = tempfile::tempdir().unwrap();
        let group = |name: &str, files: &[(&str, &str)]| {
            let folder = root.path().join(name);
            fs::create_dir_all(&folder).unwrap();
            files.iter().for_each(|(file, text)| fs::write(folder.join(file), text).unwrap());
        };
        group(
            "a",
            &[("memory.max", "3000\n"), ("memory.current", "1200\n"), ("memory.stat", "anon 1\ninactive_file 200\n")],
        );
        group("a/b", &[("memory.max", "max\n")]);
        let found = limits("0::/a/b\n", root.path());
        assert_eq!(found, [HostMemory { total: 3000, available: 2000 }]);
        group("memory/x", &[("memory.limit_in_bytes", "9223372036854771712\n")]);
        group("memory", &[("memory.limit_in_bytes", "500\n"), ("memory.usage_in_bytes", "600\n")]);
        let found = limits("5:cpu,memory:/x\n4:pids:/x\n", root.path());
        assert_eq!(found, [HostMemory { total: 500, available: 0 }]);
    }

    #[test]
    fn the_machine_tells_its_memory_and_its_disk() {
        let text = "MemTotal:       2000 kB\nMemFree: 1 kB\nMemAvailable:    500 kB\n";
        assert_eq!(of_meminfo(text), Some(HostMemory { total: 2_048_000, available: 512_000 }));
        let memory = host_memory().unwrap();
        assert!(memory.available <= memory.total && memory.total > 1 << 20, "{memory:?}");
        assert!(disk_free(Path::new("not/there/yet")).unwrap() > 0);
    }

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
