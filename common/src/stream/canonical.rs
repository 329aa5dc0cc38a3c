//! The canonical form of a stream: equal for every send of a snapshot, however the kernel chose its clone sources.
//!
//! It has every command that is not about file data, byte for byte without its checksum; a data command only as its range, and
//! ranges that touch are one. TRUNCATE and FALLOCATE are left out too: what a range holds and how long a file is are fixed by
//! the read-only snapshot itself. So are SUBVOL and SNAPSHOT, which only say which snapshot it is. It is the form of the stream
//! as the kernel wrote it, before any rewriting, and that of the stream without file data.

use serde::{Deserialize, Serialize};
use sha2::{
    Digest as _, Sha256,
    digest::common::hazmat::{SerializableState, SerializedState},
};

use super::{
    Mark,
    command::{Command, DataRange},
    error::StreamError,
    format::Kind,
};

/// The canonical digest of a stream, command by command.
#[derive(Debug, Clone)]
pub struct Canonical {
    hash: Sha256,
    count: u64,
    run: Run,
}

/// A [`Canonical`] at a mark, to be kept across a restart.
///
/// It can be carried by anything that serde knows; what it has is SHA-256 in the middle of its work, not a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanonicalState {
    count: u64,
    hash: Vec<u8>,
}

/// Data ranges of one file that touch, so far.
#[derive(Debug, Clone, Default)]
struct Run {
    path: Vec<u8>,
    start: u64,
    end: u64,
    open: bool,
}

impl Default for Canonical {
    fn default() -> Self {
        Self::new()
    }
}

impl Canonical {
    /// Of no command yet.
    pub fn new() -> Self {
        Self { hash: Sha256::new(), count: 0, run: Run::default() }
    }

    /// Takes in the next command. Is there a mark behind it?
    ///
    /// # Errors
    /// If the command is about data and its range cannot be told.
    #[inline]
    pub fn update(&mut self, command: &Command<'_>) -> Result<bool, StreamError> {
        match command.kind() {
            Kind::Subvol | Kind::Snapshot | Kind::Truncate | Kind::Fallocate => return Ok(false),
            Kind::Write | Kind::Clone | Kind::EncodedWrite | Kind::UpdateExtent => {
                if let Some(range) = command.data_range()? {
                    self.data(range);
                }
                return Ok(false);
            }
            _ => {}
        }
        self.run.close(&mut self.hash);
        // Length and command, but not the checksum, which covers nothing else.
        self.hash.update(&command.bytes()[..6]);
        self.hash.update(command.body());
        self.count += 1;
        Ok(command.kind() == Kind::Utimes)
    }

    /// What it was when [`Canonical::state`] was called; None if the state is not one.
    pub fn resume(state: &CanonicalState) -> Option<Self> {
        let state_bytes = SerializedState::<Sha256>::try_from(&state.hash[..]).ok()?;
        let hash = Sha256::deserialize(&state_bytes).ok()?;
        Some(Self { hash, count: state.count, run: Run::default() })
    }

    /// What it is now. To be called at a mark: there no data range is open.
    pub fn state(&self) -> CanonicalState {
        debug_assert!(!self.run.open, "behind a UTIMES no range is open");
        CanonicalState { count: self.count, hash: self.hash.serialize().to_vec() }
    }

    /// Canonical commands so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Where the stream is now. Another send of the snapshot comes by the same value if this is behind a UTIMES.
    pub fn mark(&self) -> Mark {
        let mut hash = self.hash.clone();
        self.run.clone().close(&mut hash);
        Mark { count: self.count, digest: hash.finalize().into() }
    }

    /// [`Self::mark`] at the end of the stream.
    pub fn finish(&self) -> Mark {
        self.mark()
    }

    fn data(&mut self, range: DataRange<'_>) {
        let run = &mut self.run;
        if run.open && run.end == range.start && run.path == range.path {
            run.end = range.end;
            return;
        }
        run.close(&mut self.hash);
        run.path.clear();
        run.path.extend_from_slice(range.path);
        (run.start, run.end, run.open) = (range.start, range.end, true);
    }
}

impl Run {
    fn close(&mut self, hash: &mut Sha256) {
        if std::mem::take(&mut self.open) {
            hash.update(b"D");
            hash.update(self.start.to_le_bytes());
            hash.update(self.end.to_le_bytes());
            hash.update(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::{
        StreamError, encode,
        samples::{BASE, ID, Sample},
        walk::Item,
    };

    fn canonical(sample: &Sample) -> (Mark, Vec<Mark>) {
        let mut canonical = Canonical::new();
        let mut marks = Vec::new();
        let walked = sample.walk::<StreamError>(7, |item| {
            if let Item::Command { command, .. } = item
                && canonical.update(&command)?
            {
                marks.push(canonical.mark());
            }
            Ok(())
        });
        assert_eq!(walked, Ok(()));
        (canonical.finish(), marks)
    }

    #[test]
    fn how_data_comes_makes_no_difference() {
        let mut whole = Sample::begun(2, None);
        whole.make(Kind::Mkfile, b"a").write(b"a", 0, &[1; 3000]).write(b"b", 5, b"x").truncate(b"a", 9).utimes(b"a");
        let mut pieces = Sample::begun(2, Some(BASE));
        pieces.make(Kind::Mkfile, b"a").write(b"a", 0, &[2; 1000]).clone_to(1000, ID, b"a", b"c", 500);
        pieces.update_extent(b"a", 1500, 1500).write(b"b", 5, b"y").utimes(b"a");
        assert_eq!(canonical(whole.end()), canonical(pieces.end()));
    }

    #[test]
    fn what_is_not_about_data_and_which_ranges_are_filled_makes_one() {
        let sample = |edit: fn(&mut Sample)| {
            let mut sample = Sample::begun(2, None);
            sample.make(Kind::Mkfile, b"a").write(b"a", 0, b"xy");
            edit(&mut sample);
            canonical(sample.utimes(b"a").end()).0
        };
        let edits: [fn(&mut Sample); 5] = [
            |_| {},
            |s| _ = s.write(b"a", 2, b"z"),
            |s| _ = s.write(b"a", 3, b"z"),
            |s| _ = s.write(b"b", 2, b"z"),
            |s| _ = s.make(Kind::Mkfile, b"b"),
        ];
        let marks: Vec<Mark> = edits.map(sample).to_vec();
        for (i, mark) in marks.iter().enumerate() {
            assert!(!marks[..i].contains(mark), "edit {i} makes no difference");
        }
    }

    #[test]
    fn marks_stand_behind_utimes_and_hold_what_came_before() {
        let mut short = Sample::begun(1, None);
        short.make(Kind::Mkfile, b"a").write(b"a", 0, b"x").utimes(b"a");
        let mut long = short.clone();
        long.write(b"b", 0, b"x").utimes(b"b").end();
        let (end, marks) = canonical(&long);
        assert_eq!(marks.iter().map(|mark| mark.count).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(end.count, 4);
        let mut same = Canonical::new();
        let _ = short.walk::<StreamError>(1 << 20, |item| {
            if let Item::Command { command, .. } = item {
                same.update(&command)?;
            }
            Ok(())
        });
        assert_eq!(same.mark(), marks[0]);
    }

    fn chmod(path: &[u8], kind: Kind) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(kind.number(), &[(15, path)], 2, &mut bytes);
        bytes
    }

    #[test]
    fn an_interrupted_digest_goes_on_as_if_nothing_had_happened() {
        let commands: Vec<Vec<u8>> = (0..200u32).map(|n| chmod(format!("dir/{n}").as_bytes(), Kind::Utimes)).collect();
        let mut whole = Canonical::new();
        let mut broken = Canonical::new();
        for bytes in &commands {
            let command = Command::first(bytes, 2, 0).unwrap().unwrap();
            whole.update(&command).unwrap();
            broken.update(&command).unwrap();
            broken = Canonical::resume(&broken.state()).unwrap();
        }
        assert_eq!(whole.finish(), broken.finish());
        assert_eq!(whole.count(), 200);
        let bad = CanonicalState { count: 1, hash: vec![0; 3] };
        assert!(Canonical::resume(&bad).is_none());
    }
}
