//! Ranks as processes that MPI started.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::Duration;

use mpi::Threading;
use mpi::environment::Universe;
use mpi::ffi;
use mpi::traits::{AsRaw, Communicator as _};

use super::{Communicator, Transport};

/// One message has at most this many bytes, since MPI counts in 32 bits.
const LARGEST_MESSAGE: usize = 1 << 30;
/// A wait looks this often without pause, which is the quickest, and then sleeps between bursts of looks, since the core
/// may be needed for computing. A look is also what moves large messages on.
const EAGER_LOOKS: usize = 500;
const BURST: usize = 20;
const PAUSE: Duration = Duration::from_micros(50);

struct MpiTransport {
    universe: Universe,
    rank: usize,
    size: usize,
}

/// Joins the ranks that MPI started; `None` when MPI cannot be used from several threads, or was begun before.
pub fn world() -> Option<Communicator> {
    let (universe, threading) = mpi::initialize_with_threading(Threading::Multiple)?;
    if threading < Threading::Multiple {
        return None;
    }
    let world = universe.world();
    let (rank, size) = (world.rank() as usize, world.size() as usize);
    Some(Communicator::new(Arc::new(MpiTransport { universe, rank, size })))
}

impl Transport for MpiTransport {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn exchange(&self, channel: u32, sends: &[(usize, &[u8])], receives: &mut [(usize, &mut [u8])]) {
        let tag = i32::try_from(channel).expect("there are few channels");
        let world = self.universe.world().as_raw();
        let mut requests = Vec::new();
        for (from, into) in receives {
            for part in into.chunks_mut(LARGEST_MESSAGE) {
                let mut request = MaybeUninit::uninit();
                // SAFETY: the buffer is borrowed mutably, and lives until every request is through, below.
                requests.push(unsafe {
                    let (at, count) = (part.as_mut_ptr().cast::<c_void>(), part.len() as i32);
                    ffi::MPI_Irecv(
                        at,
                        count,
                        ffi::RSMPI_UINT8_T,
                        *from as i32,
                        tag,
                        world,
                        request.as_mut_ptr(),
                    );
                    request.assume_init()
                });
            }
        }
        for &(to, bytes) in sends {
            for part in bytes.chunks(LARGEST_MESSAGE) {
                let mut request = MaybeUninit::uninit();
                // SAFETY: the buffer is borrowed, and lives until every request is through, below.
                requests.push(unsafe {
                    let (at, count) = (part.as_ptr().cast::<c_void>(), part.len() as i32);
                    ffi::MPI_Isend(
                        at,
                        count,
                        ffi::RSMPI_UINT8_T,
                        to as i32,
                        tag,
                        world,
                        request.as_mut_ptr(),
                    );
                    request.assume_init()
                });
            }
        }
        let mut looks = 0;
        loop {
            let mut done = 0;
            // SAFETY: the requests are those begun above; those that are through are marked as such by the call.
            unsafe {
                ffi::MPI_Testall(
                    requests.len() as i32,
                    requests.as_mut_ptr(),
                    &mut done,
                    ffi::RSMPI_STATUSES_IGNORE,
                );
            }
            if done != 0 {
                return;
            }
            looks += 1;
            match looks {
                ..EAGER_LOOKS => std::thread::yield_now(),
                _ if looks % BURST == 0 => std::thread::sleep(PAUSE),
                _ => {}
            }
        }
    }

    fn abort(&self, code: i32) -> ! {
        self.universe.world().abort(code)
    }
}
