//! Crashes of the receiver behind every numbered step of a publication, of retiring and of a checkpoint: once with everything that was
//! mounted still there, and once with a reboot of the whole mirror box, clients connected.

use std::fs::{self, File};
use std::os::fd::AsRawFd;

use rustix::process::{Signal, kill_process};
use snapferry_tests::{
    measure::grow,
    pair::Disks,
    rsync,
    trial::{Books, Cost, Trial},
    wait,
    watch::MARKER,
};

/// Each with its number of steps.
const SEQUENCES: [(&str, u32); 3] = [("checkpoint", 4), ("publish", 7), ("retire", 3)];

/// Enough for some checkpoints.
const BULK: u64 = 9_000_000;

fn prepared(seed: u64) -> Trial {
    let mut trial = Trial::with(seed, Disks::default(), |settings| settings.rsync = "supervised".to_owned());
    grow(trial.source(), seed, BULK);
    let transfer = trial.take();
    trial.start();
    trial.arrives(&transfer);
    trial
}

/// Sends another snapshot, with a crash of the receiver behind a step; `between` is what happens before it is started again.
fn crash(trial: &mut Trial, step: &str, between: impl FnOnce(&mut Trial)) {
    let bulk = trial.rng.u64(..);
    fs::remove_dir_all(fs::read_dir(trial.source()).unwrap().flatten().find(|e| e.path().is_dir()).unwrap().path())
        .unwrap();
    grow(trial.source(), bulk, BULK);
    let mut transfer = trial.take();
    trial.receiver_environment = vec![("SNAPFERRY_CRASH", step.to_owned())];
    trial.start();
    trial.receiver_ended();
    trial.receiver_environment.clear();
    between(trial);
    trial.start_receiver();
    trial.receiver().wait_for("listening");
    trial.watcher.go_on();
    trial.interrupted(&mut transfer, 1, Cost::Crash);
    trial.arrives(&transfer);
}

/// The mounts stay, and a client in them.
pub fn crashes(seed: u64) -> Books {
    let mut trial = prepared(seed);
    for (sequence, steps) in SEQUENCES {
        for step in 1..=steps {
            let inside = File::open(trial.pair.live()).unwrap();
            let marker = format!("/proc/self/fd/{}/{MARKER}", inside.as_raw_fd());
            let before = fs::read(&marker).unwrap();
            // What has a client in it does not retire.
            let inside = if sequence == "retire" { None } else { Some(inside) };
            crash(&mut trial, &format!("{sequence}:{step}"), |_| {});
            assert!(inside.is_none() || fs::read(&marker).unwrap() == before, "a client lost its snapshot");
        }
    }
    trial.end()
}

/// Everything is unmounted, everybody gone.
pub fn reboots(seed: u64) -> Books {
    let mut trial = prepared(seed);
    for (sequence, steps) in SEQUENCES {
        for step in 1..=steps {
            let copy = trial.pair.lab.path().join(format!("copy-{sequence}-{step}"));
            let (head, url) = (trial.pair.head.clone(), trial.pair.url());
            wait::until("the daemon answers", || rsync::probe(&head, &url).success().then_some(()));
            let _client = (sequence != "retire").then(|| rsync::Client::start(&head, &url, &copy, 100));
            crash(&mut trial, &format!("{sequence}:{step}"), |trial| {
                trial.watcher.pause();
                for (pid, _) in trial.pair.mirror.processes() {
                    let _ = kill_process(pid, Signal::KILL);
                }
                trial.pair.assert_no_processes(&trial.pair.mirror);
                trial.pair.reboot_mirror();
            });
        }
    }
    // And one that ends well.
    let copy = trial.pair.lab.path().join("copy");
    let (head, url) = (trial.pair.head.clone(), trial.pair.url());
    wait::until("the daemon answers", || rsync::probe(&head, &url).success().then_some(()));
    rsync::copy(&head, &url, &copy);
    snapferry_tests::manifest::assert_copy(&trial.pair.newest(), &copy);
    trial.end()
}
