//! Which snapshots stay and which go, with the reasons. Pure: a plan is a value, printed by one, executed by another.
//!
//! Whatever the policy says, the newest snapshot stays, and so does every one that is in use: what a snapshot is in use *for* is
//! the caller's knowledge, handed in as reasons.

use std::{cmp::Reverse, fmt, num::NonZeroU32};

use crate::snapshot::{Snapshot, SnapshotId, SnapshotName};

/// How many snapshots an operator wants to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// The newest so many.
    pub last: NonZeroU32,
}

impl Default for Policy {
    /// The last three.
    fn default() -> Self {
        Self { last: NonZeroU32::MIN.saturating_add(2) }
    }
}

/// Why a snapshot stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// It is the newest of its volume.
    Newest,
    /// The policy keeps this many, and it is among them.
    Last(u32),
    /// The next increment builds on it.
    Base,
    /// Clients see it.
    Published,
    /// Clients that began earlier may still read it.
    Retiring,
    /// A transfer of it is under way, or was interrupted and will go on.
    Unfinished,
    /// An operator said never to delete it.
    Held,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Newest => f.write_str("newest"),
            Self::Last(1) => f.write_str("keep.last = 1"),
            Self::Last(count) => write!(f, "among keep.last = {count}"),
            Self::Base => f.write_str("base of the next increment"),
            Self::Published => f.write_str("published"),
            Self::Retiring => f.write_str("retiring: has clients"),
            Self::Unfinished => f.write_str("transfer unfinished"),
            Self::Held => f.write_str("held"),
        }
    }
}

/// What stays and what goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// What stays and all the reasons why, at least one each; the newest first.
    pub keep: Vec<(Snapshot, Vec<Reason>)>,
    /// What goes, in the order in which to delete: the oldest first.
    pub delete: Vec<Snapshot>,
}

/// Divides the snapshots of one volume, given in any order, into those that stay and those that go.
///
/// `kept` names the snapshots that are in use, as many times as there are reasons; one that is not among `snapshots` is of no
/// consequence.
pub fn plan(snapshots: &[Snapshot], policy: &Policy, kept: &[(SnapshotId, Reason)]) -> Plan {
    let mut ordered: Vec<&Snapshot> = snapshots.iter().collect();
    ordered.sort_by_cached_key(|snapshot| newest_first(snapshot));
    let mut plan = Plan::default();
    for (place, snapshot) in ordered.into_iter().enumerate() {
        let newest = (place == 0).then_some(Reason::Newest);
        let last = (place as u64) < u64::from(policy.last.get());
        let last = last.then_some(Reason::Last(policy.last.get()));
        let in_use = kept.iter().filter(|(id, _)| *id == snapshot.id).map(|(_, reason)| *reason);
        let reasons: Vec<Reason> = newest.into_iter().chain(last).chain(in_use).collect();
        if reasons.is_empty() {
            plan.delete.push(snapshot.clone());
        } else {
            plan.keep.push((snapshot.clone(), reasons));
        }
    }
    plan.delete.reverse();
    plan
}

/// The key that sorts snapshots of a volume, the newest first.
///
/// Snapshots between which nothing was written have the same ctransid; then the time in the name decides, the same on both sides.
pub fn newest_first(snapshot: &Snapshot) -> Reverse<(u64, SnapshotName)> {
    Reverse((snapshot.id.ctransid, snapshot.name.clone()))
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    /// A snapshot with everything made from two numbers: the transaction, and the second of its name.
    fn snapshot(ctransid: u64, second: i64) -> Snapshot {
        let name = SnapshotName::new("v".parse().unwrap(), Timestamp::from_second(second).unwrap());
        let uuid = Uuid::from_u64_pair(ctransid, second.unsigned_abs());
        Snapshot { name, id: SnapshotId { uuid, ctransid } }
    }

    fn keep(last: u32) -> Policy {
        Policy { last: NonZeroU32::new(last).unwrap() }
    }

    #[test]
    fn the_last_stay_and_so_does_what_is_in_use() {
        let all: Vec<Snapshot> = (1..=6).map(|i| snapshot(i, 1000 + i as i64)).collect();
        let kept = [(all[0].id, Reason::Held), (all[4].id, Reason::Published), (all[0].id, Reason::Base)];
        let plan = plan(&all, &keep(2), &kept);
        let expected = [
            (all[5].clone(), vec![Reason::Newest, Reason::Last(2)]),
            (all[4].clone(), vec![Reason::Last(2), Reason::Published]),
            (all[0].clone(), vec![Reason::Held, Reason::Base]),
        ];
        assert_eq!(plan.keep, expected);
        assert_eq!(plan.delete, [all[1].clone(), all[2].clone(), all[3].clone()]);
    }

    #[test]
    fn the_transaction_decides_what_is_newest_not_the_clock() {
        let (older, newer) = (snapshot(7, 9_999_999), snapshot(8, 1));
        assert_eq!(plan(&[older.clone(), newer.clone()], &keep(1), &[]).delete, [older]);
        let (first, second) = (snapshot(8, 1), snapshot(8, 2));
        assert_eq!(plan(&[second, first.clone()], &keep(1), &[]).delete, [first]);
    }

    #[test]
    fn of_nothing_nothing_goes() {
        assert_eq!(plan(&[], &Policy::default(), &[(snapshot(1, 1).id, Reason::Held)]), Plan::default());
        assert_eq!(Policy::default(), keep(3));
    }

    fn reason() -> impl Strategy<Value = Reason> {
        prop::sample::select(vec![Reason::Base, Reason::Published, Reason::Retiring, Reason::Unfinished, Reason::Held])
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_nothing_in_use_goes(
            transactions in prop::collection::vec((0..20_u64, 0..1000_i64), 0..30),
            last in 1..10_u32,
            in_use in prop::collection::vec((0..40_usize, reason()), 0..10),
        ) {
            let all: Vec<Snapshot> = transactions.iter().map(|&(ctransid, second)| snapshot(ctransid, second)).collect();
            let stranger = snapshot(100, 100);
            let kept: Vec<_> =
                in_use.iter().map(|&(i, reason)| (all.get(i).unwrap_or(&stranger).id, reason)).collect();
            let plan = plan(&all, &keep(last), &kept);

            let mut both: Vec<Snapshot> = plan.keep.iter().map(|(snapshot, _)| snapshot.clone()).collect();
            both.extend(plan.delete.iter().rev().cloned());
            prop_assert_eq!(both.len(), all.len());
            prop_assert!(all.iter().all(|snapshot| both.contains(snapshot)));
            prop_assert!(plan.keep.iter().all(|(_, reasons)| !reasons.is_empty()));
            prop_assert!(plan.keep.len() >= all.len().min(last as usize));
            prop_assert!(plan.keep.is_sorted_by_key(|(snapshot, _)| newest_first(snapshot)));
            prop_assert!(plan.delete.is_sorted_by_key(|snapshot| Reverse(newest_first(snapshot))));
            for gone in &plan.delete {
                prop_assert!(kept.iter().all(|(id, _)| *id != gone.id));
                prop_assert!(all.iter().any(|other| newest_first(other) < newest_first(gone)));
            }
            // Deleting what the plan says and planning again changes nothing.
            let rest: Vec<Snapshot> = plan.keep.iter().map(|(snapshot, _)| snapshot.clone()).collect();
            prop_assert_eq!(super::plan(&rest, &keep(last), &kept).delete, []);
        }
    }
}
