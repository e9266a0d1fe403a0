//! Finds the package mirror this machine already uses, and the keyring that vouches for it.
//!
//! Everything the bed fetches comes from there, so that it works behind whatever mirror a developer or a CI
//! machine has been given. It must never name a host of its own, and never pick an entry that is not the
//! distribution's: third-party entries carry no kernels.

use std::fs;
use std::path::{Path, PathBuf};

use super::Unavailable;

/// The distribution's keyrings. One of them may hold the keys of one release only; the first of these that
/// exists holds those of its neighbours too.
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];
const KEYRING_PREFIX: &str = "/usr/share/keyrings/debian-archive-";

/// Suite names that stand for "this release" without being its codename.
const SUITE_ALIASES: [&str; 5] = ["stable", "oldstable", "testing", "unstable", "sid"];

/// Where packages come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// The archive's base address, as the machine's configuration gives it.
    pub uri: String,
    /// What `Signed-By` is to say; `None` leaves it to the keys apt trusts for every mirror.
    pub signed_by: Option<String>,
}

/// One entry of apt's configuration, in either of its two notations.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: Option<String>,
}

impl Mirror {
    /// The mirror in the machine's configuration under `etc` (`/etc`).
    pub fn configured(etc: &Path) -> Result<Self, Unavailable> {
        let codename = fs::read_to_string(etc.join("os-release")).ok().and_then(|text| codename(&text));
        let sources = read_sources(&etc.join("apt"));
        let keyring = KEYRINGS.into_iter().find(|path| Path::new(path).exists());
        choose(&sources, codename.as_deref())
            .map(|(uri, source)| Mirror {
                uri: uri.clone(),
                signed_by: source.signed_by.as_deref().map(|own| widen(own, keyring)),
            })
            .ok_or_else(|| {
                Unavailable(format!(
                    "no package mirror found: apt's configuration in {} names no archive of this Debian release \
                     (codename {}) with component main. The bed needs Debian 12 or newer",
                    etc.join("apt").display(),
                    codename.as_deref().unwrap_or("unknown"),
                ))
            })
    }
}

/// The `Signed-By` for every release of a mirror that has `own` for one. A mirror with keys of its own keeps
/// them.
fn widen(own: &str, keyring: Option<&str>) -> String {
    keyring.filter(|_| own.starts_with(KEYRING_PREFIX)).unwrap_or(own).to_string()
}

/// The first entry that serves this release from an address apt can fetch anything from.
fn choose<'a>(sources: &'a [Source], codename: Option<&str>) -> Option<(&'a String, &'a Source)> {
    sources.iter().find_map(|source| {
        let ours =
            |suite: &String| Some(suite.as_str()) == codename || SUITE_ALIASES.contains(&suite.as_str());
        let serves = source.suites.iter().any(ours) && source.components.iter().any(|name| name == "main");
        // A CD holds one release only.
        let uri = source.uris.iter().find(|uri| !uri.starts_with("cdrom:"));
        uri.filter(|_| serves).map(|uri| (uri, source))
    })
}

/// `VERSION_CODENAME` of an os-release file.
fn codename(os_release: &str) -> Option<String> {
    let value = os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(value.trim_matches(['"', '\'', ' ']).to_string()).filter(|name| !name.is_empty())
}

/// Every enabled entry, in the order apt reads the files. A file that cannot be read is one that apt cannot
/// read either.
fn read_sources(apt: &Path) -> Vec<Source> {
    let mut files = vec![apt.join("sources.list")];
    let mut parts: Vec<PathBuf> = fs::read_dir(apt.join("sources.list.d"))
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    parts.sort();
    files.append(&mut parts);
    files
        .iter()
        .filter_map(|path| Some((path.extension()?.to_str()?, fs::read_to_string(path).ok()?)))
        .flat_map(|(extension, text)| match extension {
            "sources" => parse_deb822(&text),
            "list" => parse_one_line(&text),
            _ => Vec::new(),
        })
        .collect()
}

/// `deb [option=value …] uri suite component…`, one entry a line.
fn parse_one_line(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Source> {
    let rest = line.split('#').next()?.trim().strip_prefix("deb")?;
    // "deb-src" begins with "deb" as well.
    let mut rest = rest.strip_prefix([' ', '\t'])?.trim_start();
    let mut signed_by = None;
    if let Some(inner) = rest.strip_prefix('[') {
        let (options, after) = inner.split_once(']')?;
        signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
        rest = after;
    }
    let mut words = rest.split_whitespace().map(str::to_string);
    Some(Source {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        signed_by: signed_by.map(str::to_string),
    })
}

/// Paragraphs of `Field: value` lines, a value going on over the lines that begin with a blank.
fn parse_deb822(text: &str) -> Vec<Source> {
    let uncommented: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    uncommented.split(|line| line.trim().is_empty()).filter_map(parse_paragraph).collect()
}

fn parse_paragraph(lines: &[&str]) -> Option<Source> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in lines {
        match fields.last_mut() {
            Some((_, value)) if line.starts_with([' ', '\t']) => {
                value.push('\n');
                value.push_str(line);
            }
            _ => {
                let (name, value) = line.split_once(':')?;
                fields.push((name.trim().to_ascii_lowercase(), value.trim().to_string()));
            }
        }
    }
    let field = |name: &str| fields.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let words =
        |name: &str| field(name).unwrap_or("").split_whitespace().map(str::to_string).collect::<Vec<_>>();
    let disabled = field("enabled").is_some_and(|value| ["no", "false", "off", "0"].contains(&value));
    if disabled || !words("types").iter().any(|kind| kind == "deb") {
        return None;
    }
    Some(Source {
        uris: words("uris"),
        suites: words("suites"),
        components: words("components"),
        signed_by: field("signed-by").map(str::to_string),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
# A comment before the first field
Types: deb
URIs: ftp://other.example/apt
Suites: nodistro
Components: main

Types: deb deb-src
# A comment between fields
URIs: ftp://mirror.example/debian
  ftp://second.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/example.gpg

Enabled: no
Types: deb
URIs: ftp://disabled.example/debian
Suites: bookworm
Components: main
";

    #[test]
    fn deb822_entries_are_read_and_disabled_ones_left_out() {
        let sources = parse_deb822(DEB822);
        assert_eq!(sources.len(), 2);
        assert_eq!(sources[1].uris, ["ftp://mirror.example/debian", "ftp://second.example/debian"]);
        assert_eq!(sources[1].suites, ["bookworm", "bookworm-updates"]);
        assert_eq!(sources[1].signed_by.as_deref(), Some("/usr/share/keyrings/example.gpg"));
    }

    #[test]
    fn the_entry_of_this_release_is_chosen_and_third_parties_are_not() {
        let sources = parse_deb822(DEB822);
        let (uri, _) = choose(&sources, Some("bookworm")).unwrap();
        assert_eq!(uri, "ftp://mirror.example/debian");
        assert_eq!(choose(&sources, Some("trixie")), None);
    }

    #[test]
    fn an_embedded_key_stays_whole() {
        let text = "Types: deb\nURIs: ftp://a.example\nSuites: sid\nComponents: main\nSigned-By:\n -----BEGIN\n .\n abc\n";
        assert_eq!(parse_deb822(text)[0].signed_by.as_deref(), Some("\n -----BEGIN\n .\n abc"));
    }

    #[test]
    fn one_line_entries_are_read_with_and_without_options() {
        let text = "# deb ftp://commented.example/debian trixie main\n\
                    deb-src ftp://src.example/debian trixie main\n\
                    deb cdrom:[Debian]/ trixie main\n\
                    deb [arch=amd64 signed-by=/k.gpg] ftp://mirror.example/debian trixie main non-free # note\n";
        let sources = parse_one_line(text);
        assert_eq!(sources.len(), 2);
        let (uri, source) = choose(&sources, Some("trixie")).unwrap();
        assert_eq!(uri, "ftp://mirror.example/debian");
        assert_eq!(source.signed_by.as_deref(), Some("/k.gpg"));
        assert_eq!(source.components, ["main", "non-free"]);
    }

    #[test]
    fn a_keyring_of_one_release_is_widened_and_a_foreign_one_is_not() {
        let all = Some("/all.gpg");
        assert_eq!(widen("/usr/share/keyrings/debian-archive-bookworm-stable.gpg", all), "/all.gpg");
        assert_eq!(widen("/etc/company.gpg", all), "/etc/company.gpg");
        assert_eq!(
            widen("/usr/share/keyrings/debian-archive-keyring.gpg", None),
            "/usr/share/keyrings/debian-archive-keyring.gpg"
        );
    }

    #[test]
    fn the_codename_is_unquoted() {
        assert_eq!(codename("ID=debian\nVERSION_CODENAME=\"trixie\"\n").as_deref(), Some("trixie"));
        assert_eq!(codename("ID=debian\n"), None);
    }
}
