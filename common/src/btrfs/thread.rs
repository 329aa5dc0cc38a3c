//! What a thread that spends its life in one long system call needs: no signals, and a place behind everybody else.
//!
//! The one use of the crate libc: the standard library has no thread signal masks, and those of rustix bypass the C library, which
//! keeps two signals for itself that must never be blocked.

use std::io;

use rustix::thread::Pid;

/// Blocks all signals for the calling thread. Those sent to the process reach its other threads.
pub fn block_signals() -> io::Result<()> {
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigfillset initializes the set that it is given; pthread_sigmask reads it and accepts no place for the old one.
    let failed = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), std::ptr::null_mut())
    };
    if failed == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(failed)) }
}

/// The calling thread, as [`make_idle`] wants it.
pub fn current() -> Pid {
    rustix::thread::gettid()
}

/// Lets a thread of this process run only when nobody else wants the processor (SCHED_IDLE); its disk accesses become idle ones too
/// where the I/O scheduler knows such.
pub fn make_idle(thread: Pid) -> io::Result<()> {
    let priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: sched_setscheduler reads one sched_param; a wrong thread id is an error, no undefined behaviour.
    let failed =
        unsafe { libc::sched_setscheduler(thread.as_raw_nonzero().get(), libc::SCHED_IDLE, &raw const priority) };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
