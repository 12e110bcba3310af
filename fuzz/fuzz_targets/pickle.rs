#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| burn_moe_fuzz::run("pickle", bytes));
