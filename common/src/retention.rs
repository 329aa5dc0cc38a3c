//! Which snapshots stay and which go, with the reasons. Pure: a plan is a value, printed by one, executed by another.
//!
//! Whatever the policy says, the newest snapshot stays, and so does every one that is in use: what a snapshot is in use *for* is
//! the caller's knowledge, handed in as reasons.
//!
//! The rules by the calendar count *periods that have a snapshot*, not periods that have passed: `daily = 7` keeps one a day of the
//! last seven days on which there was any. So a machine that was off for a month comes back to all that it had, and a plan that was
//! executed has nothing left to delete. Days and weeks are those of UTC, weeks begin on Monday (ISO 8601).

use std::{cmp::Reverse, collections::HashSet, fmt, num::NonZeroU32, time::Duration};

use jiff::{Timestamp, civil::Date, tz::TimeZone};

use crate::{
    size::Span,
    snapshot::{Snapshot, SnapshotId, SnapshotName},
};

/// Which snapshots an operator wants to keep. A snapshot stays if any rule keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// The newest so many.
    pub last: Option<NonZeroU32>,
    /// The newest of an hour, for the last so many hours that have one.
    pub hourly: Option<NonZeroU32>,
    /// The same by days.
    pub daily: Option<NonZeroU32>,
    /// The same by weeks.
    pub weekly: Option<NonZeroU32>,
    /// The same by months.
    pub monthly: Option<NonZeroU32>,
    /// The same by years.
    pub yearly: Option<NonZeroU32>,
    /// All that are not older than this.
    pub within: Option<Duration>,
}

impl Policy {
    /// No rule: only the newest stays, and what is in use.
    pub const NONE: Self =
        Self { last: None, hourly: None, daily: None, weekly: None, monthly: None, yearly: None, within: None };

    /// The newest `count`, and nothing else.
    pub fn last(count: NonZeroU32) -> Self {
        Self { last: Some(count), ..Self::NONE }
    }

    /// The rules by the calendar, each with the period of `moment`.
    fn by_calendar(&self, moment: Timestamp) -> [(Option<NonZeroU32>, Bucket); 5] {
        let moment = TimeZone::UTC.to_datetime(moment);
        let (date, week) = (moment.date(), moment.date().iso_week_date());
        [
            (self.hourly, Bucket::Hour(date, moment.hour())),
            (self.daily, Bucket::Day(date)),
            (self.weekly, Bucket::Week(week.year(), week.week())),
            (self.monthly, Bucket::Month(date.year(), date.month())),
            (self.yearly, Bucket::Year(date.year())),
        ]
    }
}

impl Default for Policy {
    /// The last three.
    fn default() -> Self {
        Self::last(NonZeroU32::MIN.saturating_add(2))
    }
}

/// A period of the calendar, in UTC, of which one snapshot stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bucket {
    /// The hour of a day.
    Hour(Date, i8),
    /// A day.
    Day(Date),
    /// The year and the number of an ISO week.
    Week(i16, i8),
    /// The year and the number of a month.
    Month(i16, i8),
    /// A year.
    Year(i16),
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hour(date, hour) => write!(f, "hourly {date}T{hour:02}"),
            Self::Day(date) => write!(f, "daily {date}"),
            Self::Week(year, week) => write!(f, "weekly {year:04}-W{week:02}"),
            Self::Month(year, month) => write!(f, "monthly {year:04}-{month:02}"),
            Self::Year(year) => write!(f, "yearly {year:04}"),
        }
    }
}

/// Why a snapshot stays.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reason {
    /// It is the newest of its volume.
    Newest,
    /// The policy keeps this many, and it is among them.
    Last(u32),
    /// It stands for a period of which the policy keeps one.
    Of(Bucket),
    /// The policy keeps all that are younger than this.
    Within(Duration),
    /// The next increment builds on it.
    Base,
    /// Clients see it.
    Published,
    /// An operator wants clients to see it, whatever arrives.
    Pinned,
    /// Clients that began earlier may still read it.
    Retiring,
    /// A transfer of it is under way, or was interrupted and will go on.
    Unfinished,
    /// It waits for its transfer: the operator wants every snapshot sent.
    Unsent,
    /// An operator said never to delete it, and perhaps why.
    Held {
        /// The operator's words; may be empty.
        why: String,
    },
}

impl Reason {
    /// Whether it is a rule of the policy, and not a use that the snapshot is put to.
    pub fn is_policy(&self) -> bool {
        matches!(self, Self::Last(_) | Self::Of(_) | Self::Within(_))
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Newest => f.write_str("newest"),
            Self::Last(1) => f.write_str("keep.last = 1"),
            Self::Last(count) => write!(f, "among keep.last = {count}"),
            Self::Of(bucket) => bucket.fmt(f),
            Self::Within(span) => write!(f, "within {}", Span(*span)),
            Self::Base => f.write_str("base of the next increment"),
            Self::Published => f.write_str("published"),
            Self::Pinned => f.write_str("pinned"),
            Self::Retiring => f.write_str("retiring: has clients"),
            Self::Unfinished => f.write_str("transfer unfinished"),
            Self::Unsent => f.write_str("not sent yet"),
            Self::Held { why } if why.is_empty() => f.write_str("held"),
            Self::Held { why } => write!(f, "held: {why}"),
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
/// consequence. Order is that of the source's transactions, as everywhere; the times in the names only say which period a snapshot
/// belongs to, and how old it is at `now`. One from the future (a clock was set back) is not old.
pub fn plan(snapshots: &[Snapshot], policy: &Policy, now: Timestamp, kept: &[(SnapshotId, Reason)]) -> Plan {
    let mut ordered: Vec<&Snapshot> = snapshots.iter().collect();
    ordered.sort_by_cached_key(|snapshot| (newest_first(snapshot), snapshot.id.uuid));
    let mut rules = Rules { policy, now, seen: Default::default() };
    let mut plan = Plan::default();
    for (place, snapshot) in ordered.into_iter().enumerate() {
        let newest = (place == 0).then_some(Reason::Newest);
        let rules = rules.reasons(place, snapshot.name.taken());
        let mut reasons: Vec<Reason> = newest.into_iter().chain(rules).collect();
        for (_, reason) in kept.iter().filter(|(id, _)| *id == snapshot.id) {
            // Clients may be inside it twice, for instance.
            if !reasons.contains(reason) {
                reasons.push(reason.clone());
            }
        }
        if reasons.is_empty() {
            plan.delete.push(snapshot.clone());
        } else {
            plan.keep.push((snapshot.clone(), reasons));
        }
    }
    plan.delete.reverse();
    plan
}

/// A policy on its way from the newest snapshot to the oldest.
struct Rules<'a> {
    policy: &'a Policy,
    now: Timestamp,
    /// For each rule by the calendar: the periods that have their snapshot.
    seen: [HashSet<Bucket>; 5],
}

impl Rules<'_> {
    /// Which rules keep the snapshot taken at `taken`, the one behind `place` newer ones.
    fn reasons(&mut self, place: usize, taken: Timestamp) -> Vec<Reason> {
        let last = self.policy.last.map(NonZeroU32::get).filter(|last| (place as u64) < u64::from(*last));
        let mut reasons: Vec<Reason> = last.map(Reason::Last).into_iter().collect();
        for ((count, bucket), seen) in self.policy.by_calendar(taken).into_iter().zip(&mut self.seen) {
            let Some(count) = count else { continue };
            // The first of a period that is met is the newest of it.
            if (seen.len() as u64) < u64::from(count.get()) && seen.insert(bucket) {
                reasons.push(Reason::Of(bucket));
            }
        }
        let age = self.now.duration_since(taken);
        let young = |within: &Duration| age.is_negative() || age.unsigned_abs() <= *within;
        reasons.extend(self.policy.within.filter(young).map(Reason::Within));
        reasons
    }
}

/// The key that sorts snapshots of a volume, the newest first.
///
/// Snapshots between which nothing was written have the same ctransid; then the time in the name decides, the same on both sides.
pub fn newest_first(snapshot: &Snapshot) -> Reverse<(u64, SnapshotName)> {
    Reverse((snapshot.id.ctransid, snapshot.name.clone()))
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, sample::Index};
    use uuid::Uuid;

    use super::*;

    /// A snapshot with everything made from two numbers: the transaction, and the second of its name.
    fn snapshot(ctransid: u64, second: i64) -> Snapshot {
        let name = SnapshotName::new("v".parse().unwrap(), Timestamp::from_second(second).unwrap());
        let uuid = Uuid::from_u64_pair(ctransid, second.unsigned_abs());
        Snapshot { name, id: SnapshotId { uuid, ctransid } }
    }

    /// Snapshots at these moments, in order.
    fn taken(moments: &[&str]) -> Vec<Snapshot> {
        let second = |text: &&str| text.parse::<Timestamp>().unwrap().as_second();
        moments.iter().enumerate().map(|(i, text)| snapshot(i as u64 + 1, second(text))).collect()
    }

    fn some(count: u32) -> Option<NonZeroU32> {
        NonZeroU32::new(count)
    }

    fn keep(last: u32) -> Policy {
        Policy { last: some(last), ..Policy::NONE }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn held() -> Reason {
        Reason::Held { why: String::new() }
    }

    /// What a policy keeps, as a table for people: `2026-11-22T07:00:00Z: newest, daily 2026-11-22`.
    fn table(snapshots: &[Snapshot], policy: &Policy, now: &str) -> Vec<String> {
        let plan = plan(snapshots, policy, now.parse().unwrap(), &[]);
        let line = |(snapshot, reasons): &(Snapshot, Vec<Reason>)| {
            let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
            format!("{}: {}", snapshot.name.taken(), reasons.join(", "))
        };
        plan.keep.iter().map(line).collect()
    }

    #[test]
    fn the_last_stay_and_so_does_what_is_in_use() {
        let all: Vec<Snapshot> = (1..=6).map(|i| snapshot(i, 1000 + i as i64)).collect();
        let kept = [(all[0].id, held()), (all[4].id, Reason::Published), (all[0].id, Reason::Base)];
        let plan = plan(&all, &keep(2), at(2000), &kept);
        let expected = [
            (all[5].clone(), vec![Reason::Newest, Reason::Last(2)]),
            (all[4].clone(), vec![Reason::Last(2), Reason::Published]),
            (all[0].clone(), vec![held(), Reason::Base]),
        ];
        assert_eq!(plan.keep, expected);
        assert_eq!(plan.delete, [all[1].clone(), all[2].clone(), all[3].clone()]);
    }

    #[test]
    fn the_newest_of_each_period_stays_and_says_which() {
        let all = taken(&[
            "2024-12-29T23:00:00Z",
            "2024-12-30T01:00:00Z",
            "2026-11-20T10:00:00Z",
            "2026-11-22T05:10:00Z",
            "2026-11-22T05:50:00Z",
            "2026-11-22T06:00:00Z",
        ]);
        let now = "2026-11-22T07:00:00Z";
        let hourly = Policy { hourly: some(2), ..Policy::NONE };
        assert_eq!(
            table(&all, &hourly, now),
            ["2026-11-22T06:00:00Z: newest, hourly 2026-11-22T06", "2026-11-22T05:50:00Z: hourly 2026-11-22T05"]
        );
        let daily = Policy { daily: some(3), ..Policy::NONE };
        assert_eq!(
            table(&all, &daily, now),
            [
                "2026-11-22T06:00:00Z: newest, daily 2026-11-22",
                "2026-11-20T10:00:00Z: daily 2026-11-20",
                "2024-12-30T01:00:00Z: daily 2024-12-30"
            ]
        );
        // 2024-12-30 is a Monday: the first day of the first week of 2025.
        let others = Policy { weekly: some(9), monthly: some(9), yearly: some(9), ..Policy::NONE };
        assert_eq!(
            table(&all, &others, now),
            [
                "2026-11-22T06:00:00Z: newest, weekly 2026-W47, monthly 2026-11, yearly 2026",
                "2024-12-30T01:00:00Z: weekly 2025-W01, monthly 2024-12, yearly 2024",
                "2024-12-29T23:00:00Z: weekly 2024-W52"
            ]
        );
    }

    #[test]
    fn what_is_young_enough_stays_and_so_does_what_is_from_the_future() {
        let all =
            taken(&["2026-11-20T06:59:59Z", "2026-11-20T07:00:00Z", "2026-11-23T00:00:00Z", "2026-11-22T06:00:00Z"]);
        let two_days = Policy { within: Some(Duration::from_secs(2 * 86_400)), ..Policy::NONE };
        let expected = [
            "2026-11-22T06:00:00Z: newest, within 2d",
            "2026-11-23T00:00:00Z: within 2d",
            "2026-11-20T07:00:00Z: within 2d",
        ];
        assert_eq!(table(&all, &two_days, "2026-11-22T07:00:00Z"), expected);
    }

    #[test]
    fn without_any_rule_the_newest_stays() {
        let all = taken(&["2026-11-20T07:00:00Z", "2026-11-21T07:00:00Z"]);
        assert_eq!(table(&all, &Policy::NONE, "2026-11-22T07:00:00Z"), ["2026-11-21T07:00:00Z: newest"]);
    }

    #[test]
    fn the_transaction_decides_what_is_newest_not_the_clock() {
        let (older, newer) = (snapshot(7, 9_999_999), snapshot(8, 1));
        assert_eq!(plan(&[older.clone(), newer.clone()], &keep(1), at(0), &[]).delete, [older]);
        let (first, second) = (snapshot(8, 1), snapshot(8, 2));
        assert_eq!(plan(&[second, first.clone()], &keep(1), at(0), &[]).delete, [first]);
        // Within a period too.
        let (late, early) = (snapshot(7, 3500), snapshot(8, 100));
        let hourly = Policy { hourly: some(5), ..Policy::NONE };
        assert_eq!(plan(&[late.clone(), early], &hourly, at(0), &[]).delete, [late]);
    }

    #[test]
    fn of_nothing_nothing_goes() {
        let kept = [(snapshot(1, 1).id, held())];
        assert_eq!(plan(&[], &Policy::default(), at(0), &kept), Plan::default());
        assert_eq!(Policy::default(), keep(3));
    }

    #[test]
    fn a_hold_says_why() {
        assert_eq!(held().to_string(), "held");
        assert_eq!(Reason::Held { why: "release 1.4".to_owned() }.to_string(), "held: release 1.4");
    }

    fn reason() -> impl Strategy<Value = Reason> {
        let why = Reason::Held { why: "because".to_owned() };
        prop::sample::select(vec![Reason::Base, Reason::Published, Reason::Retiring, Reason::Unfinished, held(), why])
    }

    /// Snapshots of some three years around 1970, with clocks that run backwards now and then; each once.
    fn snapshots() -> impl Strategy<Value = Vec<Snapshot>> {
        let near = prop::collection::btree_set((0..20_u64, -10_000..10_000_i64), 0..30);
        let far = prop::collection::btree_set((0..50_u64, -50_000_000..50_000_000_i64), 0..50);
        prop_oneof![near, far]
            .prop_map(|all| all.into_iter().map(|(ctransid, second)| snapshot(ctransid, second)).collect())
    }

    fn policy() -> impl Strategy<Value = Policy> {
        let count = || (0..8_u32).prop_map(NonZeroU32::new);
        let within = prop::option::of((1..10_000_000_u64).prop_map(Duration::from_secs));
        (count(), count(), count(), count(), count(), count(), within).prop_map(
            |(last, hourly, daily, weekly, monthly, yearly, within)| Policy {
                last,
                hourly,
                daily,
                weekly,
                monthly,
                yearly,
                within,
            },
        )
    }

    /// A policy that keeps at least what both keep.
    fn union(a: &Policy, b: &Policy) -> Policy {
        Policy {
            last: a.last.max(b.last),
            hourly: a.hourly.max(b.hourly),
            daily: a.daily.max(b.daily),
            weekly: a.weekly.max(b.weekly),
            monthly: a.monthly.max(b.monthly),
            yearly: a.yearly.max(b.yearly),
            within: a.within.max(b.within),
        }
    }

    fn stays(plan: &Plan) -> Vec<Snapshot> {
        plan.keep.iter().map(|(snapshot, _)| snapshot.clone()).collect()
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_nothing_in_use_goes(
            all in snapshots(),
            policy in policy(),
            now in -60_000_000..60_000_000_i64,
            in_use in prop::collection::vec((any::<Index>(), reason()), 0..10),
        ) {
            let mut known = all.clone();
            known.push(snapshot(100, 100));
            let kept: Vec<_> = in_use.iter().map(|(i, reason)| (i.get(&known).id, reason.clone())).collect();
            let plan = plan(&all, &policy, at(now), &kept);

            let mut both = stays(&plan);
            both.extend(plan.delete.iter().rev().cloned());
            prop_assert_eq!(both.len(), all.len());
            prop_assert!(all.iter().all(|snapshot| both.contains(snapshot)));
            prop_assert!(plan.keep.iter().all(|(_, reasons)| !reasons.is_empty()));
            prop_assert!(plan.keep.len() >= all.len().min(policy.last.map_or(1, NonZeroU32::get) as usize));
            prop_assert!(plan.keep.is_sorted_by_key(|(snapshot, _)| newest_first(snapshot)));
            prop_assert!(plan.delete.is_sorted_by_key(|snapshot| Reverse(newest_first(snapshot))));
            for gone in &plan.delete {
                prop_assert!(kept.iter().all(|(id, _)| *id != gone.id));
                prop_assert!(all.iter().any(|other| newest_first(other) < newest_first(gone)));
                let age = at(now).duration_since(gone.name.taken());
                prop_assert!(policy.within.is_none_or(|within| age > within.try_into().unwrap()));
            }
            for (snapshot, reasons) in &plan.keep {
                let wanted = kept.iter().filter(|(id, _)| *id == snapshot.id).map(|(_, reason)| reason);
                prop_assert!(wanted.clone().all(|reason| reasons.contains(reason)), "a reason is missing");
            }
        }

        #[test]
        fn a_plan_that_was_executed_has_nothing_left_to_delete(
            all in snapshots(), policy in policy(), now in -60_000_000..60_000_000_i64,
            in_use in prop::collection::vec((any::<Index>(), reason()), 0..10),
        ) {
            let kept: Vec<_> = in_use.iter().filter(|_| !all.is_empty()).map(|(i, reason)| (i.get(&all).id, reason.clone())).collect();
            let first = plan(&all, &policy, at(now), &kept);
            let second = plan(&stays(&first), &policy, at(now), &kept);
            prop_assert_eq!(&second.delete, &[]);
            prop_assert_eq!(second.keep, first.keep, "the reasons stay the same too");
        }

        #[test]
        fn the_order_of_the_input_does_not_matter(
            (all, shuffled) in snapshots().prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle())),
            policy in policy(),
        ) {
            prop_assert_eq!(plan(&all, &policy, at(0), &[]), plan(&shuffled, &policy, at(0), &[]));
        }

        #[test]
        fn a_policy_with_more_never_keeps_less(
            all in snapshots(), a in policy(), b in policy(), now in -60_000_000..60_000_000_i64,
        ) {
            let more = stays(&plan(&all, &union(&a, &b), at(now), &[]));
            for less in [a, b] {
                prop_assert!(stays(&plan(&all, &less, at(now), &[])).iter().all(|snapshot| more.contains(snapshot)));
            }
        }

        #[test]
        fn no_period_keeps_more_than_one_nor_more_periods_than_wanted(all in snapshots(), count in 1..8_u32) {
            let policy = Policy { weekly: some(count), ..Policy::NONE };
            let plan = plan(&all, &policy, at(0), &[]);
            let weeks: Vec<_> = plan.keep.iter().flat_map(|(_, reasons)| reasons).filter(|reason| reason.is_policy()).collect();
            let distinct: HashSet<_> = weeks.iter().collect();
            let there: HashSet<_> = all.iter().map(|snapshot| Policy::NONE.by_calendar(snapshot.name.taken())[2].1).collect();
            prop_assert_eq!(weeks.len(), distinct.len());
            prop_assert_eq!(weeks.len(), there.len().min(count as usize));
        }
    }
}
