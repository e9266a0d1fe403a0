//! A header of ours as text: what it declares, and the same header as an older or a newer version would have it.
//!
//! It relies on how cbindgen lays a header out, and reads no other. What a declaration means is the compiler's to
//! say, never this file's.

use std::collections::BTreeSet;

/// A struct that a later version may append fields to, as DESIGN has it: callers tell its size.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub enum Growth {
    /// It begins with `struct_size`.
    Input,
    /// It is passed with a size.
    Output,
}

/// Names before a `(` at the start of a declaration: in the header, comments apart, only functions have one.
pub fn declared_functions(header: &str) -> BTreeSet<String> {
    prototypes(header).into_iter().map(|(name, _)| name).collect()
}

/// Every function's name and declaration, without its semicolon.
pub fn prototypes(header: &str) -> Vec<(String, String)> {
    let name = |before: &str| before.rsplit([' ', '*']).next().map(str::to_owned);
    let named = declarations(header).into_iter().filter_map(|declaration| {
        let (before, _) = declaration.split_once('(')?;
        Some((name(before).filter(|name| name.starts_with("kvmprep_"))?, declaration))
    });
    named.collect()
}

/// Every callback's name and declaration, without its semicolon.
pub fn callbacks(header: &str) -> Vec<(String, String)> {
    let named = declarations(header).into_iter().filter_map(|declaration| {
        let (name, _) = declaration.strip_prefix("typedef ")?.split_once("(*")?.1.split_once(')')?;
        Some((name.to_owned(), declaration))
    });
    named.collect()
}

/// What is declared with parentheses, each in one line.
fn declarations(header: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut lines = header.lines();
    while let Some(line) = lines.next() {
        if line.starts_with(['*', '/', '#', ' ']) || !line.contains('(') {
            continue;
        }
        let mut declaration = line.trim().to_owned();
        while !declaration.ends_with(';') {
            let Some(next) = lines.next() else { break };
            declaration = declaration + " " + next.trim();
        }
        found.push(declaration.trim_end_matches(';').to_owned());
    }
    found
}

/// The structs that are declared in full.
pub fn structs(header: &str) -> Vec<&str> {
    header.lines().filter_map(|line| line.strip_prefix("struct ")?.strip_suffix(" {")).collect()
}

/// The structs of which only the name is told.
pub fn opaque(header: &str) -> Vec<&str> {
    header.lines().filter_map(|line| line.strip_prefix("struct ")?.strip_suffix(';')).collect()
}

/// The declarations of a struct's fields.
pub fn fields<'t>(header: &'t str, name: &str) -> Vec<&'t str> {
    body(header, name).filter(|line| is_field(line)).collect()
}

/// What kind of growth the header promises for a struct, if any.
pub fn growth(header: &str, name: &str) -> Option<Growth> {
    if fields(header, name).first().is_some_and(|field| field.trim() == "uint32_t struct_size;") {
        return Some(Growth::Input);
    }
    let is_passed_sized = |declaration: &str| {
        let parameters: Vec<&str> = declaration.split([',', '(', ')']).map(str::trim).collect();
        is_with_its_size(&parameters, name)
    };
    // An input may say where an output is to go.
    let is_pointed_to_sized = |holder: &&str| {
        let members = fields(header, holder).into_iter().map(|field| field.trim().trim_end_matches(';'));
        is_with_its_size(&members.collect::<Vec<_>>(), name)
    };
    let is_output = prototypes(header).iter().any(|(_, declaration)| is_passed_sized(declaration))
        || structs(header).iter().any(is_pointed_to_sized);
    is_output.then_some(Growth::Output)
}

/// Whether a pointer to the struct stands in the list with its size behind it.
fn is_with_its_size(declarations: &[&str], name: &str) -> bool {
    declarations.windows(2).any(|pair| {
        let output = pair[0].strip_prefix(&format!("struct {name} *"));
        output.is_some_and(|output| pair[1] == format!("size_t {output}_size"))
    })
}

/// The header as it would be if a struct had only its first `n` fields.
pub fn shortened(header: &str, name: &str, n: usize) -> String {
    let mut left = n;
    edit_struct(header, name, |line, text| {
        if is_field(line) && left == 0 {
            return;
        }
        left -= usize::from(is_field(line));
        text.push_str(&format!("{line}\n"));
    })
}

/// The header as it would be if a struct had another field at its end.
pub fn lengthened(header: &str, name: &str, field: &str) -> String {
    edit_struct(header, name, |line, text| {
        if line == "};" {
            text.push_str(&format!("  {field}\n"));
        }
        text.push_str(&format!("{line}\n"));
    })
}

/// The header as it would be if a struct's field of that number were declared so.
pub fn redeclared(header: &str, name: &str, n: usize, declaration: &str) -> String {
    let mut before = n;
    edit_struct(header, name, |line, text| {
        let is_it = is_field(line) && before == 0;
        before = before.wrapping_sub(usize::from(is_field(line)));
        text.push_str(&format!("{}\n", if is_it { declaration } else { line }));
    })
}

/// The header without its own claims about sizes, which hold for no other version's structs.
pub fn without_asserts(header: &str) -> String {
    let lines = header.lines().filter(|line| !line.starts_with("KVMPREP_STATIC_ASSERT("));
    lines.map(|line| format!("{line}\n")).collect()
}

/// Macros that stand for one value.
pub fn constants(header: &str) -> Vec<&str> {
    let defined = header.lines().filter_map(|line| line.strip_prefix("#define ")?.split_once(' '));
    defined
        .map(|(name, _)| name)
        .filter(|name| name.starts_with("KVMPREP_") && !name.contains('(') && !name.ends_with("_INIT"))
        .collect()
}

/// The structs that have an initialiser: its name and the struct's.
pub fn initialisers(header: &str) -> Vec<(String, String)> {
    let defined = header.lines().filter_map(|line| line.strip_prefix("#define ")?.split_once(' '));
    let named = defined.filter_map(|(name, _)| Some((name, name.strip_suffix("_INIT")?)));
    named.map(|(name, stem)| (name.to_owned(), stem.to_lowercase())).collect()
}

/// Lines after the struct's name, the closing one included.
fn body<'t>(header: &'t str, name: &str) -> impl Iterator<Item = &'t str> {
    let start = format!("struct {name} {{");
    let mut lines = header.lines().skip_while(move |line| *line != start).skip(1);
    let mut ended = false;
    std::iter::from_fn(move || {
        let line = lines.next().filter(|_| !ended)?;
        ended = line == "};";
        Some(line)
    })
}

fn is_field(line: &str) -> bool {
    line.strip_prefix("  ").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_alphabetic()))
}

fn edit_struct(header: &str, name: &str, mut edit: impl FnMut(&str, &mut String)) -> String {
    let start = format!("struct {name} {{");
    let (mut text, mut inside) = (String::new(), false);
    for line in header.lines() {
        if inside {
            edit(line, &mut text);
        } else {
            text.push_str(&format!("{line}\n"));
        }
        inside = (inside || line == start) && line != "};";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "#define KVMPREP_H\n#define KVMPREP_IN_INIT { sizeof(struct kvmprep_in), 0 }\n\
        #define KVMPREP_ASSERT(x) x\n#define KVMPREP_ONE 1\n/* kvmprep_no(x) */\nstruct kvmprep_in {\n\
        \x20 /**\n   * Size.\n   */\n  uint32_t struct_size;\n  uint32_t b;\n};\n\
        struct kvmprep_out {\n  uint64_t a;\n  uint64_t b[2];\n};\nstruct kvmprep_fixed {\n  int a;\n};\n\
        struct kvmprep_told {\n  int a;\n};\nstruct kvmprep_list {\n  struct kvmprep_told *told;\n\
        \x20 size_t told_size;\n  struct kvmprep_fixed *f;\n  size_t n;\n};\n\
        typedef int (*kvmprep_fn)(int);\nint kvmprep_a(const struct kvmprep_in *in,\n\
        \x20             struct kvmprep_out *out, size_t out_size, struct kvmprep_fixed *f);\n\
        const char *kvmprep_b(void);\nKVMPREP_STATIC_ASSERT(sizeof(struct kvmprep_in) == 8);\n";

    #[test]
    fn functions_are_found_and_types_are_not() {
        assert_eq!(declared_functions(HEADER).into_iter().collect::<Vec<_>>(), ["kvmprep_a", "kvmprep_b"]);
        assert!(prototypes(HEADER)[0].1.ends_with("size_t out_size, struct kvmprep_fixed *f)"));
        assert_eq!(
            callbacks(HEADER),
            [("kvmprep_fn".to_owned(), "typedef int (*kvmprep_fn)(int)".to_owned())]
        );
    }

    #[test]
    fn what_may_grow_is_told_by_how_it_is_passed() {
        let all = ["kvmprep_in", "kvmprep_out", "kvmprep_fixed", "kvmprep_told", "kvmprep_list"];
        assert_eq!(structs(HEADER), all);
        assert_eq!(growth(HEADER, "kvmprep_in"), Some(Growth::Input));
        assert_eq!(growth(HEADER, "kvmprep_out"), Some(Growth::Output));
        assert_eq!(growth(HEADER, "kvmprep_told"), Some(Growth::Output));
        assert!(["kvmprep_fixed", "kvmprep_list"].iter().all(|name| growth(HEADER, name).is_none()));
    }

    #[test]
    fn structs_are_cut_and_extended_at_their_end() {
        let cut = shortened(HEADER, "kvmprep_out", 1);
        assert_eq!(fields(&cut, "kvmprep_out"), ["  uint64_t a;"]);
        assert_eq!(lengthened(&cut, "kvmprep_out", "uint64_t b[2];"), HEADER);
        assert_eq!(fields(&cut, "kvmprep_in").len(), 2);
        let other = redeclared(HEADER, "kvmprep_out", 1, "  uint32_t c[4];");
        assert_eq!(fields(&other, "kvmprep_out"), ["  uint64_t a;", "  uint32_t c[4];"]);
        assert_eq!(redeclared(&other, "kvmprep_out", 1, "  uint64_t b[2];"), HEADER);
    }

    #[test]
    fn values_and_initialisers_are_told_apart() {
        assert_eq!(constants(HEADER), ["KVMPREP_ONE"]);
        assert_eq!(initialisers(HEADER), [("KVMPREP_IN_INIT".to_owned(), "kvmprep_in".to_owned())]);
        assert!(!without_asserts(HEADER).contains("STATIC"));
    }
}
