//! Snapshots that wait for a receiver that is away: which they are, and which of them go when there are too many. Pure.
//!
//! Each pins what was in the source when it was taken. The base of the next increment does so already and must stay, or the next
//! transfer would be a full one. Those between the base and the newest are history that nobody needs to go on.

use std::{cmp::Reverse, num::NonZeroU32};

use common::{
    retention::{Plan, Reason, newest_first},
    snapshot::{Snapshot, SnapshotId},
};

/// Those of `ours` that are newer than `known`, which the receiver has; all if it is not known to have any.
pub fn newer(ours: &[Snapshot], known: Option<&Snapshot>) -> Vec<Snapshot> {
    let newer = |snapshot: &&Snapshot| known.is_none_or(|known| newest_first(snapshot) < newest_first(known));
    ours.iter().filter(newer).cloned().collect()
}

/// Lets the oldest of the unsent snapshots go until at most `max` of them stay, or until only those are left that are in use: the
/// newest, an unfinished one, a base.
pub fn cap(plan: &mut Plan, unsent: &[Snapshot], max: NonZeroU32) {
    let is_unsent = |snapshot: &Snapshot| unsent.contains(snapshot);
    let staying = plan.keep.iter().filter(|(snapshot, _)| is_unsent(snapshot)).count();
    let too_many = staying.saturating_sub(max.get() as usize);
    let can_go = |reasons: &[Reason]| reasons.iter().all(|reason| reason.is_policy() || *reason == Reason::Unsent);
    let going = plan.keep.iter().rev().filter(|(snapshot, reasons)| is_unsent(snapshot) && can_go(reasons));
    let going: Vec<SnapshotId> = going.take(too_many).map(|(snapshot, _)| snapshot.id).collect();
    let gone = plan.keep.extract_if(.., |(snapshot, _)| going.contains(&snapshot.id));
    plan.delete.extend(gone.map(|(snapshot, _)| snapshot));
    plan.delete.sort_by_cached_key(|snapshot| Reverse(newest_first(snapshot)));
}

#[cfg(test)]
mod tests {
    use common::retention::{self, Policy};
    use jiff::Timestamp;
    use uuid::Uuid;

    use super::*;

    fn snapshot(number: u64) -> Snapshot {
        let id = SnapshotId { uuid: Uuid::from_u128(u128::from(number)), ctransid: number };
        Snapshot { name: format!("v.20260101T0000{number:02}Z").parse().unwrap(), id }
    }

    fn some(count: u32) -> NonZeroU32 {
        NonZeroU32::new(count).unwrap()
    }

    /// What stays of 1 to 9, of which 2 is the last that the receiver is known to have.
    fn stays(policy: Policy, kept: &[(u64, Reason)], max: u32) -> Vec<u64> {
        let ours: Vec<Snapshot> = (1..=9).map(snapshot).collect();
        let kept: Vec<_> = kept.iter().map(|(number, reason)| (snapshot(*number).id, reason.clone())).collect();
        let mut plan = retention::plan(&ours, &policy, Timestamp::UNIX_EPOCH, &kept);
        cap(&mut plan, &newer(&ours, Some(&snapshot(2))), some(max));
        assert!(plan.delete.is_sorted_by_key(|gone| gone.id.ctransid));
        assert_eq!(plan.keep.len() + plan.delete.len(), ours.len());
        plan.keep.iter().map(|(snapshot, _)| snapshot.id.ctransid).collect()
    }

    #[test]
    fn the_oldest_of_the_unsent_go_and_what_is_in_use_stays() {
        let all = Policy::last(some(9));
        let base = [(2, Reason::Base)];
        assert_eq!(stays(all, &base, 7), [9, 8, 7, 6, 5, 4, 3, 2, 1], "few enough");
        assert_eq!(stays(all, &base, 3), [9, 8, 7, 2, 1], "what was sent is not counted");
        assert_eq!(stays(all, &base, 1), [9, 2, 1]);
        let both = [(2, Reason::Base), (4, Reason::Unfinished)];
        assert_eq!(stays(all, &both, 3), [9, 8, 4, 2, 1]);
        assert_eq!(stays(all, &both, 1), [9, 4, 2, 1], "one too many, but each is in use");
        assert_eq!(stays(Policy::last(some(2)), &base, 5), [9, 8, 2], "never more than the policy keeps");
    }

    #[test]
    fn those_that_will_be_sent_go_too_when_there_are_too_many() {
        let unsent: Vec<(u64, Reason)> = (3..=9).map(|number| (number, Reason::Unsent)).collect();
        assert_eq!(stays(Policy::NONE, &unsent, 9), [9, 8, 7, 6, 5, 4, 3]);
        assert_eq!(stays(Policy::NONE, &unsent, 2), [9, 8]);
    }

    #[test]
    fn all_are_unsent_if_the_receiver_has_none() {
        let ours: Vec<Snapshot> = (1..=3).map(snapshot).collect();
        assert_eq!(newer(&ours, None), ours);
        assert_eq!(newer(&ours, Some(&snapshot(2))), [snapshot(3)]);
        assert_eq!(newer(&ours, Some(&snapshot(7))), []);
    }
}
