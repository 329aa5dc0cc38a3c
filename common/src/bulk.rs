//! How the system should treat a process that moves bulk data and is in no hurry: what both agents ask for first of all.

use crate::thread;

/// Asks for it. To be called before there are other threads: they inherit it, as children do. None of it is needed: what cannot be
/// had is done without.
pub fn settle() {
    let _ = thread::be_batch();
    keep_blocks();
}

/// Blocks of the stream come from the heap, and the heap keeps what a transfer needs again at once. By default glibc gives each freed
/// block back to the kernel and faults it in anew with the next one, page by page: some hundredths of what a transfer takes. With
/// another C library nothing happens.
fn keep_blocks() {
    #[cfg(target_env = "gnu")]
    {
        /// Larger than a frame with a block in it, and than the pipe's and the link's buffers.
        const FROM_KERNEL: libc::c_int = 1 << 20;
        /// What each heap may keep of what is free at its end: as much as the blocks of a whole window, which come and go. It is
        /// never more than was needed at a time.
        const KEPT: libc::c_int = 64 << 20;
        // SAFETY: it only sets parameters of the allocator, which it locks for that.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, FROM_KERNEL);
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
        }
    }
}
