//! Takes the program's output out of what a guest sends on its second serial port.
//!
//! The init frames the output: a line `TOKEN start`, the output itself byte for byte, then a newline and a
//! line `TOKEN end STATUS`. The token is random, so no output can be taken for the frame. Lines are handed on
//! as they come; only an empty line waits for the next one, since it may be the frame's.

/// The state of one guest's output.
#[derive(Debug)]
pub struct Stream {
    start: String,
    end: String,
    /// Received since the last complete line.
    partial: Vec<u8>,
    started: bool,
    /// Empty lines that have been held back.
    pending: usize,
    output: Vec<u8>,
    status: Option<i32>,
}

impl Stream {
    /// A stream framed by `token`.
    pub fn new(token: &str) -> Self {
        Stream {
            start: format!("{token} start"),
            end: format!("{token} end "),
            partial: Vec::new(),
            started: false,
            pending: 0,
            output: Vec::new(),
            status: None,
        }
    }

    /// Takes in more bytes and hands complete lines of output to `on_line`.
    pub fn feed(&mut self, bytes: &[u8], on_line: &mut dyn FnMut(&str)) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.partial.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.partial);
                self.line(&line, on_line);
            }
        }
    }

    fn line(&mut self, line: &[u8], on_line: &mut dyn FnMut(&str)) {
        if self.status.is_some() {
            return;
        }
        let text = String::from_utf8_lossy(&line[..line.len() - 1]);
        if !self.started {
            // The port's first settings may have left a few bytes before it.
            self.started = text.ends_with(&self.start);
            return;
        }
        if let Some(status) = text.strip_prefix(&self.end).and_then(|status| status.parse().ok()) {
            self.status = Some(status);
            // The newline before the frame is the frame's, and so is the empty line it makes.
            self.output.pop();
            self.flush(self.pending.saturating_sub(1), on_line);
            return;
        }
        self.output.extend_from_slice(line);
        if text.is_empty() {
            self.pending += 1;
            return;
        }
        self.flush(self.pending, on_line);
        on_line(&text);
    }

    fn flush(&mut self, lines: usize, on_line: &mut dyn FnMut(&str)) {
        (0..lines).for_each(|_| on_line(""));
        self.pending = 0;
    }

    /// Whether the program has started.
    pub fn started(&self) -> bool {
        self.started
    }

    /// The program's exit status, once it is known.
    pub fn status(&self) -> Option<i32> {
        self.status
    }

    /// The output so far, with what is not UTF-8 replaced.
    pub fn output(&self) -> String {
        let partial: &[u8] = if self.started && self.status.is_none() { &self.partial } else { &[] };
        String::from_utf8_lossy(&[&self.output[..], partial].concat()).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(pieces: &[&str]) -> (Stream, Vec<String>) {
        let mut stream = Stream::new("T");
        let mut lines = Vec::new();
        for piece in pieces {
            stream.feed(piece.as_bytes(), &mut |line| lines.push(line.to_string()));
        }
        (stream, lines)
    }

    #[test]
    fn output_and_status_are_told_apart() {
        let (stream, lines) = run(&["junkT start\nhello\n", "world\n\nT end 3\n"]);
        assert_eq!(stream.status(), Some(3));
        assert_eq!(stream.output(), "hello\nworld\n");
        assert_eq!(lines, ["hello", "world"]);
    }

    #[test]
    fn output_without_a_last_newline_is_kept_as_it_is() {
        let (stream, lines) = run(&["T start\nno newline\nT end 0\n"]);
        assert_eq!(stream.output(), "no newline");
        assert_eq!(lines, ["no newline"]);
    }

    #[test]
    fn empty_lines_and_empty_output_are_exact() {
        let (stream, lines) = run(&["T start\n", "a\n\n\nb\n\n\nT end 0\n"]);
        assert_eq!(stream.output(), "a\n\n\nb\n\n");
        assert_eq!(lines, ["a", "", "", "b", ""]);
        assert_eq!(run(&["T start\n\nT end 0\n"]).0.output(), "");
    }

    #[test]
    fn a_line_split_anywhere_is_one_line() {
        let (stream, lines) = run(&["T st", "art\nhe", "llo\n", "\nT end 1", "37\n"]);
        assert_eq!(stream.status(), Some(137));
        assert_eq!(lines, ["hello"]);
    }

    #[test]
    fn what_looks_like_a_frame_is_not_one() {
        let (stream, lines) = run(&["T start\nT end\nX end 0\nT end many\n"]);
        assert_eq!(stream.status(), None);
        assert_eq!(lines, ["T end", "X end 0", "T end many"]);
    }

    #[test]
    fn a_program_cut_short_shows_what_it_had_said() {
        let (stream, _) = run(&["T start\none\ntw"]);
        assert!(stream.started());
        assert_eq!(stream.output(), "one\ntw");
    }
}
