//! The command `mistral4`.

use std::process::ExitCode;

/// Keeps the memory of activations for the next step instead of returning it: the system would clear every page of it
/// again, which costs a training step a third of its time.
#[cfg(not(target_env = "msvc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Settings of the allocator: huge pages where the system allows them, and nothing is given back.
/// `_RJEM_MALLOC_CONF` in the environment overrides them.
#[cfg(not(target_env = "msvc"))]
#[allow(unsafe_code, reason = "the allocator finds its settings by this symbol")]
// SAFETY: the symbol belongs to the allocator above, which reads a C string through it.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static MALLOC_CONF: &std::ffi::c_char = {
    const SETTINGS: &std::ffi::CStr = c"thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1";
    // SAFETY: a C string is not empty.
    unsafe { &*SETTINGS.as_ptr() }
};

fn main() -> ExitCode {
    mistral4_cli::run(std::env::args_os())
}
