//! GPT-2's tokenizer encodes a text in pieces. For any text, its tokens equal those of the encoder on the whole text.

use crate::rng::Rng;
use crate::tokenizer::{Tokenizer, TokenizerKind};

/// Tokens of the encoder on the whole text. The encoder fails on a run of a million white-space characters.
fn whole(text: &str) -> Vec<u32> {
    tiktoken_rs::r50k_base_singleton().encode_ordinary(text)
}

fn encode(text: &str) -> Vec<u32> {
    Tokenizer::new(TokenizerKind::Gpt2).encode(text.as_bytes(), "text").unwrap()
}

/// Every kind of text that GPT-2's pattern distinguishes. White space of every kind, and characters that only look like white
/// space (a zero-width space, a Mongolian separator, a word joiner). Contractions, and texts that are almost contractions.
/// Letters, digits and marks of several scripts.
const ALPHABET: [&str; 68] = [
    " ",
    " ",
    " ",
    " ",
    "  ",
    "\t",
    "\n",
    "\n",
    "\r\n",
    "\r",
    "\u{b}",
    "\u{c}",
    "\u{85}",
    "\u{a0}",
    "\u{1680}",
    "\u{2000}",
    "\u{2003}",
    "\u{200a}",
    "\u{2028}",
    "\u{2029}",
    "\u{202f}",
    "\u{205f}",
    "\u{3000}",
    "\u{180e}",
    "\u{200b}",
    "\u{2060}",
    "\u{feff}",
    "\u{1c}",
    "\u{1f}",
    "\0",
    "'",
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'S",
    "'x",
    "''",
    "s",
    "a",
    "the",
    "Z",
    "é",
    "e\u{301}",
    "\u{301}",
    "ß",
    "中",
    "あ",
    "ѣ",
    "א",
    "1",
    "42",
    "٣",
    "Ⅷ",
    "²",
    "½",
    "!",
    "...",
    "_",
    "-",
    "🙂",
    "👩‍👩‍👧",
    "<|endoftext|>",
    "\u{10ffff}",
    "ª",
];

#[test]
fn tokens_are_those_of_the_whole_text() {
    let mut rng = Rng::new(1);
    for _ in 0..30_000 {
        // Only a few letters per text, so that runs are frequent.
        let letters: Vec<&str> = (0..1 + rng.below(8)).map(|_| ALPHABET[rng.below(ALPHABET.len())]).collect();
        let text: String = (0..rng.below(40)).map(|_| letters[rng.below(letters.len())]).collect();
        assert_eq!(encode(&text), whole(&text), "{text:?}");
    }
}

#[test]
fn every_character_of_white_space_ends_a_word() {
    for blank in (0..=0x10_ffff).filter_map(char::from_u32).filter(|character| character.is_whitespace()) {
        for text in [format!("a{blank}b"), format!("a{blank}{blank}b"), format!("a {blank}b{blank} c{blank}{blank}")] {
            assert_eq!(encode(&text), whole(&text), "{text:?}");
        }
    }
}

/// The encoder on a whole text fails at a million.
#[test]
fn runs_of_more_than_a_million_characters() {
    const RUN: usize = 1_100_000;
    for blank in [" ", "\n", "\t", "\u{a0}"] {
        let run = blank.repeat(RUN);
        // The run without its last character: if that is a space, it belongs to the word.
        let all_but_one = whole(&run[blank.len()..]);
        let word = whole(&format!("{blank}word"));
        assert_eq!(encode(&format!("{run}word")), [&all_but_one[..], &word].concat(), "{blank:?} at the start");
        assert_eq!(encode(&format!("a{run}word")), [&whole("a")[..], &all_but_one, &word].concat(), "{blank:?}");
        assert_eq!(encode(&run), whole(&run), "{blank:?} alone");
        assert_eq!(encode(&format!("a{run}")), whole(&format!("a{run}")), "{blank:?} at the end");
    }
    for unit in ["a", "é", "7", "!", "'", "🙂", "'s", "a b", "a  b", " \n"] {
        let text = unit.repeat(RUN / unit.len());
        assert_eq!(encode(&text), whole(&text), "{unit:?}");
    }
}
