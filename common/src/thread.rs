//! Threads as the system sees them: which signals they hear, and who runs before whom.
//!
//! By the crate libc: the standard library has no thread signal masks, and those of rustix bypass the C library, which keeps two
//! signals for itself that must never be blocked. Scheduling policies neither of them has.

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

/// Lets the calling thread, and all that it starts from now on, work in long pieces (SCHED_BATCH): when there is something for it to do
/// it waits until whoever runs has had its turn. What moves a block from thread to thread gets several at a time, and whoever else is
/// on the machine is disturbed less. If an operator has chosen a policy for it, that stays.
pub fn be_batch() -> io::Result<()> {
    // SAFETY: a question with a number for an answer.
    match unsafe { libc::sched_getscheduler(0) } {
        libc::SCHED_OTHER => schedule(0, libc::SCHED_BATCH),
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Lets a thread of this process run only when nobody else wants the processor (SCHED_IDLE); its disk accesses become idle ones too
/// where the I/O scheduler knows such.
pub fn make_idle(thread: Pid) -> io::Result<()> {
    schedule(thread.as_raw_nonzero().get(), libc::SCHED_IDLE)
}

/// `thread` is the calling one if it is 0.
fn schedule(thread: libc::pid_t, policy: libc::c_int) -> io::Result<()> {
    let priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: sched_setscheduler reads one sched_param; a wrong thread id is an error, no undefined behaviour.
    let failed = unsafe { libc::sched_setscheduler(thread, policy, &raw const priority) };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use super::*;

    /// Field 41 of stat, counted from behind the name.
    fn policy() -> String {
        let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
        stat.rsplit_once(") ").unwrap().1.split(' ').nth(38).unwrap().to_owned()
    }

    #[test]
    fn a_thread_without_signals_runs_when_nobody_else_does() {
        let (blocked, policy) = std::thread::spawn(|| {
            block_signals().unwrap();
            make_idle(current()).unwrap();
            (fs::read_to_string("/proc/thread-self/status").unwrap(), policy())
        })
        .join()
        .unwrap();
        let blocked = blocked.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap().trim();
        // All 64 but KILL (9), STOP (19), and the C library's own 32 and 33.
        assert_eq!(u64::from_str_radix(blocked, 16).unwrap(), !(1 << 8 | 1 << 18 | 1 << 31 | 1 << 32));
        assert_eq!(policy, libc::SCHED_IDLE.to_string());
    }

    #[test]
    fn what_a_batch_thread_starts_is_batch_too() {
        let ours = policy();
        let inherited = std::thread::spawn(|| {
            be_batch().unwrap();
            std::thread::spawn(policy).join().unwrap()
        })
        .join()
        .unwrap();
        assert_eq!(inherited, libc::SCHED_BATCH.to_string());
        assert_eq!(policy(), ours, "other threads are left alone");
    }

    #[test]
    fn a_policy_that_somebody_chose_stays() {
        let chosen = std::thread::spawn(|| {
            make_idle(current()).unwrap();
            be_batch().unwrap();
            policy()
        })
        .join()
        .unwrap();
        assert_eq!(chosen, libc::SCHED_IDLE.to_string());
    }
}
