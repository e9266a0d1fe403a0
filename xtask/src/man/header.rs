//! What the header declares, as the man pages have to show it.
//!
//! It reads the text that cbindgen writes; it knows nothing of pages.

use crate::abi;
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
    /// Every name that there is.
    pub names: BTreeSet<String>,
    /// `major.minor.patch`.
    pub version: String,
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
    pub fn parse(text: &str) -> Result<Self> {
        let code = without_comments(text);
        let statements = statements(&code);
        let mut functions = BTreeMap::new();
        for name in abi::declared_functions(text) {
            let is_it = |statement: &&String| statement.contains(&format!("{name}("));
            let prototype =
                statements.iter().find(is_it).with_context(|| format!("no prototype of {name}"))?;
            let comment = comment_before(text, &name).with_context(|| format!("no comment for {name}"))?;
            let function = Function {
                prototype: prototype.clone(),
                errnos: errnos(comment),
                since: comment.split_once("kvmprep 0.").map(|(_, minor)| {
                    format!("0.{}", minor.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default())
                }),
            };
            functions.insert(name, function);
        }
        let structs = structs(&code);
        let callbacks = callbacks(&statements);
        ensure!(
            !functions.is_empty() && !structs.is_empty(),
            "nothing found in the header: the check is broken"
        );
        Ok(Self {
            functions,
            types: opaque(&code).iter().chain(structs.keys()).chain(callbacks.keys()).cloned().collect(),
            structs,
            callbacks,
            constants: constants(&code).map(|(name, _)| name.to_owned()).collect(),
            names: names(&code).map(|(name, _)| name.to_owned()).collect(),
            version: version(&code).context("no KVMPREP_VERSION")?,
        })
    }
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

fn without_comments(text: &str) -> String {
    let mut code = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("/*") {
        code += before;
        rest = after.split_once("*/").map_or("", |(_, after)| after);
    }
    code + rest
}

/// What ends in a semicolon outside of structs, preprocessing apart, in one line each.
fn statements(code: &str) -> Vec<String> {
    let lines = code.lines().filter(|line| !line.trim_start().starts_with('#') && !line.ends_with('\\'));
    let code = lines.collect::<Vec<_>>().join("\n");
    let statements = code.split(';').map(|statement| statement.rsplit(['{', '}']).next().unwrap_or_default());
    statements.map(|statement| squeezed(statement) + ";").collect()
}

fn comment_before<'t>(text: &'t str, function: &str) -> Option<&'t str> {
    let call = format!("{function}(");
    let is_declaration = |line: &str| line.contains(&call) && !line.starts_with([' ', '*', '/', '#']);
    let declaration = text.lines().find(|line| is_declaration(line))?;
    let before = &text[..declaration.as_ptr() as usize - text.as_ptr() as usize];
    before.rfind("/**").map(|at| &before[at..])
}

fn structs(code: &str) -> BTreeMap<String, Struct> {
    let mut structs = BTreeMap::new();
    for piece in code.split("\nstruct ").skip(1) {
        let Some((name, body)) = piece.split_once(" {") else { continue };
        let Some((body, _)) = body.split_once("};") else { continue };
        let fields = body.split(';').filter_map(|field| {
            let field = field.split('[').next()?;
            field.rsplit([' ', '*', '\n']).next().filter(|name| !name.is_empty()).map(str::to_owned)
        });
        let declaration = squeezed(&format!("struct {name} {{{body}}};"));
        structs.insert(name.to_owned(), Struct { declaration, fields: fields.collect() });
    }
    structs
}

/// The structs of which only the name is told.
fn opaque(code: &str) -> BTreeSet<String> {
    let names = code.lines().filter_map(|line| line.strip_prefix("struct ")?.strip_suffix(';'));
    names.map(str::to_owned).collect()
}

/// `typedef int (*NAME)(…);`
fn callbacks(statements: &[String]) -> BTreeMap<String, String> {
    let typedefs = statements.iter().filter(|statement| statement.starts_with("typedef "));
    typedefs
        .filter_map(|statement| {
            let (name, _) = statement.split_once("(*")?.1.split_once(')')?;
            Some((name.to_owned(), statement.clone()))
        })
        .collect()
}

/// `#define NAME VALUE`, the header's own machinery apart.
fn constants(code: &str) -> impl Iterator<Item = (&str, &str)> {
    code.lines()
        .filter_map(|line| line.strip_prefix("#define ")?.split_once(' '))
        .filter(|(name, _)| !name.contains('(') && !name.contains("STATIC_ASSERT"))
}

fn version(code: &str) -> Option<String> {
    let number: u32 = constants(code).find(|(name, _)| *name == "KVMPREP_VERSION")?.1.parse().ok()?;
    Some(format!("{}.{}.{}", number >> 16, number >> 8 & 0xff, number & 0xff))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
#define KVMPREP_H\n#define KVMPREP_VERSION 515\n#define KVMPREP_STATIC_ASSERT(x) y;\n\
struct kvmprep_vm;\n\n/**\n * A range.\n */\nstruct kvmprep_range {\n  /** First. */\n  uint64_t gpa;\n\
  uint64_t reserved[2];\n  const int *fds;\n};\n\
typedef int (*kvmprep_fn)(const struct kvmprep_range *range);\n\
extern \"C\" {\n/**\n * No error: -EPERM.\n */\nuint32_t kvmprep_a(void);\n\n\
/**\n * Returns -EINVAL, or -E2BIG. Since kvmprep 0.12.\n */\nint kvmprep_b(int x,\n              int y);\n";

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
        assert_eq!(header.version, "0.2.3");
    }
}
