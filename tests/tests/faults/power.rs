//! Power cuts of the mirror box. Its disk is an image on a file system with reflinks: a copy of it is taken in an instant, in the
//! middle of everything, and what is on it is what a power cut would have left. The receiver's state and what it publishes lie on the
//! same disk, so that they are of the same moment. The sender lives on.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    process::Command,
};

use rustix::process::{Signal, kill_process};
use snapferry_tests::{
    btrfs, change, lab,
    measure::grow,
    pair::{Disks, Pair},
    suite::times,
    tree,
    trial::{Books, Cost, Transfer, Trial},
    wait,
};

use crate::moment;

const BULK: u64 = 50_000_000;

/// Bytes of the file system that holds the images, all sparse.
const OUTER: u64 = 16 << 30;

pub fn cuts(seed: u64) -> Books {
    let mut trial = on_reflinks(seed);
    tree::everything(trial.source(), seed);
    let each = times(10, 30);
    for increment in [false, true] {
        if increment {
            change::everything(trial.source(), seed);
        }
        let bulk = trial.rng.u64(..);
        grow(trial.source(), bulk, BULK);
        let mut transfer = trial.take();
        trial.start();
        let struck = (0..each).take_while(|struck| strike(&mut trial, &transfer, each - struck)).count();
        trial.interrupted(&mut transfer, struck as u64, Cost::Crash);
        trial.arrives(&transfer);
    }
    trial.end()
}

/// A pair whose mirror box has all that it must not lose on one disk, which can be copied in an instant.
fn on_reflinks(seed: u64) -> Trial {
    let settings = Trial::settings();
    let mut pair = Pair::with(&settings, Disks::default());
    let disk = pair.lab.path().join("mirror");
    pair.lab.unmount_all(&disk);
    let image = pair.lab.file_system("outer", OUTER, "noatime").join("mirror.image");
    let bytes = fs::metadata(pair.lab.image("mirror")).unwrap().len();
    File::create(&image).unwrap().set_len(bytes).unwrap();
    lab::run(Command::new("mkfs.btrfs").arg("-q").arg(&image));
    use_image(&pair, "mirror.image");
    fs::create_dir_all(disk.join("state")).unwrap();
    // An operator's directory, there since long before: a link to one that the first cut has undone would be nothing to start on.
    btrfs::sync(&disk);
    symlink(disk.join("state"), pair.places.receiver.join("state")).unwrap();
    pair.places.publish = disk.join("publish").join("substitutes");
    pair.configure(&settings);
    Trial::of(seed, pair, settings)
}

/// Mounts one of the images as the disk of the mirror box.
fn use_image(pair: &Pair, name: &str) {
    let place = pair.lab.image("mirror");
    fs::remove_file(&place).unwrap();
    symlink(pair.lab.path().join("outer").join(name), &place).unwrap();
    let _ = pair.lab.mount("mirror", "noatime");
}

/// Cuts the power at a random moment and turns it on again. False if the transfer was over before.
fn strike(trial: &mut Trial, transfer: &Transfer, left: u64) -> bool {
    if !moment::wait(trial, transfer, left) {
        return false;
    }
    trial.watcher.pause();
    // Until the copy is taken nothing that is not on it must be heard of.
    let processes = trial.pair.mirror.processes();
    let all = |signal| {
        processes.iter().for_each(|(pid, _)| {
            let _ = kill_process(*pid, signal);
        });
    };
    all(Signal::STOP);
    let outer = trial.pair.lab.path().join("outer");
    let (image, copy) = (fs::read_link(trial.pair.lab.image("mirror")).unwrap(), format!("{left}.image"));
    lab::run(Command::new("cp").arg("--reflink=always").arg(&image).arg(outer.join(&copy)));
    all(Signal::KILL);
    trial.kill_receiver();
    trial.pair.assert_no_processes(&trial.pair.mirror);
    let disk = trial.pair.lab.path().join("mirror");
    // Two file systems with one identity must not be mounted at a time: not even for as long as the last user of the first one takes.
    wait::until("the disk of before is let go", || {
        let mut mounted = lab::mounts_below(&disk);
        mounted.reverse();
        mounted.iter().all(|point| Command::new("umount").arg(point).status().unwrap().success()).then_some(())
    });
    fs::remove_file(&image).unwrap();
    use_image(&trial.pair, &copy);
    trial.start_receiver();
    trial.receiver().wait_for("listening");
    trial.watcher.go_on();
    true
}
