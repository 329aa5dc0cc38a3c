//! What is legal, but not what an operator expects: said by `check`, and in the log at the first snapshot.

use std::{fmt, path::PathBuf};

use common::btrfs::{self, BtrfsError};

use crate::create::Site;

/// Nested subvolumes that are named; the number of all is said too.
const NAMED: usize = 5;

/// Something that an operator should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hazard {
    /// Subvolumes inside the source, by their paths in it.
    Nested(Vec<PathBuf>),
    /// Quota groups are on.
    Quotas,
}

impl fmt::Display for Hazard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nested(paths) => {
                let named: Vec<String> = paths.iter().take(NAMED).map(|path| path.display().to_string()).collect();
                let more = if paths.len() > NAMED { ", ..." } else { "" };
                write!(
                    f,
                    "nested subvolumes are not part of a snapshot and arrive as empty directories, {} of them: {}{more}",
                    paths.len(),
                    named.join(", ")
                )
            }
            Self::Quotas => {
                f.write_str("quotas are on; deleting snapshots will be slow, and can stall (btrfs quota disable)")
            }
        }
    }
}

/// Looks for hazards at the source.
///
/// # Errors
/// The trees of the file system cannot be searched.
pub fn look(site: &Site) -> Result<Vec<Hazard>, BtrfsError> {
    let nested = site.source().nested()?;
    let nested = (!nested.is_empty()).then_some(Hazard::Nested(nested));
    let quotas = btrfs::has_qgroups(site.source().path())?.then_some(Hazard::Quotas);
    Ok(nested.into_iter().chain(quotas).collect())
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use common::testing::{SMALL, TestFs, run};

    use super::*;

    #[test]
    fn nested_subvolumes_and_quotas_are_found_and_named() {
        let fs = TestFs::new(SMALL);
        let source = fs.subvolume("source");
        let dir = fs.path().join("snapshots");
        fs::create_dir(&dir).unwrap();
        let site = Site::open(&source, &dir).unwrap();
        assert_eq!(look(&site).unwrap(), []);

        (0..7).for_each(|i| btrfs::create(&source.join(format!("nested-{i}"))).unwrap());
        run(Command::new("btrfs").args(["quota", "enable"]).arg(fs.path()));
        let found = look(&site).unwrap();
        let [Hazard::Nested(paths), Hazard::Quotas] = &found[..] else { panic!("{found:?}") };
        assert_eq!(paths.len(), 7);
        let said = found[0].to_string();
        assert!(said.contains("7 of them: ") && said.contains("nested-0") && said.ends_with(", ..."), "{said}");
    }
}
