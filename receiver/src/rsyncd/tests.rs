//! A real rsync daemon and real clients.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    net::{TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    process::{Command as StdCommand, Output},
};

use super::*;

fn settings(port: u16) -> config::Rsync {
    config::Rsync {
        mode: RsyncMode::Supervised,
        address: IpAddr::from([127, 0, 0, 1]),
        port,
        user: "nobody".into(),
        timeout: Duration::from_millis(600_001),
        max_connections: 0,
    }
}

fn module(name: &str, path: &Path) -> Module {
    Module { volume: name.parse().unwrap(), path: path.to_owned() }
}

/// A port that nobody listens on.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn listens(port: u16) -> bool {
    TcpStream::connect(("127.0.0.1", port)).is_ok()
}

/// Waits for a condition, without end but the test runner's patience of 10 seconds.
async fn until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(10), "waited in vain: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// A state directory, and a tree as it is published.
fn home() -> (tempfile::TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let tree = home.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::set_permissions(&tree, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(tree.join("file"), "content").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", tree.join("link")).unwrap();
    (home, tree)
}

fn rsync(arguments: &[&str], from: &str, to: &str) -> Output {
    StdCommand::new("rsync").args(arguments).args([from, to]).output().unwrap()
}

/// The processes whose command line contains `text`.
fn processes(text: &str) -> Vec<Pid> {
    let pid = |entry: fs::DirEntry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?);
    let is_it = |pid: &Pid| {
        let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
        line.starts_with(b"rsync\0") && String::from_utf8_lossy(&line).contains(text)
    };
    fs::read_dir("/proc").unwrap().filter_map(|entry| pid(entry.unwrap())).filter(is_it).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn it_serves_read_only_and_is_kept_running_until_it_is_stopped() {
    let (home, tree) = home();
    let port = free_port();
    let daemon = Rsyncd::start(&settings(port), &[module("v", &tree)], home.path()).await.unwrap();
    until("the daemon listens", || listens(port)).await;

    let (url, replica) = (format!("rsync://127.0.0.1:{port}/v/"), home.path().join("replica"));
    let got = rsync(&["-a"], &url, replica.to_str().unwrap());
    assert!(got.status.success(), "{}", String::from_utf8_lossy(&got.stderr));
    assert_eq!(fs::read_to_string(replica.join("file")).unwrap(), "content");
    assert_eq!(fs::read_link(replica.join("link")).unwrap(), Path::new("/etc/passwd"));
    let put = rsync(&["-a"], &format!("{}/", replica.display()), &url);
    assert!(!put.status.success() && String::from_utf8_lossy(&put.stderr).contains("read only"));

    // It dies: another one comes.
    let file = home.path().join(CONFIG_FILE);
    let before = processes(file.to_str().unwrap());
    rustix::process::kill_process(before[0], Signal::KILL).unwrap();
    until("another daemon", || listens(port) && !processes(file.to_str().unwrap()).contains(&before[0])).await;

    let begun = Instant::now();
    daemon.stop().await;
    assert!(begun.elapsed() < STOP_GRACE, "it had to be killed");
    assert_eq!((processes(file.to_str().unwrap()), listens(port)), (Vec::new(), false));
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_does_not_wait_for_a_slow_client() {
    let (home, tree) = home();
    fs::write(tree.join("large"), vec![0; 64 << 20]).unwrap();
    let port = free_port();
    let daemon = Rsyncd::start(&settings(port), &[module("v", &tree)], home.path()).await.unwrap();
    until("the daemon listens", || listens(port)).await;
    let mut client = StdCommand::new("rsync")
        .args(["-a", "--bwlimit=100k"])
        .arg(format!("rsync://127.0.0.1:{port}/v/"))
        .arg(home.path().join("replica"))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let file = home.path().join(CONFIG_FILE);
    until("the client is being served", || processes(file.to_str().unwrap()).len() == 2).await;
    let begun = Instant::now();
    daemon.stop().await;
    assert!(begun.elapsed() < STOP_GRACE + Duration::from_secs(1));
    assert_eq!(processes(file.to_str().unwrap()), []);
    assert!(!client.wait().unwrap().success());
}

/// The tree of a mirror box after a reboot, before the agent has mounted anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_tree_with_nothing_mounted_does_not_make_clients_delete_what_they_have() {
    let (home, tree) = home();
    let port = free_port();
    let bare = home.path().join("bare");
    fs::create_dir(&bare).unwrap();
    fs::set_permissions(&bare, fs::Permissions::from_mode(0o000)).unwrap();
    let modules = [module("v", &tree), module("bare", &bare), module("missing", &home.path().join("missing"))];
    let daemon = Rsyncd::start(&settings(port), &modules, home.path()).await.unwrap();
    until("the daemon listens", || listens(port)).await;
    let replica = home.path().join("replica");
    for (name, works) in [("v", true), ("bare", false), ("missing", false)] {
        let url = format!("rsync://127.0.0.1:{port}/{name}/");
        let got = rsync(&["-a", "--delete"], &url, replica.to_str().unwrap());
        assert_eq!(got.status.success(), works, "{name}: {}", String::from_utf8_lossy(&got.stderr));
        assert!(replica.join("file").exists(), "{name}");
    }
    daemon.stop().await;
}

/// Not a test by itself: an agent that is killed.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by the other tests, in a process of its own"]
async fn another_agent() {
    let (Some(home), Ok(port)) = (std::env::var_os("SNAPFERRY_TEST_HOME"), std::env::var("SNAPFERRY_TEST_PORT")) else {
        return;
    };
    let home = Path::new(&home);
    let port = port.parse().unwrap();
    let daemon = Rsyncd::start(&settings(port), &[module("v", &home.join("tree"))], home).await.unwrap();
    until("the daemon listens", || listens(port)).await;
    rustix::process::kill_process(rustix::process::getpid(), Signal::KILL).unwrap();
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_does_not_outlive_an_agent_that_is_killed() {
    let (home, _) = home();
    let port = free_port();
    let status = StdCommand::new(std::env::current_exe().unwrap())
        .args(["--exact", "rsyncd::tests::another_agent", "--include-ignored"])
        .env("SNAPFERRY_TEST_HOME", home.path())
        .env("SNAPFERRY_TEST_PORT", port.to_string())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(9));
    let file = home.path().join(CONFIG_FILE);
    until("the daemon has ended", || processes(file.to_str().unwrap()).is_empty()).await;
    assert!(!listens(port));
}

#[tokio::test]
async fn whoever_else_runs_it_finds_the_file_and_nobody_needs_none() {
    let (home, tree) = home();
    let file = home.path().join(CONFIG_FILE);
    let off = config::Rsync { mode: RsyncMode::Off, ..settings(873) };
    Rsyncd::start(&off, &[module("v", &tree)], home.path()).await.unwrap().stop().await;
    assert!(!file.exists());
    let external = config::Rsync { mode: RsyncMode::External, max_connections: 9, ..settings(873) };
    Rsyncd::start(&external, &[module("v", &tree), module("w", Path::new("/srv/a b"))], home.path()).await.unwrap();
    let text = fs::read_to_string(&file).unwrap();
    for line in [
        "address = 127.0.0.1",
        "port = 873",
        "read only = yes",
        "use chroot = yes",
        "uid = nobody",
        "timeout = 601",
        "max connections = 9",
        "[v]",
        "[w]",
        "path = /srv/a b",
    ] {
        assert!(text.lines().any(|have| have == line), "no {line:?} in:\n{text}");
    }
    assert!(processes(file.to_str().unwrap()).is_empty());
}

#[test]
fn all_addresses_are_spelt_by_naming_none() {
    let text = |address| {
        let settings = config::Rsync { address, ..settings(873) };
        String::from_utf8(render(&settings, &[], Path::new("/l")).unwrap()).unwrap()
    };
    assert!(!text("::".parse().unwrap()).contains("address"));
    assert!(text("::1".parse().unwrap()).contains("address = ::1\n"));
    assert!(text("0.0.0.0".parse().unwrap()).contains("address = 0.0.0.0\n"));
}

#[test]
fn what_rsyncd_conf_cannot_say_is_refused() {
    for bad in ["relative", "/a/./b", "/a\nread only = no", "/a%b%", "/a\\", "/a ", ""] {
        let modules = [module("v", Path::new(bad))];
        assert!(matches!(render(&settings(873), &modules, Path::new("/l")), Err(RsyncdError::Path(_))), "{bad:?}");
    }
    for bad in ["", "a b", "a\nuid = 0", "%u%"] {
        let settings = config::Rsync { user: bad.into(), ..settings(873) };
        assert!(matches!(render(&settings, &[], Path::new("/l")), Err(RsyncdError::User(_))), "{bad:?}");
    }
}

#[test]
fn the_pauses_grow_and_start_again_after_a_daemon_that_ran_well() {
    let mut back_off = BackOff::new();
    let pauses: Vec<u64> = (0..8).map(|_| back_off.next(Duration::ZERO).as_secs()).collect();
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
    assert_eq!(back_off.next(RAN_WELL).as_secs(), 1);
    assert_eq!(back_off.next(Duration::ZERO).as_secs(), 2);
}

#[test]
fn a_line_loses_the_clock_that_our_log_has_already() {
    assert_eq!(without_clock("2026/11/22 07:00:00 [4711] connect from x"), "[4711] connect from x");
    for line in ["rsync error: some", "", "2026/11/22", "2026-11-22 07:00:00 [1] x", "äöü 2026/11/22 07:00:00"] {
        assert_eq!(without_clock(line), line);
    }
}

#[test]
fn who_has_ended_but_is_not_reaped_does_not_count() {
    assert!(is_running_in("7 (rsync) S 1 5 5 0", 5));
    assert!(is_running_in("7 (a) Z 1 9 (b) S 1 5 5 0", 5), "a name may contain anything");
    for other in ["7 (rsync) Z 1 5 5 0", "7 (rsync) S 5 6 5 0", "7 (rsync) S 1", ""] {
        assert!(!is_running_in(other, 5), "{other}");
    }
}
