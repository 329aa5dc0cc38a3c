//! What a cycle has to send: a pure function of what both sides have. `plan` prints its result, `cycle` executes it.

use std::fmt;

use common::{
    retention::newest_first,
    snapshot::{Snapshot, SnapshotId},
    wire::message::Inventory,
};

/// What a cycle has to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// There is no snapshot yet.
    NoSnapshot,
    /// The newest snapshot is on the other side, and published; or it would be, had not an operator there pinned another.
    UpToDate(Snapshot),
    /// Send `snapshot`; if the receiver has it already, complete but unpublished, it only publishes it.
    Send {
        /// The newest of ours.
        snapshot: Snapshot,
        /// What the stream starts from.
        base: Base,
        /// Whether it was interrupted, and goes on.
        resumed: bool,
    },
}

/// Which snapshots are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The newest; those in between are skipped.
    Newest,
    /// All, in their order.
    Every,
}

/// What a send starts from, with the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Base {
    /// The newest of our snapshots that the receiver has too.
    Common(Snapshot),
    /// The receiver has nothing of this volume: a full send, as expected.
    FirstTransfer,
    /// The receiver has snapshots, but none that we have too: a full send that nobody hoped for.
    NoneInCommon {
        /// How many snapshots the receiver has that are of no use.
        theirs: usize,
    },
}

impl Base {
    /// The snapshot, unless the send is full.
    pub fn snapshot(&self) -> Option<&Snapshot> {
        match self {
            Self::Common(base) => Some(base),
            Self::FirstTransfer | Self::NoneInCommon { .. } => None,
        }
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Common(base) => write!(f, "{base} (the newest that both sides have)"),
            Self::FirstTransfer => f.write_str("none, a full send (the receiver has nothing of this volume yet)"),
            Self::NoneInCommon { theirs } => {
                write!(f, "none, a full send (the receiver has {theirs} snapshots, but none that is here too)")
            }
        }
    }
}

/// Decides what to send. `ours` are our read-only snapshots of the volume, in any order.
///
/// A snapshot is older or newer by its ctransid, not by a clock, unless nothing changed between the two. A base must be older than what is sent: the kernel would
/// compute a difference backwards too, but a replica that goes back in time is never what an operator expects.
pub fn plan(ours: &[Snapshot], inventory: &Inventory, which: Which) -> Plan {
    if let Some((snapshot, base)) = unfinished(ours, inventory) {
        return Plan::Send { snapshot, base, resumed: true };
    }
    let Some(newest) = ours.iter().min_by_key(|snapshot| newest_first(snapshot)) else {
        return Plan::NoSnapshot;
    };
    let is_there = match inventory.pinned {
        true => has(inventory, newest.id),
        false => inventory.published.as_ref().is_some_and(|published| published.id == newest.id),
    };
    if is_there {
        return Plan::UpToDate(newest.clone());
    }
    let newest = match which {
        Which::Newest => newest,
        Which::Every => next(ours, inventory).unwrap_or(newest),
    };
    let common = ours
        .iter()
        .filter(|snapshot| newest_first(snapshot) > newest_first(newest) && has(inventory, snapshot.id))
        .min_by_key(|snapshot| newest_first(snapshot));
    let base = match common {
        Some(base) => Base::Common(base.clone()),
        None if inventory.snapshots.is_empty() => Base::FirstTransfer,
        None => Base::NoneInCommon { theirs: inventory.snapshots.len() },
    };
    Plan::Send { snapshot: newest.clone(), base, resumed: false }
}

/// The transfer that was interrupted, if both sides still have what it needs. It is finished first, whatever is newer: days of work
/// are not thrown away for an hour's news.
fn unfinished(ours: &[Snapshot], inventory: &Inventory) -> Option<(Snapshot, Base)> {
    let unfinished = inventory.unfinished.as_ref()?;
    let is_ours = |wanted: &Snapshot| ours.iter().any(|snapshot| snapshot == wanted);
    if !is_ours(&unfinished.snapshot) {
        return None;
    }
    match &unfinished.base {
        None => Some((unfinished.snapshot.clone(), Base::FirstTransfer)),
        Some(base) if is_ours(base) && has(inventory, base.id) => {
            Some((unfinished.snapshot.clone(), Base::Common(base.clone())))
        }
        Some(_) => None,
    }
}

/// The oldest of ours that is newer than all that the receiver has; None if it has none of ours.
fn next<'a>(ours: &'a [Snapshot], inventory: &Inventory) -> Option<&'a Snapshot> {
    let common =
        ours.iter().filter(|snapshot| has(inventory, snapshot.id)).min_by_key(|snapshot| newest_first(snapshot))?;
    let newer = ours.iter().filter(|snapshot| newest_first(snapshot) < newest_first(common));
    newer.max_by_key(|snapshot| newest_first(snapshot)).or(Some(common))
}

fn has(inventory: &Inventory, id: SnapshotId) -> bool {
    inventory.snapshots.iter().any(|snapshot| snapshot.id == id)
}

#[cfg(test)]
mod tests {
    use common::wire::message::Unfinished;

    use super::*;

    /// The n-th snapshot of a volume; its name says the same as its number unless `name` differs (a clock that went back).
    fn snapshot(number: u64, name: u64) -> Snapshot {
        let uuid = uuid::Uuid::from_u128(u128::from(number));
        Snapshot {
            name: format!("v.20260101T0000{name:02}Z").parse().unwrap(),
            id: SnapshotId { uuid, ctransid: number },
        }
    }

    fn inventory(snapshots: &[u64], published: Option<u64>) -> Inventory {
        Inventory {
            snapshots: snapshots.iter().map(|&n| snapshot(n, n)).collect(),
            published: published.map(|n| snapshot(n, n)),
            unfinished: None,
            stream_version: 2,
            pinned: false,
        }
    }

    fn ours(numbers: &[u64]) -> Vec<Snapshot> {
        numbers.iter().map(|&n| snapshot(n, n)).collect()
    }

    #[test]
    fn the_base_is_the_newest_that_both_sides_have() {
        let expected = Plan::Send { snapshot: snapshot(5, 5), base: Base::Common(snapshot(3, 3)), resumed: false };
        assert_eq!(plan(&ours(&[1, 2, 3, 5]), &inventory(&[1, 3, 4], Some(3)), Which::Newest), expected);
        assert_eq!(
            plan(&ours(&[5, 3, 2, 1]), &inventory(&[4, 1, 3], Some(4)), Which::Newest),
            expected,
            "order does not matter"
        );
    }

    #[test]
    fn newer_is_what_the_file_system_says_not_what_a_clock_said() {
        let ours = [snapshot(7, 50), snapshot(8, 10)];
        let Plan::Send { snapshot: sent, base, .. } = plan(&ours, &inventory(&[7], Some(7)), Which::Newest) else {
            panic!("nothing to send")
        };
        assert_eq!((sent.id.ctransid, base), (8, Base::Common(snapshot(7, 50))));
    }

    #[test]
    fn a_snapshot_of_an_unchanged_source_is_newer_by_its_name_and_has_the_one_before_as_its_base() {
        let twin = |second: u64| {
            let id = SnapshotId { uuid: uuid::Uuid::from_u128(u128::from(second)), ctransid: 7 };
            Snapshot { id, ..snapshot(7, second) }
        };
        let theirs = Inventory { snapshots: vec![twin(10)], published: Some(twin(10)), ..inventory(&[], None) };
        let expected = Plan::Send { snapshot: twin(20), base: Base::Common(twin(10)), resumed: false };
        assert_eq!(plan(&[twin(10), twin(20)], &theirs, Which::Newest), expected);
    }

    #[test]
    fn nothing_is_sent_when_the_newest_is_published_and_it_is_offered_when_it_only_arrived() {
        assert_eq!(plan(&ours(&[1, 2]), &inventory(&[2, 1], Some(2)), Which::Newest), Plan::UpToDate(snapshot(2, 2)));
        assert_eq!(
            plan(&ours(&[1, 2]), &inventory(&[2, 1], Some(1)), Which::Newest),
            Plan::Send { snapshot: snapshot(2, 2), base: Base::Common(snapshot(1, 1)), resumed: false }
        );
        assert_eq!(plan(&[], &inventory(&[2], Some(2)), Which::Newest), Plan::NoSnapshot);
    }

    #[test]
    fn what_arrived_is_not_sent_again_because_another_is_pinned() {
        let pinned = |theirs: &[u64]| Inventory { pinned: true, ..inventory(theirs, Some(1)) };
        for which in [Which::Newest, Which::Every] {
            assert_eq!(plan(&ours(&[1, 2]), &pinned(&[2, 1]), which), Plan::UpToDate(snapshot(2, 2)));
            let next = Plan::Send { snapshot: snapshot(3, 3), base: Base::Common(snapshot(2, 2)), resumed: false };
            assert_eq!(plan(&ours(&[1, 2, 3]), &pinned(&[2, 1]), which), next);
        }
    }

    #[test]
    fn a_full_send_is_told_apart_from_a_lost_base() {
        let base = |inventory| match plan(&ours(&[4, 5]), &inventory, Which::Newest) {
            Plan::Send { base, .. } => base,
            other => panic!("{other:?}"),
        };
        assert_eq!(base(inventory(&[], None)), Base::FirstTransfer);
        assert_eq!(base(inventory(&[1, 2], Some(2))), Base::NoneInCommon { theirs: 2 });
        assert_eq!(base(inventory(&[9], Some(9))), Base::NoneInCommon { theirs: 1 }, "what is newer is no base");
    }

    #[test]
    fn what_was_interrupted_is_finished_first_if_it_still_can_be() {
        let unfinished = |base: Option<u64>| Inventory {
            unfinished: Some(Unfinished { snapshot: snapshot(3, 3), base: base.map(|n| snapshot(n, n)) }),
            ..inventory(&[1, 2], Some(2))
        };
        let resumed = |base| Plan::Send { snapshot: snapshot(3, 3), base, resumed: true };
        let fresh = Plan::Send { snapshot: snapshot(5, 5), base: Base::Common(snapshot(2, 2)), resumed: false };
        let common = || Base::Common(snapshot(2, 2));
        assert_eq!(plan(&ours(&[1, 2, 3, 5]), &unfinished(Some(2)), Which::Newest), resumed(common()));
        assert_eq!(plan(&ours(&[1, 2, 3, 5]), &unfinished(None), Which::Newest), resumed(Base::FirstTransfer));
        assert_eq!(plan(&ours(&[1, 2, 5]), &unfinished(Some(2)), Which::Newest), fresh, "the snapshot vanished");
        let lost = plan(&ours(&[1, 3, 5]), &unfinished(Some(2)), Which::Newest);
        assert!(
            matches!(lost, Plan::Send { base: Base::Common(base), .. } if base == snapshot(1, 1)),
            "the base vanished"
        );
    }

    #[test]
    fn every_snapshot_goes_in_its_order_if_that_is_wanted() {
        let sent =
            |theirs: &[u64], published| match plan(&ours(&[1, 2, 3, 4]), &inventory(theirs, published), Which::Every) {
                Plan::Send { snapshot, base, .. } => {
                    (snapshot.id.ctransid, base.snapshot().map(|base| base.id.ctransid))
                }
                other => panic!("{other:?}"),
            };
        assert_eq!(sent(&[1], Some(1)), (2, Some(1)));
        assert_eq!(sent(&[1, 2], Some(2)), (3, Some(2)));
        assert_eq!(sent(&[], None), (4, None), "a first transfer is of the newest");
    }

    #[test]
    fn the_same_uuid_with_another_ctransid_is_another_snapshot() {
        let mut theirs = inventory(&[3], Some(3));
        theirs.snapshots[0].id.ctransid = 2;
        theirs.published = None;
        let Plan::Send { base, .. } = plan(&ours(&[3, 5]), &theirs, Which::Newest) else { panic!("nothing to send") };
        assert_eq!(base, Base::NoneInCommon { theirs: 1 });
    }
}
