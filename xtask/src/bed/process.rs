//! Runs a tool and keeps what it said.
//!
//! Nothing here prints: a tool's chatter is shown only inside an error, where it is the explanation.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// What a finished tool left behind.
pub struct Captured {
    /// Whether it exited with 0.
    pub success: bool,
    /// Its standard output, with what is not UTF-8 replaced.
    pub stdout: String,
    /// Its standard error, likewise.
    pub stderr: String,
    command: String,
}

impl Captured {
    /// Turns a failed tool into an error that quotes the end of what it said.
    pub fn or_fail(self) -> Result<Self> {
        if self.success {
            return Ok(self);
        }
        let said = if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr };
        bail!("{} failed:\n{}", self.command, tail(said, 25))
    }
}

/// Runs `command` to its end with no input.
pub fn capture(command: &mut Command) -> Result<Captured> {
    let shown = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().with_context(|| {
        format!("cannot run {}: is it installed?", command.get_program().to_string_lossy())
    })?;
    Ok(Captured {
        success: output.status.success(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        command: shown,
    })
}

/// Runs `command` with `input` on its standard input and answers with the bytes it wrote.
pub fn filter(command: &mut Command, input: &[u8]) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run {name}: is it installed?"))?;
    let stdin = child.stdin.take();
    // Written from a thread of its own: a filter that fills its output pipe stops reading.
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.map(|mut pipe| pipe.write_all(input)));
        child.wait_with_output()
    })?;
    if !output.status.success() {
        bail!("{name} could not process its input ({})", output.status);
    }
    Ok(output.stdout)
}

/// The last `lines` lines of `text`.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.trim_end().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_end_and_no_more() {
        assert_eq!(tail("a\nb\nc\n\n", 2), "b\nc");
        assert_eq!(tail("a", 5), "a");
        assert_eq!(tail("", 5), "");
    }

    #[test]
    fn a_failed_tool_is_quoted() {
        let failed = capture(Command::new("sh").args(["-c", "echo so it goes >&2; exit 3"])).unwrap();
        let error = failed.or_fail().err().unwrap().to_string();
        assert!(error.ends_with("so it goes"), "{error}");
    }

    #[test]
    fn a_filter_may_write_more_than_a_pipe_holds() {
        let input = vec![7u8; 1 << 20];
        assert_eq!(filter(&mut Command::new("cat"), &input).unwrap(), input);
    }
}
