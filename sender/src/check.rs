//! `check`: what is wrong with the machine, given a configuration that is right in itself.

use std::{os::fd::AsFd, sync::atomic::AtomicBool, time::Duration};

use common::{btrfs, exit::Exit, findings::Findings, size::human_duration};
use jiff::Timestamp;

use crate::{
    config::{Config, Volume},
    connect::connect,
    create::Site,
    filter::check::{CheckError, everything},
    hazard, setup,
    walk::{self, Options},
};

/// Checks everything and says what it found. [`Exit::Failed`] if anything is in the way of a cycle.
pub async fn check(config: &Config) -> Exit {
    let mut findings = Findings::default();
    findings.good("the configuration");
    findings.root();
    findings.judge("the kernel's btrfs", btrfs::stream_version());
    // First, because it makes the directories that are still missing, as `run` does.
    let volumes = findings.judge("certificate, key and peers", setup::volumes(config));
    for volume in &config.volumes {
        check_volume(&mut findings, volume);
    }
    for volume in volumes.into_iter().flatten() {
        let reached = connect(&volume.route, &volume.config.name).await;
        let good = format!("{}: the receiver at {} takes the volume", volume.config.name, config.receiver.address);
        if let Some((link, _)) = findings.judge(&good, reached) {
            link.close().await;
        }
    }
    findings.exit()
}

fn check_volume(findings: &mut Findings, volume: &Volume) {
    let name = &volume.name;
    let good = format!(
        "{name}: {} is a subvolume, {} is on its file system",
        volume.source.display(),
        volume.snapshot_dir.display()
    );
    let site = Site::open(&volume.source, &volume.snapshot_dir);
    let Some(site) = findings.judge(&good, site) else { return };
    match hazard::look(&site) {
        Ok(hazards) if hazards.is_empty() => {
            findings.good(&format!("{name}: no nested subvolumes, and quotas are off"));
        }
        Ok(hazards) => hazards.iter().for_each(|hazard| findings.note(&format!("{name}: {hazard}"))),
        Err(error) => findings.error(&error),
    }
    if volume.filter.guix_cache {
        check_cache(findings, volume, &site);
    }
    findings.good(&format!("{name}: a snapshot every {}", human_duration(volume.interval)));
}

/// Every narinfo of the source that the filter leaves, as it is now.
fn check_cache(findings: &mut Findings, volume: &Volume, site: &Site) {
    let (name, stop) = (&volume.name, AtomicBool::new(false));
    let rules = volume.filter.at(Timestamp::now());
    let options = Options { threads: walk::threads(), stop: &stop, tick_interval: Duration::from_secs(1) };
    match everything(site.source().as_fd(), &rules, &options, |_| {}) {
        Ok(good) => {
            findings.good(&format!("{name}: {} narinfos name nars that are there", good.narinfos));
            if good.partly_excluded > 0 {
                findings.note(&format!(
                    "{name}: {} of them also name nars that exclude takes away: a client that prefers those has to go on to the next",
                    good.partly_excluded
                ));
            }
        }
        Err(CheckError::Broken(broken)) => findings.bad(&format!("{name}: {broken}")),
        Err(error) => findings.error(&error),
    }
}
