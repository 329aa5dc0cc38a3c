//! State that survives a power cut: written to a temporary file, synced, renamed, and the directory synced.
//!
//! After a crash a state file is the old one or the new one, never a part of either.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

/// Why state cannot be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum DurableError {
    /// The file system.
    #[error("cannot {doing} the state file {path}")]
    Io {
        /// `read` or `write`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else wrote it, or the disk is broken.
    #[error("the state file {path} is not one: {source}; mend it, or move it away")]
    Broken {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// Our own state cannot be written as TOML: a defect.
    #[error("the state for {path} cannot be written as TOML: {source}")]
    Encode {
        /// The file.
        path: PathBuf,
        /// Why.
        source: toml::ser::Error,
    },
}

/// Makes `path` a file with `content`, durably.
///
/// # Errors
/// [`DurableError::Io`]; `path` is then what it was before.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<(), DurableError> {
    let io = |source| DurableError::Io { doing: "write", path: path.to_owned(), source };
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let written = File::create(&temporary)
        .and_then(|mut file| {
            file.write_all(content)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&temporary, path))
        .and_then(|()| sync_directory(path.parent().unwrap_or(Path::new("."))));
    written.map_err(io)
}

/// Makes the names in a directory durable.
///
/// # Errors
/// From the file system.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Keeps `state` in `path`, durably, as TOML.
///
/// # Errors
/// See [`DurableError`].
pub fn store<T: Serialize>(path: &Path, state: &T) -> Result<(), DurableError> {
    let text = toml::to_string(state).map_err(|source| DurableError::Encode { path: path.to_owned(), source })?;
    write_atomically(path, text.as_bytes())
}

/// What was kept in `path`; None if nothing ever was.
///
/// # Errors
/// See [`DurableError`]. A broken file is an error, not an absent one: whoever reads it decides on deletions by it.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, DurableError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(DurableError::Io { doing: "read", path: path.to_owned(), source }),
    };
    let broken = |source| DurableError::Broken { path: path.to_owned(), source: Box::new(source) };
    toml::from_str(&text).map(Some).map_err(broken)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct State {
        snapshot: Option<String>,
        generation: u64,
    }

    #[test]
    fn what_was_stored_is_loaded_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.toml");
        assert_eq!(load::<State>(&path).unwrap(), None);
        for generation in 0..3 {
            let state = State { snapshot: Some("v.20260101T000000Z".into()), generation };
            store(&path, &state).unwrap();
            assert_eq!(load::<State>(&path).unwrap(), Some(state));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_broken_file_is_named_and_not_taken_for_an_absent_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.toml");
        fs::write(&path, "generation = ").unwrap();
        let error = load::<State>(&path).unwrap_err().to_string();
        assert!(error.contains("state.toml") && error.contains("move it away"), "{error}");
    }

    #[test]
    fn a_failed_write_leaves_the_old_state() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.toml");
        write_atomically(&path, b"old").unwrap();
        fs::create_dir(dir.path().join("state.toml.new")).unwrap();
        assert!(write_atomically(&path, b"new").is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }
}
