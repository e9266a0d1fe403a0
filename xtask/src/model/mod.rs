//! `cargo xtask model`: what the software model is like in a scenario, in words and drawn.
//!
//! Scenarios are told in a small language, one operation a line. Those in `docs/scenarios/` belong to the documentation: their
//! drawings stand beside them, are made by nobody's hand, and are held against the model by `cargo xtask test`.

mod calls;
mod deeds;
mod drawing;
mod language;
mod library;
mod making;
mod pair;
mod player;
mod reader;
mod runs;
mod stage;
#[cfg(test)]
mod tests;
mod view;
mod words;

pub use library::check;

use anyhow::{Context, Result};
use player::Film;
use std::io::Read;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Play a scenario, and show the states that it comes to.
    Dump(Dump),
    /// Draw all scenarios of docs/scenarios anew.
    Draw,
    /// Hold the drawings of docs/scenarios against the model.
    Check,
}

#[derive(clap::Args)]
struct Dump {
    /// One of the project's own by its name, a file, or - for standard input.
    #[arg(required_unless_present_any = ["list", "language"])]
    scenario: Option<String>,
    /// Draw it, too.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Say which scenarios the project has.
    #[arg(long)]
    list: bool,
    /// Say how every operation is written.
    #[arg(long)]
    language: bool,
}

pub fn main(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Dump(dump) => self::dump(&dump),
        Command::Draw => library::draw_all(),
        Command::Check => library::check(),
    }
}

fn dump(cli: &Dump) -> Result<()> {
    if cli.list {
        library::all()?.iter().for_each(|own| println!("{:12} {}", own.name, own.title));
    }
    if cli.language {
        print!("{}", language::usage());
    }
    let Some(scenario) = &cli.scenario else { return Ok(()) };
    let film = film(&text_of(scenario)?).with_context(|| format!("scenario {scenario}"))?;
    print!("{}", words::film(&film));
    if let Some(path) = &cli.svg {
        std::fs::write(path, drawing::svg(&film))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn film(text: &str) -> Result<Film> {
    player::play(&language::parse(text)?)
}

fn text_of(scenario: &str) -> Result<String> {
    if scenario == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
        return Ok(text);
    }
    if let Some(own) = library::all()?.into_iter().find(|own| own.name == scenario) {
        return own.text();
    }
    std::fs::read_to_string(scenario).with_context(|| {
        format!(
            "{scenario:?} is no file, and no scenario of the project's: see `cargo xtask model dump --list`"
        )
    })
}
