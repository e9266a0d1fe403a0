//! Whether the library is what the header says, type by type: the debug information of the Rust functions, held
//! against that of the header as C's compiler sees it.
//!
//! The header is generated, so the two should never differ; that is looked at here and not believed. Names of
//! primitive types are the languages' own business, and so is `const`, which Rust does not tell: sizes, signs,
//! fields, their order and what they point to must be the same.

use super::{record, text};
use crate::project;
use anyhow::{Context, Result, ensure};
use roxmltree::{Document, Node};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::process::Command;

/// Functions with their parameters and structs with their fields, each in one line of words of no language.
type Types = BTreeMap<String, String>;

/// What stands between the parts of a type.
const PARTS: &[char] = &['{', ';', '}'];

/// Fails where the library's types are not the header's.
pub fn check() -> Result<()> {
    let work = tempfile::tempdir_in(project::output()?)?;
    let current = record::whole()?;
    let header = current.library(work.path())?;
    // As developers build it: the shipped one does not carry types, and they are the same sources.
    project::run(project::cargo().args(["build", "--package", "kvmprep"]))?;
    let library = project::target().join("debug/libkvmprep.so");
    let (said, is) = (types_of(&header)?, types_of(&library)?);
    let unseen: Vec<&str> = text::structs(&current.header)
        .into_iter()
        .filter(|name| !said.contains_key(&format!("struct {name}")))
        .collect();
    ensure!(
        unseen.is_empty(),
        "no function leads to {unseen:?}: nothing that compares interfaces can see them"
    );
    let nothing = "nothing of that name".to_owned();
    let both = said.iter().map(|(name, text)| (name, text, is.get(name).unwrap_or(&nothing)));
    let differences: Vec<String> = both
        .filter(|(_, said, is)| said != is)
        .map(|(name, said, is)| {
            format!("{name}: the header says {}, the library has {}", beyond(said, is), beyond(is, said))
        })
        .collect();
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

/// The parts of a text that another does not have; all of it when order alone differs.
fn beyond(text: &str, other: &str) -> String {
    let others: Vec<&str> = other.split(PARTS).collect();
    let only: Vec<&str> = text.split(PARTS).filter(|part| !others.contains(part)).collect();
    if only.is_empty() { text.to_owned() } else { only.join("; ") }
}

fn types_of(library: &Path) -> Result<Types> {
    let xml = project::run(Command::new("abidw").arg("--no-corpus-path").arg(library))?;
    types(&xml).with_context(|| format!("abidw of {}", library.display()))
}

fn types(xml: &str) -> Result<Types> {
    let document = Document::parse(xml)?;
    let by_id: HashMap<&str, Node> =
        document.descendants().filter_map(|node| Some((node.attribute("id")?, node))).collect();
    let all = All { by_id };
    let ours = |node: &Node| node.attribute("name").is_some_and(|name| name.starts_with("kvmprep_"));
    let mut types = Types::new();
    for node in document.descendants().filter(ours) {
        let name = node.attribute("name").unwrap_or_default();
        match node.tag_name().name() {
            "function-decl" => types.insert(name.to_owned(), all.function(node)),
            "class-decl" if is_complete(node) => types.insert(format!("struct {name}"), all.structure(node)),
            _ => None,
        };
    }
    Ok(types)
}

/// Not a handle, which C knows by name alone.
fn is_complete(node: Node) -> bool {
    node.attribute("is-declaration-only") != Some("yes")
}

/// The nodes that describe types.
struct All<'d> {
    by_id: HashMap<&'d str, Node<'d, 'd>>,
}

impl All<'_> {
    fn function(&self, node: Node) -> String {
        let types = |tag: &'static str| {
            let nodes = node.children().filter(move |child| child.has_tag_name(tag));
            nodes.map(|child| self.type_of(child)).collect::<Vec<_>>().join(", ")
        };
        format!("({}) to {}", types("parameter"), types("return"))
    }

    fn structure(&self, node: Node) -> String {
        let members = node.children().filter(|child| child.has_tag_name("data-member"));
        let fields = members.filter_map(|member| {
            let offset = member.attribute("layout-offset-in-bits")?;
            let field = member.children().find(|child| child.has_tag_name("var-decl"))?;
            Some(format!("{} at {offset}: {}", field.attribute("name")?, self.type_of(field)))
        });
        let fields: Vec<String> = fields.collect();
        format!("{} bits {{ {} }}", node.attribute("size-in-bits").unwrap_or("?"), fields.join("; "))
    }

    /// The type that a node refers to.
    fn type_of(&self, node: Node) -> String {
        let target = node.attribute("type-id").and_then(|id| self.by_id.get(id));
        target.map_or("nothing".to_owned(), |target| self.describe(*target))
    }

    fn describe(&self, node: Node) -> String {
        let name = node.attribute("name").unwrap_or_default();
        match node.tag_name().name() {
            "typedef-decl" | "qualified-type-def" => self.type_of(node),
            "pointer-type-def" => format!("pointer to {}", self.type_of(node)),
            "function-type" => "function".to_owned(),
            "array-type-def" => {
                let lengths = node.children().filter_map(|child| child.attribute("length"));
                format!("array of {} {}", lengths.collect::<Vec<_>>().join(" by "), self.type_of(node))
            }
            // What Rust calls a pointer to a function that may be NULL.
            "class-decl" if name.starts_with("Option<") && name.contains("extern \"C\" fn(") => {
                "pointer to function".to_owned()
            }
            "class-decl" => format!("struct {name}"),
            // Rust's void is an enumeration without use.
            "enum-decl" if name == "c_void" => "void".to_owned(),
            "type-decl" => primitive(name, node.attribute("size-in-bits").unwrap_or_default()),
            other => format!("{other} {name}"),
        }
    }
}

/// An integer by its size and sign; a character by its size, since C leaves its sign open.
fn primitive(name: &str, bits: &str) -> String {
    let is_unsigned = name.starts_with("unsigned") || name.contains(" unsigned") || name.starts_with('u');
    match (name, bits) {
        ("void" | "()", _) => "void".to_owned(),
        (_, "8") => "character".to_owned(),
        _ if is_unsigned => format!("unsigned {bits}"),
        _ => format!("signed {bits}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const C: &str = "<abi-corpus><abi-instr>
        <type-decl name='unsigned int' size-in-bits='32' id='u'/><type-decl name='int' size-in-bits='32' id='i'/>
        <typedef-decl name='uint32_t' type-id='u' id='t'/><pointer-type-def type-id='s' id='p'/>
        <class-decl name='kvmprep_s' size-in-bits='64' id='s'>
        <data-member layout-offset-in-bits='0'><var-decl name='a' type-id='t'/></data-member>
        <data-member layout-offset-in-bits='32'><var-decl name='b' type-id='f'/></data-member></class-decl>
        <pointer-type-def type-id='ft' id='f'/><function-type id='ft'/>
        <function-decl name='kvmprep_f'><parameter type-id='p'/><return type-id='i'/></function-decl>
        </abi-instr></abi-corpus>";
    const RUST: &str = "<abi-corpus><abi-instr>
        <type-decl name='u32' size-in-bits='32' id='u'/><type-decl name='i32' size-in-bits='32' id='i'/>
        <pointer-type-def type-id='s' id='p'/>
        <class-decl name='kvmprep_s' size-in-bits='64' id='s'>
        <data-member layout-offset-in-bits='0'><var-decl name='a' type-id='u'/></data-member>
        <data-member layout-offset-in-bits='32'><var-decl name='b' type-id='o'/></data-member></class-decl>
        <class-decl name='Option&lt;unsafe extern &quot;C&quot; fn(i32)&gt;' size-in-bits='64' id='o'/>
        <function-decl name='kvmprep_f'><parameter type-id='p'/><return type-id='i'/></function-decl>
        </abi-instr></abi-corpus>";

    #[test]
    fn the_same_in_both_languages_is_the_same() {
        let types = types(C).unwrap();
        assert_eq!(types["kvmprep_f"], "(pointer to struct kvmprep_s) to signed 32");
        assert_eq!(
            types["struct kvmprep_s"],
            "64 bits { a at 0: unsigned 32; b at 32: pointer to function }"
        );
        assert_eq!(types, super::types(RUST).unwrap());
    }

    #[test]
    fn only_what_differs_is_told() {
        assert_eq!(beyond("8 bits { a: x; b: y }", "8 bits { a: x; b: z }"), " b: y ");
        assert_eq!(beyond("(a) to b", "(a) to c"), "(a) to b");
    }

    #[test]
    fn another_type_or_name_is_not() {
        for (from, to) in [("name='a'", "name='z'"), ("type-id='u'/></data", "type-id='i'/></data")] {
            assert_ne!(types(C).unwrap(), types(&RUST.replace(from, to)).unwrap(), "{to}");
        }
    }
}
