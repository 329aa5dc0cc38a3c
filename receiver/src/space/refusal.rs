//! What is said when there is too little room: what is short, which snapshots hold how much and why they stay, what would help.

use std::{
    cmp::Reverse,
    error::Error,
    fmt::Write as _,
    sync::Arc,
    time::{Duration, Instant},
};

use common::{
    btrfs,
    exit::chain,
    retention::Reason,
    size::human_bytes,
    snapshot::{Snapshot, SnapshotId},
    wire::message::{Offer, Refusal},
};
use jiff::Timestamp;
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::{
    Claim, Verdict,
    holdings::Holdings,
    make::blocking,
    room::{Holder, Look},
};
use crate::{
    apply::ApplyError,
    checkpoint::Checkpoint,
    receive::ReceiveError,
    store::StoreError,
    volume::{Refused, Volume},
};

/// How long the trees may be read only to name, in a refusal, what each snapshot holds.
const MAX_TELL_TIME: Duration = Duration::from_secs(20);

/// A refusal names so many snapshots.
const MAX_TOLD: usize = 10;

/// The refusal for a transfer that ran out of room in spite of all: others write too. It has been stopped before.
pub async fn ran_out(volume: &Arc<Volume>, claim: &Arc<Claim>, offer: &Offer, error: &ApplyError) -> Refused {
    let (ours, claim, offer, error) = (Arc::clone(volume), Arc::clone(claim), offer.clone(), chain(error));
    let refusal = move || {
        let checkpoint = Checkpoint::load(&ours.store).filter(|checkpoint| checkpoint.fits(&offer));
        let look = ours.room.look(&claim, checkpoint.map_or(0, |checkpoint| checkpoint.position))?;
        let head = format!("the file system ran full in the middle of the transfer: {error}; ");
        Ok(refuse(&ours, &offer.snapshot, &look, &head, &CancellationToken::new()))
    };
    blocking(refusal).await.unwrap_or_else(|refused| refused)
}

/// Whether a transfer failed because there was no room.
pub fn is_no_room(error: &ApplyError) -> bool {
    // What the kernel said, as `btrfs receive` repeats it in the language of LC_ALL=C.
    const WORDS: [&str; 2] = ["No space left on device", "Disk quota exceeded"];
    if let ApplyError::Receive(ReceiveError::Ended { stderr, .. }) = error {
        return WORDS.iter().any(|words| stderr.contains(words));
    }
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let errno = error.downcast_ref().and_then(Errno::from_io_error);
        if matches!(errno, Some(Errno::NOSPC | Errno::DQUOT)) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The refusal of a snapshot for which there is too little room, as `look` found; with all that is worth knowing.
pub(super) fn refuse(
    volume: &Volume,
    snapshot: &Snapshot,
    look: &Look,
    head: &str,
    stop: &CancellationToken,
) -> Refused {
    let Look { verdict, space, limits, need, others, knows_total } = look;
    let mut detail = format!("no room for {snapshot} in {}: {head}", volume.store.dir().display());
    if !knows_total {
        detail.push_str("what it needs is not known yet, but next to nothing fits; it ");
    }
    let (need, have) = match verdict {
        Verdict::Short(short) => {
            detail.push_str(&short.explain(space, *limits, *others));
            (short.need, short.have)
        }
        Verdict::Fits => {
            detail.push_str("there is room again by now");
            (need.data, space.free)
        }
    };
    match told(volume, stop) {
        Ok(told) => detail.push_str(&told),
        Err(error) => {
            // The refusal stands without it.
            tracing::warn!(volume = %volume.config.name, error = chain(&error), "cannot tell what the snapshots hold");
        }
    }
    Refused { why: Refusal::NoSpace { need, have }, detail }
}

/// What each snapshot holds and why it stays, the largest first; and what is on its way out.
fn told(volume: &Volume, stop: &CancellationToken) -> Result<String, StoreError> {
    let room = &volume.room;
    let holders = room.holders()?;
    let end = Instant::now() + MAX_TELL_TIME;
    let stop = || stop.is_cancelled() || Instant::now() > end;
    let counted = if room.has_given_up(&holders) { None } else { room.count(&holders, stop)? };
    let snapshots: Vec<Snapshot> = room.store.snapshots()?.into_iter().map(|found| found.snapshot).collect();
    let plan = volume.retention(&snapshots, Timestamp::now());
    let why = |id: Option<SnapshotId>| -> String {
        let kept = plan.keep.iter().find(|(snapshot, _)| Some(snapshot.id) == id);
        kept.map_or_else(String::new, |(_, reasons)| format!(" ({})", listed(reasons)))
    };
    let mut text = String::new();
    let mut each: Vec<(&Holder, Option<u64>)> = match &counted {
        Some(holdings) => holders.iter().zip(holdings.alone.iter().copied().map(Some)).collect(),
        None => holders.iter().map(|holder| (holder, None)).collect(),
    };
    each.sort_by_key(|(_, alone)| Reverse(*alone));
    if let Some(Holdings { total, .. }) = counted {
        let _ = write!(text, "; its snapshots take {} together", human_bytes(total));
    }
    for (Holder { name, id, .. }, alone) in each.iter().take(MAX_TOLD) {
        let alone = alone.map_or_else(String::new, |alone| format!(" {} alone", human_bytes(alone)));
        let _ = write!(text, "; {name}{alone}{}", why(*id));
    }
    if each.len() > MAX_TOLD {
        let _ = write!(text, "; and {} more", each.len() - MAX_TOLD);
    }
    let pending = btrfs::being_deleted(room.store.dir())?.len();
    if pending > 0 {
        let _ = write!(text, "; {pending} deleted subvolumes are not gone yet");
    }
    Ok(text)
}

fn listed(reasons: &[Reason]) -> String {
    reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
