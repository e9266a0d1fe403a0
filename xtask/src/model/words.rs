//! A film in words: for the terminal, where nothing can be drawn.

use super::language::Design;
use super::player::{Film, Picture, Progress, Scene};
use kvmprep_model::dump::text::{external_text, root_text};
use kvmprep_model::units::Privacy;

pub fn film(film: &Film) -> String {
    let title = if film.title.is_empty() { String::new() } else { format!("{}\n\n", film.title) };
    title + &film.pictures.iter().map(picture).collect::<Vec<_>>().join("\n")
}

fn picture(picture: &Picture) -> String {
    let mut out = String::new();
    for step in &picture.steps {
        let answer = if step.answer.is_empty() { String::new() } else { format!(" -> {}", step.answer) };
        out += &format!("> {}{answer}\n", step.text);
    }
    for under_way in &picture.under_way {
        out += &format!("> {}: {}\n", under_way.text, progress(under_way.progress));
    }
    if !picture.caption.is_empty() {
        out += &format!("== {}\n", picture.caption);
    }
    match &picture.scene {
        Scene::Vm { dump, .. } => out + &dump.to_string(),
        Scene::Design { which, tables: [shared, private], external } => {
            out + &format!(
                "{}\nfor shared accesses, {}for private accesses, {}{}",
                design(*which),
                root_text(shared),
                root_text(private),
                external_text(external)
            )
        }
    }
}

pub fn progress(progress: Progress) -> String {
    match progress {
        Progress::Stopped(call) => format!("stopped in {}", call.name()),
        Progress::Waits => "waits".into(),
    }
}

/// What a design decides by.
pub fn design(which: Design) -> &'static str {
    match which {
        Design::ByTable => "The table says whether it is mirrored",
        Design::ByAccess(Privacy::Shared) => "The access decides; zaps are taken for shared",
        Design::ByAccess(Privacy::Private) => "The access decides; zaps are taken for private",
    }
}
