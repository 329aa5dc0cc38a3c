//! `check`: what is wrong with the machine, given a configuration that is right in itself.

use std::path::Path;

use common::{btrfs, exit::{Exit, chain}, size::human_duration};

use crate::{
    config::{Config, Volume},
    connect::connect,
    create::Site,
    setup,
};

/// Findings, printed as they come.
#[derive(Default)]
struct Findings {
    errors: usize,
}

impl Findings {
    fn good(text: &str) {
        println!("ok       {text}");
    }

    fn note(text: &str) {
        println!("warning  {text}");
    }

    fn bad(&mut self, text: &str) {
        self.errors += 1;
        println!("error    {text}");
    }

    fn judge<T>(&mut self, good: &str, result: Result<T, impl std::error::Error + 'static>) -> Option<T> {
        match result {
            Ok(value) => {
                Self::good(good);
                Some(value)
            }
            Err(error) => {
                self.bad(&chain(&error));
                None
            }
        }
    }
}

/// Checks everything and says what it found. [`Exit::Failed`] if anything is in the way of a cycle.
pub async fn check(config: &Config) -> Exit {
    let mut findings = Findings::default();
    Findings::good("the configuration");
    if !rustix::process::geteuid().is_root() {
        findings.bad("not root: snapshots and BTRFS_IOC_SEND need CAP_SYS_ADMIN; run it with sudo or as a system service");
    }
    for volume in &config.volumes {
        check_volume(&mut findings, volume);
    }
    if let Some(volumes) = findings.judge("certificate, key and peers", setup::volumes(config)) {
        for volume in volumes {
            let reached = connect(&volume.route, &volume.config.name).await;
            let good = format!("{}: the receiver at {} takes the volume", volume.config.name, config.receiver.address);
            if let Some((link, _)) = findings.judge(&good, reached) {
                link.close().await;
            }
        }
    }
    if findings.errors == 0 { Exit::Done } else { Exit::Failed }
}

fn check_volume(findings: &mut Findings, volume: &Volume) {
    let name = &volume.name;
    let site = Site::open(&volume.source, &volume.snapshot_dir);
    let good = format!("{name}: {} is a subvolume, {} is on its file system", show(&volume.source), show(&volume.snapshot_dir));
    let Some(site) = findings.judge(&good, site) else { return };
    match site.source().nested() {
        Ok(nested) if nested.is_empty() => Findings::good(&format!("{name}: no nested subvolumes")),
        Ok(nested) => Findings::note(&format!(
            "{name}: {} nested subvolumes are not part of a snapshot and arrive as empty directories: {}",
            nested.len(),
            nested.iter().take(5).map(|path| show(path)).collect::<Vec<_>>().join(", ")
        )),
        Err(error) => findings.bad(&chain(&error)),
    }
    match btrfs::has_qgroups(&volume.source) {
        Ok(true) => Findings::note(&format!("{name}: quotas are on; deleting snapshots will be slow (btrfs quota disable)")),
        Ok(false) => Findings::good(&format!("{name}: quotas are off")),
        Err(error) => findings.bad(&chain(&error)),
    }
    Findings::good(&format!("{name}: a snapshot every {}", human_duration(volume.interval)));
}

fn show(path: &Path) -> String {
    path.display().to_string()
}
