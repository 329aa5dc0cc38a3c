//! What the tests of both agents' configurations do: take the example at its word, and be refused with the right message.

#![allow(clippy::unwrap_used)]

use std::{fmt, fs, path::Path};

use super::ConfigError;

/// How the first line of a file that must fail begins; behind it stands `line:column: message`.
const EXPECTED: &str = "# must fail with ";

/// How `load` reads a configuration.
type Load<T> = fn(&Path) -> Result<T, ConfigError>;

/// The example at `path` is legal, and it stays the same configuration when everything that it calls a default is written out.
pub fn example_states_the_defaults<T: fmt::Debug>(path: &Path, load: Load<T>) {
    load(path).unwrap_or_else(|error| panic!("{error}"));
    let plain = fs::read_to_string(path).unwrap();
    let spelt_out = plain.lines().map(uncommented).collect::<Vec<_>>().join("\n");
    assert_ne!(plain.trim_end(), spelt_out, "{} states no default", path.display());
    let name = path.file_stem().unwrap().to_string_lossy();
    // One place for both, so that relative paths mean the same.
    let copy = std::env::temp_dir().join(format!("{name}.{}.toml", std::process::id()));
    let [plain, spelt_out] = [plain, spelt_out].map(|text| {
        fs::write(&copy, text).unwrap();
        let config = load(&copy);
        fs::remove_file(&copy).unwrap();
        format!("{:#?}", config.unwrap_or_else(|error| panic!("with the defaults spelt out: {error}")))
    });
    assert_eq!(plain, spelt_out, "{} calls something a default that is none", path.display());
}

/// `#key = value` is a default; `# text` is text. The other way to know the peer is no default, but an alternative.
fn uncommented(line: &str) -> &str {
    let alternative = line.starts_with("#ca ") || line.starts_with("#peer_name ");
    match line.strip_prefix('#') {
        Some(rest) if !alternative && rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') => rest,
        _ => line,
    }
}

/// Every file in `folder` fails, with exactly the place and the message that its first line announces. (One that ends in `...` is
/// the beginning of the message: a list of all keys, for instance, grows with every key.)
pub fn bad_files_fail<T>(folder: &Path, load: Load<T>) {
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    let mut failures = String::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let expected =
            text.lines().next().and_then(|line| line.strip_prefix(EXPECTED)).unwrap_or("(no such first line)");
        let expected = format!("{}:{expected}", file.display());
        let came = load(&file).err().map_or_else(|| "it was taken".to_owned(), |error| error.to_string());
        let as_expected = match expected.strip_suffix("...") {
            Some(beginning) => came.starts_with(beginning),
            None => came == expected,
        };
        if !as_expected {
            failures += &format!("\n{}\n  expected: {expected}\n  came:     {came}", file.display());
        }
    }
    assert!(failures.is_empty(), "{failures}");
}
