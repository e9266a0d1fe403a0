//! What of the interface is promised to stay: all but what is declared under KVMPREP_EXPERIMENTAL.
//!
//! The rest is shipped, exported and compiled by the checks as everything is; it stands in no record and may change. Here
//! the two are told apart, in the header and in the list of symbol versions, and nothing else is judged.

/// What a program defines that wants the rest too; the rest's node of symbol versions has the same name.
pub const MACRO: &str = "KVMPREP_EXPERIMENTAL";

const BEGIN: &str = "#if defined(KVMPREP_EXPERIMENTAL)";
const END: &str = "#endif";

/// The header that a program sees that asks for no more.
pub fn header(whole: &str) -> String {
    let mut inside = false;
    let promised = whole.lines().filter(|line| {
        let was_inside = inside;
        inside = *line == BEGIN || inside && *line != END;
        !was_inside && !inside
    });
    // Each block took the empty line behind it along.
    squeezed(promised)
}

/// The header that a program sees that asks for all.
pub fn opened(whole: &str) -> String {
    let mut inside = false;
    let lines = whole.lines().filter(|line| {
        let is_edge = *line == BEGIN || inside && *line == END;
        inside = *line == BEGIN || inside && !is_edge;
        !is_edge
    });
    lines.map(|line| format!("{line}\n")).collect()
}

/// The header with neighbouring blocks of the rest made one.
pub fn merged(whole: &str) -> String {
    whole.replace(&format!("{END}\n\n{BEGIN}\n"), "\n")
}

/// The list of symbol versions without the rest's node, which is a paragraph of its own.
pub fn map(whole: &str) -> String {
    let node = format!("{MACRO} {{");
    let paragraphs = whole.trim_end().split("\n\n");
    let promised = paragraphs.filter(|paragraph| !paragraph.lines().any(|line| line == node));
    promised.collect::<Vec<_>>().join("\n\n") + "\n"
}

/// The lines, with no more than one empty line at a time.
fn squeezed<'t>(lines: impl Iterator<Item = &'t str>) -> String {
    let mut text = String::new();
    for line in lines {
        if !line.is_empty() || !text.ends_with("\n\n") {
            text += &format!("{line}\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = "int a;\n\n#if defined(KVMPREP_EXPERIMENTAL)\n#define X 1\n#endif\n\n\
        #if defined(KVMPREP_EXPERIMENTAL)\n/**\n * Y.\n */\nint y;\n#endif\n\n#if defined(OTHER)\nint b;\n#endif\n";

    #[test]
    fn the_rest_stands_in_one_place_and_can_be_left_out_or_opened() {
        let merged = merged(WHOLE);
        assert_eq!(merged.matches(BEGIN).count(), 1);
        let promised = "int a;\n\n#if defined(OTHER)\nint b;\n#endif\n";
        assert_eq!(header(&merged), promised);
        assert_eq!(header(WHOLE), promised);
        let opened = opened(&merged);
        assert_eq!(
            opened,
            "int a;\n\n#define X 1\n\n/**\n * Y.\n */\nint y;\n\n#if defined(OTHER)\nint b;\n#endif\n"
        );
        assert_eq!(header(promised), promised);
    }

    #[test]
    fn the_rest_s_node_is_in_no_record() {
        let kept = "/* x */\nK_1 {\nglobal:\n    kvmprep_a;\n};\n";
        let rest = "\n/* No promise. */\nKVMPREP_EXPERIMENTAL {\nglobal:\n    kvmprep_y;\n};\n";
        assert_eq!(map(&format!("{kept}{rest}")), kept);
        assert_eq!(
            map(&format!("{kept}{rest}\nK_2 {{\n    kvmprep_b;\n}} K_1;\n")),
            format!("{kept}\nK_2 {{\n    kvmprep_b;\n}} K_1;\n")
        );
        assert_eq!(map(kept), kept);
    }
}
