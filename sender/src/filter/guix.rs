//! The cache of `guix publish`: what belongs together in it. Pure.
//!
//! ```text
//! <compression>/<hash>-<name>.nar        an item, as an archive
//! <compression>/<hash>-<name>.narinfo    about it; names each of its nars by a URL, in any compression
//! hashes/<hash>                          holds the store path of the item: /gnu/store/<hash>-<name>
//! ```
//! The layout is that of guix/scripts/publish.scm: `nar-cache-file`, `narinfo-cache-file`, `hash-part-mapping-cache-file`.

/// The directories of nars.
pub const COMPRESSIONS: [&str; 4] = ["lzip", "zstd", "gzip", "none"];

/// The directory of the hashes.
pub const HASHES: &str = "hashes";

/// What a URL without a compression means.
const NONE: usize = 3;

/// A file of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part<'a> {
    /// An archive.
    Nar(Member<'a>),
    /// What is said about it.
    Narinfo(Member<'a>),
    /// Which item a hash belongs to: the hash.
    Hash(&'a [u8]),
}

/// A place of an item in the cache: one of up to four.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member<'a> {
    /// Index in [`COMPRESSIONS`].
    pub compression: usize,
    /// `<hash>-<name>`
    pub item: &'a [u8],
}

/// What the two files of a member are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suffix {
    /// `.nar`
    Nar,
    /// `.narinfo`
    Narinfo,
}

impl Suffix {
    /// With the dot.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nar => ".nar",
            Self::Narinfo => ".narinfo",
        }
    }

    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::Nar => Self::Narinfo,
            Self::Narinfo => Self::Nar,
        }
    }
}

/// What a path is in the cache; None if it is nothing of it.
pub fn part(path: &[u8]) -> Option<Part<'_>> {
    let slash = path.iter().position(|&b| b == b'/')?;
    let (directory, name) = (&path[..slash], &path[slash + 1..]);
    if name.is_empty() || name.contains(&b'/') {
        return None;
    }
    if directory == HASHES.as_bytes() {
        return Some(Part::Hash(name));
    }
    let compression = COMPRESSIONS.iter().position(|known| known.as_bytes() == directory)?;
    let item = |suffix: Suffix| name.strip_suffix(suffix.as_str().as_bytes()).filter(|item| !item.is_empty());
    if let Some(item) = item(Suffix::Narinfo) {
        return Some(Part::Narinfo(Member { compression, item }));
    }
    item(Suffix::Nar).map(|item| Part::Nar(Member { compression, item }))
}

/// The name of a file of an item in the directory of a compression.
pub fn name(item: &[u8], suffix: Suffix) -> Vec<u8> {
    [item, suffix.as_str().as_bytes()].concat()
}

/// The path of a file of an item.
pub fn path(member: Member<'_>, suffix: Suffix) -> Vec<u8> {
    [COMPRESSIONS[member.compression].as_bytes(), b"/", member.item, suffix.as_str().as_bytes()].concat()
}

/// The item that `hashes/<hash>` with this content maps to; None if it is no such mapping.
pub fn mapped<'a>(hash: &[u8], content: &'a [u8]) -> Option<&'a [u8]> {
    let store_path = content.trim_ascii();
    let item = store_path.rsplit(|&b| b == b'/').next()?;
    let is_of_hash = item.strip_prefix(hash).is_some_and(|rest| rest.starts_with(b"-"));
    (is_of_hash && item.len() < store_path.len()).then_some(item)
}

/// What a narinfo says that there is, URL by URL. `Err` with the URL if it can be no file of the cache.
pub fn named(narinfo: &[u8]) -> impl Iterator<Item = Result<Named, Vec<u8>>> {
    narinfo.split(|&b| b == b'\n').filter_map(|line| line.strip_prefix(b"URL:")).map(|url| {
        let url = url.trim_ascii();
        parse_url(url).ok_or_else(|| url.to_vec())
    })
}

/// A nar that a narinfo names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    compression: usize,
    item: Vec<u8>,
}

impl Named {
    /// Where it is.
    pub fn member(&self) -> Member<'_> {
        Member { compression: self.compression, item: &self.item }
    }
}

/// `nar/<compression>/<item>`, or `nar/<item>` for what is not compressed; the item is percent-encoded. `nar` may be any path.
fn parse_url(url: &[u8]) -> Option<Named> {
    let mut parts = url.rsplit(|&b| b == b'/');
    let item = decode(parts.next()?)?;
    if item.is_empty() || item.contains(&b'/') || item.contains(&0) {
        return None;
    }
    let directory = parts.next();
    let known = |directory: &[u8]| COMPRESSIONS.iter().position(|known| known.as_bytes() == directory);
    Some(Named { compression: directory.and_then(known).unwrap_or(NONE), item })
}

/// Undoes percent-encoding; None if that is broken.
fn decode(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, behind)) = rest.split_first() {
        if first != b'%' {
            out.push(first);
            rest = behind;
            continue;
        }
        let (digits, behind) = behind.split_at_checked(2)?;
        let digit = |b: u8| char::from(b).to_digit(16);
        out.push(u8::try_from(digit(digits[0])? * 16 + digit(digits[1])?).ok()?);
        rest = behind;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zstd(item: &[u8]) -> Member<'_> {
        Member { compression: 1, item }
    }

    #[test]
    fn the_parts_of_a_cache_are_told_apart() {
        assert_eq!(part(b"zstd/abc-x.nar"), Some(Part::Nar(zstd(b"abc-x"))));
        assert_eq!(part(b"zstd/abc-x.narinfo"), Some(Part::Narinfo(zstd(b"abc-x"))));
        assert_eq!(part(b"hashes/abc"), Some(Part::Hash(b"abc")));
        for other in ["zstd", "hashes", "zstd/.nar", "zstd/x", "bzip9/x.nar", "a/zstd/x.nar", "zstd/a/x.nar", "x.nar"] {
            assert_eq!(part(other.as_bytes()), None, "{other}");
        }
        assert_eq!(path(zstd(b"abc-x"), Suffix::Nar), b"zstd/abc-x.nar");
        assert_eq!(name(b"abc-x", Suffix::Nar.other()), b"abc-x.narinfo");
    }

    #[test]
    fn a_hash_maps_to_its_item() {
        assert_eq!(mapped(b"abc", b"/gnu/store/abc-hello-1.0"), Some(&b"abc-hello-1.0"[..]));
        assert_eq!(mapped(b"abc", b"/gnu/store/abc-hello-1.0\n"), Some(&b"abc-hello-1.0"[..]));
        for no in ["", "/", "/gnu/store/abd-x", "/gnu/store/abc", "abc-x", "/gnu/store/abc-x/y"] {
            assert_eq!(mapped(b"abc", no.as_bytes()), None, "{no:?}");
        }
    }

    #[test]
    fn a_narinfo_names_its_nars() {
        let text = b"StorePath: /gnu/store/abc-x\nReferences: URL: no\nSignature: 1;h;s\nURL: nar/lzip/abc-gtk%2B-3\nCompression: lzip\n\
            FileSize: 1\nURL: my/nars/zstd/abc-gtk+-3\r\nURL: nar/abc-gtk%2b-3\nURL: %2\n URL: no\nURL:";
        let named: Vec<_> = named(text).collect();
        let item = b"abc-gtk+-3".to_vec();
        assert_eq!(
            named,
            [
                Ok(Named { compression: 0, item: item.clone() }),
                Ok(Named { compression: 1, item: item.clone() }),
                Ok(Named { compression: 3, item }),
                Err(b"%2".to_vec()),
                Err(b"".to_vec()),
            ]
        );
        assert!(parse_url(b"nar/lzip/a%2Fb").is_none() && parse_url(b"nar/lzip/a%00").is_none());
    }
}
