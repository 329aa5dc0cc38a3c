//! `check`: what is wrong with the machine, given a configuration that is right in itself.

use std::{net::SocketAddr, path::Path, process::Command};

use common::{
    btrfs::{self, Space},
    exit::Exit,
    findings::Findings,
    size::human_bytes,
    tls::{Acceptor, Credentials},
};

use crate::{
    config::{Config, RsyncMode, Volume},
    receive,
    space::{self, Limits, Resource},
};

/// Checks everything and says what it found. [`Exit::Failed`] if anything is in the way of a transfer.
pub fn check(config: &Config) -> Exit {
    let mut findings = Findings::default();
    findings.good("the configuration");
    findings.root();
    let credentials = Credentials::load(&config.tls.certificate, &config.tls.private_key);
    if let Some(credentials) = findings.judge("certificate and key", credentials) {
        findings.judge("peers", Acceptor::new(&credentials, &config.tls.peers));
    }
    if let Some(version) = findings.judge("btrfs receive", receive::stream_version())
        && version < 2
    {
        findings
            .note("btrfs-progs is older than 6.0: streams of version 1, which lose the length of holes beyond 4 GiB");
    }
    for volume in &config.volumes {
        check_volume(&mut findings, volume);
    }
    check_rsync(&mut findings, config);
    findings.exit()
}

fn check_volume(findings: &mut Findings, volume: &Volume) {
    let (name, store) = (&volume.name, volume.store.display());
    if !volume.store.is_dir() {
        findings.note(&format!("{name}: {store} does not exist yet; `run` makes it"));
    }
    let Some(existing) = volume.store.ancestors().find(|path| path.is_dir()) else { return };
    match btrfs::is_btrfs(existing) {
        Ok(true) => findings.good(&format!("{name}: {store} is on btrfs")),
        Ok(false) => findings.bad(&format!("{name}: {store} is not on btrfs; put the store on a btrfs file system")),
        Err(error) => findings.error(&error),
    }
    match btrfs::has_qgroups(existing) {
        Ok(true) => {
            findings.note(&format!("{name}: quotas are on; deleting snapshots will be slow (btrfs quota disable)"));
        }
        Ok(false) => findings.good(&format!("{name}: quotas are off")),
        // Not on btrfs: said above.
        Err(_) => {}
    }
    if let Ok(space) = btrfs::space(existing) {
        check_room(findings, volume, &space);
    }
    check_publish(findings, volume);
}

/// What room there is, and what transfers may take of it.
fn check_room(findings: &Findings, volume: &Volume, measured: &Space) {
    let limits = Limits { reserve: volume.reserve.bytes(measured.total), max_size: volume.max_size };
    let rooms = [Resource::Data, Resource::Metadata].map(|of| space::most(of, measured, limits));
    let [data, metadata] = rooms.map(human_bytes);
    let max_size = volume.max_size.map_or_else(String::new, |max| format!(", max_size {}", human_bytes(max)));
    let text = format!(
        "{}: room for {data} of data and {metadata} of metadata, with {} of {} free ({} unallocated), {} kept in reserve{max_size}",
        volume.name,
        human_bytes(measured.free),
        human_bytes(measured.total),
        human_bytes(measured.unallocated),
        human_bytes(limits.reserve),
    );
    if rooms.contains(&0) { findings.note(&text) } else { findings.good(&text) }
}

/// Mounts that the agent makes must be seen by the host, or the daemon serves what nobody publishes.
fn check_publish(findings: &mut Findings, volume: &Volume) {
    let ours = std::fs::read_link("/proc/self/ns/mnt");
    let hosts = std::fs::read_link("/proc/1/ns/mnt");
    if let (Ok(ours), Ok(hosts)) = (ours, hosts)
        && ours != hosts
    {
        findings.note(&format!(
            "{}: this process is in a mount namespace of its own: what is published in {} is not seen outside of it",
            volume.name,
            volume.publish.display()
        ));
    }
}

fn check_rsync(findings: &mut Findings, config: &Config) {
    if config.rsync.mode == RsyncMode::Off {
        return;
    }
    let rsync = Command::new("rsync").arg("--version").output();
    match rsync {
        Ok(output) if output.status.success() => findings.good("rsync"),
        Ok(_) | Err(_) => findings.bad("cannot run `rsync --version`; install rsync"),
    }
    if config.rsync.user == "root" {
        findings.note("the rsync daemon reads as root: it serves files that nobody but root may read, and, between a reboot and the start of the agent, an empty tree");
    }
    let address = SocketAddr::from((config.rsync.address, config.rsync.port));
    let user = Path::new("/etc/passwd");
    let known = std::fs::read_to_string(user)
        .is_ok_and(|users| users.lines().any(|line| line.split(':').next() == Some(config.rsync.user.as_str())));
    if known {
        findings.good(&format!("rsync daemon at {address} as {}", config.rsync.user));
    } else {
        findings.note(&format!("no user {} in /etc/passwd; the rsync daemon needs it", config.rsync.user));
    }
}
