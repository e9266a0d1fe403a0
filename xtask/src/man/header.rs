//! What the header declares, as the man pages have to show it.
//!
//! What is declared is read where the interface is judged; here it is put as a page puts it. It knows nothing of pages.

use crate::abi::text;
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};

/// The header's declarations.
pub struct Header {
    pub functions: BTreeMap<String, Function>,
    /// Of structs that are declared in full: text and fields.
    pub structs: BTreeMap<String, Struct>,
    /// Every struct, opaque ones too, and every callback.
    pub types: BTreeSet<String>,
    /// Of callbacks: the `typedef` in one line.
    pub callbacks: BTreeMap<String, String>,
    /// Macros that stand for a value.
    pub constants: BTreeSet<String>,
}

/// A function's declaration.
pub struct Function {
    /// In one line, with single spaces.
    pub prototype: String,
    /// The errnos that its comment names, such as `-EINVAL`.
    pub errnos: BTreeSet<String>,
    /// The version that its comment says it came with.
    pub since: Option<String>,
}

/// A struct's declaration.
pub struct Struct {
    /// In one line, with single spaces.
    pub declaration: String,
    pub fields: Vec<String>,
}

impl Header {
    pub fn parse(header: &str) -> Result<Self> {
        let mut functions = BTreeMap::new();
        for (name, declaration) in text::prototypes(header) {
            let comment = comment_before(header, &name).with_context(|| format!("no comment for {name}"))?;
            let function = Function {
                prototype: in_one_line(&declaration),
                errnos: errnos(comment),
                since: since(comment),
            };
            functions.insert(name, function);
        }
        let structs: BTreeMap<_, _> = text::structs(header)
            .into_iter()
            .map(|name| (name.to_owned(), Struct::of(header, name)))
            .collect();
        ensure!(
            !functions.is_empty() && !structs.is_empty(),
            "nothing found in the header: the check is broken"
        );
        let callbacks: BTreeMap<_, _> = text::callbacks(header)
            .into_iter()
            .map(|(name, declaration)| (name, in_one_line(&declaration)))
            .collect();
        let opaque = text::opaque(header).into_iter().map(str::to_owned);
        let initialisers = text::initialisers(header).into_iter().map(|(name, _)| name);
        Ok(Self {
            types: opaque.chain(structs.keys().cloned()).chain(callbacks.keys().cloned()).collect(),
            constants: text::constants(header).into_iter().map(str::to_owned).chain(initialisers).collect(),
            functions,
            structs,
            callbacks,
        })
    }

    /// Every name that there is.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.functions.keys().chain(&self.types).chain(&self.constants)
    }
}

impl Struct {
    fn of(header: &str, name: &str) -> Self {
        let fields = text::fields(header, name);
        let field_name = |field: &str| {
            let field = field.split(['[', ';']).next().unwrap_or_default();
            field.rsplit([' ', '*']).next().unwrap_or_default().to_owned()
        };
        Self {
            declaration: squeezed(&format!("struct {name} {{ {} }};", fields.join(" "))),
            fields: fields.iter().map(|field| field_name(field)).collect(),
        }
    }
}

fn in_one_line(declaration: &str) -> String {
    squeezed(declaration) + ";"
}

/// The minor version of "Since kvmprep 0.2.", as `0.2`, wherever its line ends.
fn since(comment: &str) -> Option<String> {
    let in_one_line = comment.replace("\n * ", " ");
    let (_, minor) = in_one_line.split_once("kvmprep 0.")?;
    Some(format!("0.{}", minor.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default()))
}

/// Names with our prefixes in a text, each with what follows it.
pub fn names(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let starts = text.char_indices().filter(move |(at, c)| is_word(*c) && !text[..*at].ends_with(is_word));
    starts
        .map(move |(at, _)| {
            let rest = &text[at..];
            rest.split_at(rest.find(|c| !is_word(c)).unwrap_or(rest.len()))
        })
        .filter(|(word, _)| word.starts_with("kvmprep_") || word.starts_with("KVMPREP_"))
}

/// The errnos in a text, each with its minus.
pub fn errnos(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_'));
    let is_errno = |word: &&str| {
        word.strip_prefix("-E").is_some_and(|name| {
            name.len() >= 2 && name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit())
        })
    };
    words.filter(is_errno).map(str::to_owned).collect()
}

/// The same with single spaces.
pub fn squeezed(text: &str) -> String {
    text.split_ascii_whitespace().collect::<Vec<_>>().join(" ")
}

fn comment_before<'t>(text: &'t str, function: &str) -> Option<&'t str> {
    let call = format!("{function}(");
    let is_declaration = |line: &str| line.contains(&call) && !line.starts_with([' ', '*', '/', '#']);
    let declaration = text.lines().find(|line| is_declaration(line))?;
    let before = &text[..declaration.as_ptr() as usize - text.as_ptr() as usize];
    before.rfind("/**").map(|at| &before[at..])
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
#define KVMPREP_H\n#define KVMPREP_VERSION 515\n#define KVMPREP_STATIC_ASSERT(x) y;\n\
struct kvmprep_vm;\n\n/**\n * A range.\n */\nstruct kvmprep_range {\n  /** First. */\n  uint64_t gpa;\n\
\x20 uint64_t reserved[2];\n  const int *fds;\n};\n\
typedef int (*kvmprep_fn)(const struct kvmprep_range *range);\n\
extern \"C\" {\n/**\n * No error: -EPERM.\n */\nuint32_t kvmprep_a(void);\n\n\
/**\n * Returns -EINVAL, or -E2BIG. Since kvmprep\n * 0.12.\n */\nint kvmprep_b(int x,\n              int y);\n";

    #[test]
    fn finds_what_is_declared() {
        let header = Header::parse(TEXT).unwrap();
        let b = &header.functions["kvmprep_b"];
        assert_eq!(b.prototype, "int kvmprep_b(int x, int y);");
        assert_eq!(b.errnos.iter().collect::<Vec<_>>(), ["-E2BIG", "-EINVAL"]);
        assert_eq!(b.since.as_deref(), Some("0.12"));
        assert_eq!(header.functions["kvmprep_a"].prototype, "uint32_t kvmprep_a(void);");
        let range = &header.structs["kvmprep_range"];
        assert_eq!(range.fields, ["gpa", "reserved", "fds"]);
        assert_eq!(
            range.declaration,
            "struct kvmprep_range { uint64_t gpa; uint64_t reserved[2]; const int *fds; };"
        );
        assert_eq!(
            header.callbacks["kvmprep_fn"],
            "typedef int (*kvmprep_fn)(const struct kvmprep_range *range);"
        );
        assert_eq!(header.types.iter().collect::<Vec<_>>(), ["kvmprep_fn", "kvmprep_range", "kvmprep_vm"]);
        assert_eq!(header.constants.iter().collect::<Vec<_>>(), ["KVMPREP_VERSION"]);
    }
}
