//! Pre-tokenisation: splitting a text into chunks. Merges never cross a chunk boundary.
//!
//! A split pattern is a regular expression whose matches are the chunks. nanochat's pattern (GPT-4's, with
//! numbers cut every `n` digits) is implemented by a hand-written scanner: one table lookup classifies each
//! character as letter, number, space, newline or other, and one character of lookahead decides which
//! alternative of the pattern applies. The scanner is many times faster than a backtracking engine and gives
//! the same chunks; the tests compare the two. Any other pattern runs on fancy-regex. The classes come from
//! regex-syntax, the source of the engine's `\p{L}`, `\p{N}` and `\s`, so both use the same Unicode version.

use std::sync::LazyLock;

use fancy_regex::Regex;
use regex_syntax::hir::{Class as HirClass, HirKind};

use crate::Error;

/// GPT-4's pattern, which cuts numbers every 3 digits: the default of the published `rustbpe`.
pub const DEFAULT_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
);

/// A compiled split pattern.
#[derive(Debug)]
pub enum Splitter {
    /// `DEFAULT_PATTERN` with numbers cut every `max_digits` digits.
    Scanner {
        max_digits: usize,
    },
    Regex(Box<Regex>),
}

impl Splitter {
    pub fn new(pattern: &str) -> Result<Self, Error> {
        if let Some(max_digits) = scanner_digits(pattern) {
            return Ok(Self::Scanner { max_digits });
        }
        let regex = Regex::new(pattern)
            .map_err(|error| Error(format!("pattern={pattern:?} is not a regular expression: {error}")))?;
        Ok(Self::Regex(Box::new(regex)))
    }

    /// Call `emit` with every non-empty chunk of `text`, in order.
    pub fn split<'t>(&self, text: &'t str, mut emit: impl FnMut(&'t [u8])) -> Result<(), Error> {
        match self {
            Self::Scanner { max_digits } => Scanner::new(text, *max_digits).for_each(emit),
            Self::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let chunk = found
                        .map_err(|error| Error(format!("the split pattern failed on a text: {error}")))?;
                    if !chunk.as_str().is_empty() {
                        emit(chunk.as_str().as_bytes());
                    }
                }
            }
        }
        Ok(())
    }
}

/// Return the `n` of a pattern that differs from `DEFAULT_PATTERN` only in `\p{N}{1,n}`, n from 1 to 9.
fn scanner_digits(pattern: &str) -> Option<usize> {
    let (head, tail) = DEFAULT_PATTERN.split_once('3')?;
    let digits = pattern.strip_prefix(head)?.strip_suffix(tail)?;
    match digits.as_bytes() {
        [digit @ b'1'..=b'9'] => Some(usize::from(digit - b'0')),
        _ => None,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Other,
    Letter,
    Number,
    Space,
    Newline, // \r and \n; every other \s is Space
    End,
}

/// The class of every character: 1.1 MB, built on first use.
static CLASSES: LazyLock<Box<[Class]>> = LazyLock::new(|| {
    let mut classes = vec![Class::Other; 0x110000];
    for (property, class) in [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Space)] {
        let hir = regex_syntax::parse(property).expect("a constant pattern");
        let HirKind::Class(HirClass::Unicode(ranges)) = hir.kind() else {
            unreachable!("{property} is a set of characters")
        };
        for range in ranges.iter() {
            classes[range.start() as usize..=range.end() as usize].fill(class);
        }
    }
    classes['\r' as usize] = Class::Newline;
    classes['\n' as usize] = Class::Newline;
    classes.into()
});

/// Iterator over the chunks of a text under `DEFAULT_PATTERN` with numbers cut every `max_digits` digits.
struct Scanner<'t> {
    text: &'t str,
    start: usize,
    max_digits: usize,
    classes: &'static [Class],
}

impl<'t> Iterator for Scanner<'t> {
    type Item = &'t [u8];

    fn next(&mut self) -> Option<&'t [u8]> {
        let start = self.start;
        if start == self.text.len() {
            return None;
        }
        self.start = self.chunk_end(start);
        Some(&self.text.as_bytes()[start..self.start])
    }
}

impl<'t> Scanner<'t> {
    fn new(text: &'t str, max_digits: usize) -> Self {
        Self { text, start: 0, max_digits, classes: &CLASSES }
    }

    /// Return the class of the character that starts at byte `at`, and the start of the next character.
    #[inline(always)]
    fn class(&self, at: usize) -> (Class, usize) {
        match self.text.as_bytes().get(at) {
            Some(&byte) if byte.is_ascii() => (self.classes[usize::from(byte)], at + 1),
            _ => self.class_beyond_ascii(at),
        }
    }

    #[inline(never)]
    fn class_beyond_ascii(&self, at: usize) -> (Class, usize) {
        match self.text[at..].chars().next() {
            Some(char) => (self.classes[char as usize], at + char.len_utf8()),
            None => (Class::End, at),
        }
    }

    /// Return the end of the run of `wanted` characters that starts at `at`.
    #[inline]
    fn run_end(&self, mut at: usize, wanted: Class) -> usize {
        loop {
            let (class, next) = self.class(at);
            if class != wanted {
                return at;
            }
            at = next;
        }
    }

    /// Return the end of the chunk at `start`: the classes of its first two characters select the alternative
    /// of the pattern, in the pattern's order.
    fn chunk_end(&self, start: usize) -> usize {
        let bytes = self.text.as_bytes();
        let (class, second) = self.class(start);
        match class {
            Class::Letter => return self.run_end(second, Class::Letter),
            Class::Number => return self.number_end(second),
            Class::Newline | Class::End => return self.whitespace_end(start),
            Class::Other | Class::Space => {}
        }
        if bytes[start] == b'\'' {
            if let Some(end) = contraction_end(bytes, second) {
                return end;
            }
        }
        let next_class = self.class(second).0;
        if next_class == Class::Letter {
            return self.run_end(second, Class::Letter);
        }
        if class == Class::Other || (bytes[start] == b' ' && next_class == Class::Other) {
            return self.run_end(self.run_end(second, Class::Other), Class::Newline);
        }
        self.whitespace_end(start)
    }

    fn number_end(&self, mut at: usize) -> usize {
        for _ in 1..self.max_digits {
            let (class, next) = self.class(at);
            if class != Class::Number {
                break;
            }
            at = next;
        }
        at
    }

    /// `\s*[\r\n]|\s+(?!\S)|\s+`: up to the last newline of the run of whitespace. Without a newline, the
    /// whole run except its last character, which belongs to the next word; or the whole run, if it has one
    /// character or the text ends with it.
    fn whitespace_end(&self, start: usize) -> usize {
        let (mut at, mut last, mut newline_end) = (start, start, None);
        loop {
            let (class, next) = self.class(at);
            match class {
                Class::Newline => newline_end = Some(next),
                Class::Space => {}
                _ => break,
            }
            (last, at) = (at, next);
        }
        match newline_end {
            Some(end) => end,
            None if last > start && at < self.text.len() => last,
            None => at,
        }
    }
}

/// Match `(?i:[sdmt]|ll|ve|re)` at `at` and return its end. Case folding maps the long s (U+017F) to s.
fn contraction_end(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = &bytes[at..];
    let lower = |index: usize| rest.get(index).map(u8::to_ascii_lowercase);
    match (lower(0)?, lower(1)) {
        (b's' | b'd' | b'm' | b't', _) => Some(at + 1),
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(at + 2),
        (0xC5, Some(0xBF)) => Some(at + 2),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
        let mut all = Vec::new();
        splitter.split(text, |chunk| all.push(std::str::from_utf8(chunk).unwrap())).unwrap();
        all
    }

    /// Return the scanner and the regex engine for `DEFAULT_PATTERN` with numbers cut every `max_digits`
    /// digits.
    fn scanner_and_regex(max_digits: usize) -> (Splitter, Splitter) {
        let pattern = DEFAULT_PATTERN.replace('3', &max_digits.to_string());
        let scanner = Splitter::new(&pattern).unwrap();
        assert!(matches!(scanner, Splitter::Scanner { max_digits: digits } if digits == max_digits));
        (scanner, Splitter::Regex(Box::new(Regex::new(&pattern).unwrap())))
    }

    /// Every Unicode character, next to characters that trigger each alternative of the pattern.
    #[test]
    fn the_scanner_splits_every_character_like_the_regex_engine() {
        let (scanner, regex) = scanner_and_regex(2);
        for c in '\0'..=char::MAX {
            let text = format!("a{c}b {c}{c}.{c}\n{c} 1{c}'{c} {c}\u{3000}{c}\u{301}");
            assert_eq!(chunks(&scanner, &text), chunks(&regex, &text), "{c:?}");
        }
    }

    /// Random strings over the pattern's corner cases: contractions with all characters that fold to their
    /// letters, whitespace of every kind, numbers that are not digits, marks, joiners, emoji, unassigned.
    #[test]
    fn the_scanner_splits_random_strings_like_the_regex_engine() {
        let alphabet: Vec<char> = concat!(
            "''''sStTdDmMlLvVeErRaZ\u{17f}\u{212a}\u{130}\u{df}    \t\r\n\r\n\u{b}\u{c}\u{85}\u{a0}\u{1680}",
            "\u{2003}\u{2028}\u{2029}\u{202f}\u{3000}\u{1c}\u{180e}\u{200b}0123\u{665}\u{bd}\u{2167}",
            "\u{1d7d8}.-_!\u{2019}\u{301}\u{903}\u{200d}\u{fe0f}\u{1f600}\u{1f469}\u{4e2d}\u{3042}\u{5d0}",
            "\u{627}\u{e01}\0\u{378}\u{10ffff}"
        )
        .chars()
        .collect();
        let mut state = 1u64;
        for max_digits in [1, 2, 3, 9] {
            let (scanner, regex) = scanner_and_regex(max_digits);
            for length in (1..40).cycle().take(10_000) {
                let mut next = || {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    alphabet[(state >> 33) as usize % alphabet.len()]
                };
                let text: String = (0..length).map(|_| next()).collect();
                assert_eq!(chunks(&scanner, &text), chunks(&regex, &text), "{text:?}");
            }
        }
    }

    #[test]
    fn other_patterns_use_the_regex_engine() {
        for pattern in [&DEFAULT_PATTERN.replace('3', "10"), &DEFAULT_PATTERN.replace('3', "0"), r"\w+|x*"] {
            assert!(matches!(Splitter::new(pattern), Ok(Splitter::Regex(_))), "{pattern}");
        }
        assert_eq!(chunks(&Splitter::new(r"\w+|x*").unwrap(), "ab, cd"), ["ab", "cd"]);
    }

    #[test]
    fn a_bad_pattern_and_a_runaway_match_are_errors() {
        assert!(Splitter::new("(").unwrap_err().0.contains("\"(\" is not a regular expression"));
        let runaway = Splitter::new(r"(?:a|b|ab)*(?!c)bc").unwrap();
        assert!(runaway.split(&"ab".repeat(1000), |_| ()).unwrap_err().0.contains("failed on a text"));
    }
}
