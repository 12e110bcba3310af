//! Runs one of the crate's parsers on bytes from the fuzzer, and watches its memory.

use peak_alloc::PeakAlloc;

#[path = "../../tests/hostile/targets.rs"]
mod targets;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// # Panics
/// When there is no target of that name, it panics, or it takes more memory than it may.
pub fn run(name: &str, bytes: &[u8]) {
    let target = targets::TARGETS.iter().find(|target| target.name == name).expect("a target of that name");
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    (target.run)(bytes);
    let peak = MEMORY.peak_usage().saturating_sub(before);
    assert!(peak <= target.allowance(bytes), "{peak} bytes of memory for an input of {}", bytes.len());
}
