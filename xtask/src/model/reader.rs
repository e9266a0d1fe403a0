//! Reads a line of a scenario word by word: names, numbers, places and the like, each with what is wrong if it is none.
//!
//! Which words an operation has is not known here.

use super::calls::Call;
use super::language::{Place, Range, SlotNumber};
use anyhow::{Context, Result, anyhow, bail, ensure};
use kvmprep_model::personality::Version;

/// What is left of a line.
pub struct Words<'a> {
    words: Vec<&'a str>,
    next: usize,
}

impl<'a> Words<'a> {
    pub fn of(text: &'a str) -> Self {
        Words { words: text.split_whitespace().collect(), next: 0 }
    }

    /// An error if something is left.
    pub fn end(&self) -> Result<()> {
        match self.words.get(self.next) {
            Some(word) => bail!("{word:?} is one word too many"),
            None => Ok(()),
        }
    }

    pub fn is_over(&self) -> bool {
        self.next == self.words.len()
    }

    pub fn word(&mut self, what: &str) -> Result<&'a str> {
        let word = self.words.get(self.next).with_context(|| format!("{what} is missing"))?;
        self.next += 1;
        Ok(word)
    }

    /// Takes the word if it comes next.
    pub fn has(&mut self, word: &str) -> bool {
        let is_next = self.words.get(self.next) == Some(&word);
        self.next += usize::from(is_next);
        is_next
    }

    pub fn rest(&mut self, what: &str) -> Result<String> {
        let rest = self.words[self.next..].join(" ");
        self.next = self.words.len();
        ensure!(!rest.is_empty(), "{what} is missing");
        Ok(rest)
    }

    pub fn one_of<T: Copy>(&mut self, what: &str, known: &[(&str, T)]) -> Result<T> {
        let word = self.word(what)?;
        match known.iter().find(|(name, _)| *name == word) {
            Some((_, value)) => Ok(*value),
            None => {
                let near = nearest(word, known.iter().map(|(name, _)| *name));
                bail!("{word:?} is not {what}{near}")
            }
        }
    }

    /// Every flag that follows, in any order.
    pub fn flags(&mut self, known: &[(&str, u64)]) -> u64 {
        let mut flags = 0;
        while let Some((_, flag)) = known.iter().find(|(name, _)| self.has(name)) {
            flags |= flag;
        }
        flags
    }

    pub fn switch(&mut self) -> Result<bool> {
        self.one_of("on or off", &[("on", true), ("off", false)])
    }

    pub fn name(&mut self) -> Result<String> {
        let name = self.word("a name")?;
        let is_name = name.starts_with(|first: char| first.is_ascii_alphabetic()) && !name.contains('+');
        ensure!(is_name, "{name:?} is no name: it is to begin with a letter and to have no +");
        Ok(name.to_string())
    }

    pub fn size(&mut self, what: &str) -> Result<u64> {
        let word = self.word(what)?;
        sum(word).with_context(|| format!("{word:?} is not {what} (0x1000, 4K, 1G+8K)"))
    }

    pub fn small_number(&mut self, what: &str) -> Result<u32> {
        let word = self.word(what)?;
        word.parse().map_err(|_| anyhow!("{word:?} is not {what}"))
    }

    pub fn nth(&mut self) -> Result<u64> {
        let nth = self.small_number("which of the calls, counted from 1")?;
        ensure!(nth >= 1, "calls are counted from 1");
        Ok(nth.into())
    }

    pub fn range(&mut self) -> Result<Range> {
        Ok(Range { gpa: self.size("an address")?, size: self.size("a size")? })
    }

    pub fn place(&mut self, what: &str) -> Result<Place> {
        let word = self.word(what)?;
        let (name, offset) = word.split_once('+').map_or((word, Some(0)), |(name, rest)| (name, sum(rest)));
        let offset = offset.with_context(|| format!("what is behind the + of {word:?} is no offset"))?;
        Ok(Place { name: name.to_string(), offset })
    }

    pub fn slot(&mut self) -> Result<SlotNumber> {
        let number = self.small_number("a slot's number")?;
        ensure!(number < 1 << 16, "{number} is no slot's number: they end with 65535");
        Ok(number)
    }

    /// The same number, in the address space of SMM if that follows.
    pub fn in_smm(&mut self, slot: SlotNumber) -> SlotNumber {
        if self.has("smm") { slot | 1 << 16 } else { slot }
    }

    pub fn vcpu(&mut self) -> Result<u32> {
        if self.has("vcpu") { self.small_number("a vCPU's number") } else { Ok(0) }
    }

    pub fn version(&mut self) -> Result<Version> {
        let word = self.word("a version")?;
        let numbers = word.split_once('.').and_then(|(a, b)| Some(Version(a.parse().ok()?, b.parse().ok()?)));
        let version = numbers.with_context(|| format!("{word:?} is no version (6.12)"))?;
        ensure!(Version(6, 1) <= version, "the model knows no kernel before 6.1");
        Ok(version)
    }

    pub fn call(&mut self) -> Result<Call> {
        let word = self.word("a call")?;
        let known = || Call::ALL.iter().map(|call| call.name());
        let call = Call::ALL.iter().find(|call| call.name() == word).copied();
        call.with_context(|| {
            let all: Vec<_> = known().collect();
            format!("there is no call {word:?}{}; there are {}", nearest(word, known()), all.join(", "))
        })
    }
}

/// `1G+8K`.
fn sum(text: &str) -> Option<u64> {
    text.split('+').try_fold(0u64, |sum, part| sum.checked_add(number(part)?))
}

fn number(text: &str) -> Option<u64> {
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).ok();
    }
    let shift = match text.chars().last()? {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        _ => 0,
    };
    let digits = if shift == 0 { text } else { &text[..text.len() - 1] };
    let number: u64 = digits.parse().ok()?;
    number.checked_mul(1 << shift)
}

/// A hint at the known word that someone may have meant.
pub fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> String {
    let alike = known.map(|known| (strsim::jaro(word, known), known));
    let near = alike.filter(|(likeness, _)| *likeness > 0.75).max_by(|(a, _), (b, _)| a.total_cmp(b));
    near.map_or(String::new(), |(_, known)| format!(", but {known:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_sums_with_units() {
        assert_eq!(sum("1G+8K"), Some((1 << 30) + 8192));
        assert_eq!(sum("0x1000+4"), Some(4100));
        for wrong in ["", "K", "1k", "0xg", "1G+", "16777216T", "18446744073709551615+1", "-1"] {
            assert_eq!(sum(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_word_that_is_nearly_known_is_recognized() {
        let known = ["slot", "stop", "pre-fault", "by-access-zaps-shared"];
        let hint = |word| nearest(word, known.into_iter());
        assert_eq!(hint("slto"), ", but \"slot\"");
        assert_eq!(hint("prefault"), ", but \"pre-fault\"");
        assert_eq!(hint("pre-fualt"), ", but \"pre-fault\"");
        assert_eq!(hint("zebra"), "");
    }
}
