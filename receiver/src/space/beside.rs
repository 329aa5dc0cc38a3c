//! Looks for room beside a transfer that has begun: its total came later, or never.

use std::{future::pending, sync::Arc};

use common::stream::Total;
use tokio_util::task::AbortOnDropHandle;

use super::{claim::Claim, make::make};
use crate::volume::{Refused, Volume};

/// The look for room that is under way, if one is. Dropped, it stops.
#[derive(Debug, Default)]
pub struct Beside(Option<AbortOnDropHandle<Result<(), Refused>>>);

impl Beside {
    /// Begins to look if the total of the transfer is known, but not whether there is room for it.
    pub fn look(&mut self, volume: &Arc<Volume>, claim: &Arc<Claim>, total: Option<Total>) {
        if let Some(total) = total {
            claim.learn(total);
        }
        if self.0.is_none() && claim.is_open() {
            let (volume, claim) = (Arc::clone(volume), Arc::clone(claim));
            self.0 = Some(AbortOnDropHandle::new(tokio::spawn(async move { make(&volume, &claim, true).await })));
        }
    }

    /// The same at the end of a stream of so many bytes: if the total is not known by then, it is not more data than that.
    pub fn look_at_end(&mut self, volume: &Arc<Volume>, claim: &Arc<Claim>, bytes: u64) {
        let most = Total { bytes, data_bytes: bytes, extent_bytes: bytes, ..Total::default() };
        self.look(volume, claim, Some(most));
    }

    /// Whether it is not known yet.
    pub fn is_looking(&self) -> bool {
        self.0.is_some()
    }

    /// What came of it, once; never returns when nobody looks. Safe to cancel.
    ///
    /// # Errors
    /// There is too little room.
    pub async fn found(&mut self) -> Result<(), Refused> {
        let Some(looking) = &mut self.0 else { return pending().await };
        let found = looking.await;
        self.0 = None;
        // Whoever died looking did not find that there is too little.
        found.unwrap_or(Ok(()))
    }
}
