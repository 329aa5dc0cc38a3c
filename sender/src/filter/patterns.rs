//! `exclude`: patterns as in a .gitignore, over paths as bytes. Pure.
//!
//! * A pattern without a slash, or with one at its end only, means that name in any directory: `*.lz`, `cache/`.
//! * Any other is a path from the volume's root: `lzip/*.nar`, `/top`, `a/**/b`.
//! * A slash at the end means directories only. What is in an excluded directory is excluded.
//! * `!` in front takes back what an earlier pattern excluded; not inside an excluded directory. The last pattern that matches decides.
//! * `*`, `?`, `[a-z]`, `**` as in git, `{a,b}` too; `*` and `?` do not match a slash; `\` makes the next character a plain one.
//!
//! Comments, and blanks at the end, are no part of this: what is quoted in a configuration means itself.

use std::fmt;

use globset::{Candidate, Glob, GlobBuilder, GlobSet, GlobSetBuilder};

/// Patterns in their order, ready to be matched.
#[derive(Clone, Default)]
pub struct Patterns {
    set: GlobSet,
    lines: Vec<Line>,
}

#[derive(Clone)]
struct Line {
    text: String,
    only_directories: bool,
    takes_back: bool,
}

/// Why a text is no pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadPattern {
    /// It names nothing.
    #[error("the pattern {0:?} names nothing; what should not leave this machine at all is no volume")]
    Empty(String),
    /// It has a part that no path of the volume has.
    #[error("the pattern {0:?} can match nothing: a path in a volume has no empty part, no \".\" and no \"..\"")]
    NoPath(String),
    /// It is no glob.
    #[error("{text:?} is no pattern: {why}; \\ in front of a character makes it a plain one")]
    Glob {
        /// As it was given.
        text: String,
        /// Why.
        why: globset::ErrorKind,
    },
    /// Together they are too much.
    #[error("the patterns cannot be compiled together: {0}")]
    Set(#[source] globset::Error),
}

impl Patterns {
    /// Makes them of their texts.
    ///
    /// # Errors
    /// The first that is none, with its place in the list.
    pub fn new<S: AsRef<str>>(texts: &[S]) -> Result<Self, (usize, BadPattern)> {
        let (mut set, mut lines) = (GlobSetBuilder::new(), Vec::new());
        for (place, text) in texts.iter().enumerate() {
            let (line, glob) = parse(text.as_ref()).map_err(|bad| (place, bad))?;
            lines.push(line);
            set.add(glob);
        }
        let set = set.build().map_err(|error| (0, BadPattern::Set(error)))?;
        Ok(Self { set, lines })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Their texts, in their order.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(|line| line.text.as_str())
    }

    /// The place of the pattern that excludes this path, by itself: the directories above it are the caller's to ask about.
    ///
    /// `path` is relative to the volume's root, without a slash at either end.
    pub fn exclude(&self, path: &[u8], is_directory: bool) -> Option<usize> {
        if self.lines.is_empty() {
            return None;
        }
        let mut matching = Vec::new();
        self.set.matches_candidate_into(&Candidate::from_bytes(path), &mut matching);
        let applies = |place: &&usize| is_directory || !self.lines[**place].only_directories;
        let last = *matching.iter().filter(applies).max()?;
        (!self.lines[last].takes_back).then_some(last)
    }
}

impl fmt::Debug for Patterns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.texts()).finish()
    }
}

fn parse(text: &str) -> Result<(Line, Glob), BadPattern> {
    let (takes_back, rest) = match text.strip_prefix('!') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (only_directories, rest) = match rest.strip_suffix('/') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    let rooted = rest.contains('/');
    let rest = rest.strip_prefix('/').unwrap_or(rest);
    if rest.is_empty() {
        return Err(BadPattern::Empty(text.to_owned()));
    }
    if rest.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(BadPattern::NoPath(text.to_owned()));
    }
    let mut glob = if rooted { rest.to_owned() } else { format!("**/{rest}") };
    if glob.ends_with("/**") {
        // To git this is all that is in the directory, to globset the directory, too.
        glob.push_str("/*");
    }
    let built = GlobBuilder::new(&glob).literal_separator(true).backslash_escape(true).build();
    let glob = built.map_err(|error| BadPattern::Glob { text: text.to_owned(), why: error.kind().clone() })?;
    Ok((Line { text: text.to_owned(), only_directories, takes_back }, glob))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which of `paths` are excluded; one with a slash at its end is a directory.
    fn excluded<'a>(patterns: &[&str], paths: &[&'a str]) -> Vec<&'a str> {
        let patterns = Patterns::new(patterns).unwrap();
        let is_excluded = |path: &&&str| {
            let bare = path.strip_suffix('/').unwrap_or(path);
            patterns.exclude(bare.as_bytes(), path.ends_with('/')).is_some()
        };
        paths.iter().filter(is_excluded).copied().collect()
    }

    #[test]
    fn a_name_means_every_directory_and_a_path_means_the_root() {
        let paths = ["a.lz", "b/a.lz", "b/c/a.lz", "a.lz.x", "lz"];
        assert_eq!(excluded(&["*.lz"], &paths), ["a.lz", "b/a.lz", "b/c/a.lz"]);
        assert_eq!(excluded(&["/*.lz"], &paths), ["a.lz"]);
        assert_eq!(excluded(&["b/*.lz"], &paths), ["b/a.lz"]);
        assert_eq!(excluded(&["/b/*/*.lz"], &paths), ["b/c/a.lz"]);
        assert_eq!(excluded(&["**/c/*.lz"], &paths), ["b/c/a.lz"]);
        assert_eq!(excluded(&["b/**/*.lz"], &paths), ["b/a.lz", "b/c/a.lz"]);
    }

    #[test]
    fn a_slash_at_the_end_means_directories() {
        let paths = ["lzip/", "lzip", "x/lzip/", "x/lzip", "lzip/x"];
        assert_eq!(excluded(&["lzip/"], &paths), ["lzip/", "x/lzip/"]);
        assert_eq!(excluded(&["/lzip/"], &paths), ["lzip/"]);
        assert_eq!(excluded(&["lzip"], &paths), ["lzip/", "lzip", "x/lzip/", "x/lzip"]);
        assert_eq!(excluded(&["lzip/**"], &paths), ["lzip/x"]);
        assert_eq!(excluded(&["/**/x"], &["x", "a/x", "a/b/x"]), ["x", "a/x", "a/b/x"]);
    }

    #[test]
    fn the_last_pattern_that_matches_decides() {
        let paths = ["a.log", "keep.log", "x/keep.log"];
        assert_eq!(excluded(&["*.log", "!keep.log"], &paths), ["a.log"]);
        assert_eq!(excluded(&["*.log", "!/keep.log"], &paths), ["a.log", "x/keep.log"]);
        assert_eq!(excluded(&["!keep.log", "*.log"], &paths), paths);
        let patterns = Patterns::new(&["*.log", "a*"]).unwrap();
        assert_eq!(patterns.exclude(b"a.log", false), Some(1));
        assert_eq!(patterns.exclude(b"b.log", false), Some(0));
    }

    #[test]
    fn special_characters_can_be_plain_ones_and_blanks_count() {
        assert_eq!(
            excluded(&[r"\!a", r"\*b", "[x-z]c", "d "], &["!a", "*b", "xb", "yc", "d", "d "]),
            ["!a", "*b", "yc", "d "]
        );
        assert_eq!(excluded(&["#a", "{b,c}.x"], &["#a", "b.x", "c.x", "d.x"]), ["#a", "b.x", "c.x"]);
    }

    #[test]
    fn names_are_bytes() {
        let patterns = Patterns::new(&["*.lz", "b?c", "[!a-z]"]).unwrap();
        assert_eq!(patterns.exclude(b"dir\xff/\xfe\n\x80.lz", false), Some(0));
        assert_eq!(patterns.exclude(b"b\xffc", false), Some(1));
        assert_eq!(patterns.exclude(b"\xff", false), Some(2));
        assert_eq!(patterns.exclude(b"\xff.l", false), None);
        let umlaut = Patterns::new(&["ä*"]).unwrap();
        assert_eq!(umlaut.exclude("ärger".as_bytes(), false), Some(0));
    }

    #[test]
    fn what_can_match_nothing_is_refused_with_its_place() {
        for (bad, said) in [
            ("", "names nothing"),
            ("!", "names nothing"),
            ("/", "names nothing"),
            ("//", "names nothing"),
            ("a//b", "no empty part"),
            ("./a", "no \".\""),
            ("a/../b", "no \"..\""),
            ("a[", "unclosed"),
            ("{a", "unclosed"),
            ("a\\", "dangling"),
        ] {
            let (place, error) = Patterns::new(&["fine", bad]).unwrap_err();
            assert_eq!(place, 1);
            assert!(error.to_string().contains(said), "{bad:?}: {error}");
        }
    }
}
