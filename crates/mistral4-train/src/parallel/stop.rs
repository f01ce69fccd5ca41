//! How ranks are asked to stop.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Sets `flag` when the process gets SIGUSR1, which `mpirun` hands to its ranks. (What it does of SIGTERM is to kill them a
/// second later, which leaves no time to save.)
///
/// # Errors
/// A system that does not let the signal be watched.
#[cfg(unix)]
pub fn on_user_signal(flag: Arc<AtomicBool>) -> io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut signals = {
        let _inside = runtime.enter();
        signal(SignalKind::user_defined1())?
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            while signals.recv().await.is_some() {
                flag.store(true, Ordering::Relaxed);
            }
        });
    });
    Ok(())
}
