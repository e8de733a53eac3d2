//! Converts text to tokens and back: raw bytes, or GPT-2's byte-pair encoding.

use anyhow::{anyhow, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tiktoken_rs::CoreBPE;

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ValueEnum)]
pub enum TokenizerKind {
    /// One token per byte: 256 tokens, any file
    Bytes,
    /// GPT-2's byte-pair encoding: 50,257 tokens, UTF-8 text
    Gpt2,
}

pub enum Tokenizer {
    Bytes,
    Gpt2(&'static CoreBPE),
}

impl Tokenizer {
    pub fn new(kind: TokenizerKind) -> Self {
        match kind {
            TokenizerKind::Bytes => Tokenizer::Bytes,
            // r50k_base is GPT-2's vocabulary. The crate tiktoken-rs contains it.
            TokenizerKind::Gpt2 => Tokenizer::Gpt2(tiktoken_rs::r50k_base_singleton()),
        }
    }

    pub fn vocab_size(&self) -> usize {
        match self {
            Tokenizer::Bytes => 256,
            Tokenizer::Gpt2(_) => 50_257,
        }
    }

    /// The vocabulary size of a model, padded to a multiple of 64. Rows in bf16 are then multiples of 128 bytes. With other
    /// sizes a GPU's tensor cores are slow or idle. A checkpoint stores its size.
    pub fn padded_vocab_size(&self) -> usize {
        self.vocab_size().next_multiple_of(64)
    }

    /// Tokens of `text`. An error calls the text `name`.
    pub fn encode(&self, text: &[u8], name: &str) -> Result<Vec<u32>> {
        match self {
            Tokenizer::Bytes => Ok(text.iter().map(|&byte| u32::from(byte)).collect()),
            Tokenizer::Gpt2(bpe) => {
                let text = std::str::from_utf8(text).map_err(|error| {
                    anyhow!(
                        "{name} is not UTF-8 text (byte {} is the first that is not), which --tokenizer gpt2 needs; \
                         use --tokenizer bytes",
                        error.valid_up_to()
                    )
                })?;
                // `encode_ordinary` has no control tokens: "<|endoftext|>" in a text is these 13 characters.
                Ok(pieces(text).flat_map(|piece| bpe.encode_ordinary(piece)).collect())
            }
        }
    }

    /// The bytes of `tokens`. They may be invalid UTF-8, because a token can be a part of a character.
    pub fn decode(&self, tokens: &[u32]) -> Result<Vec<u8>> {
        match self {
            Tokenizer::Bytes => Ok(tokens.iter().map(|&token| token as u8).collect()),
            Tokenizer::Gpt2(bpe) => {
                bpe.decode_bytes(tokens).map_err(|error| anyhow!("the model's tokens are not GPT-2's: {error}"))
            }
        }
    }
}

/// Splits `text` into pieces. The tokens of the pieces, concatenated, are the tokens of the whole text.
///
/// A piece ends before the last character of a run of two or more white-space characters, or at the end of the text.
/// GPT-2's pattern splits the text there too. If the last character of the run is a space, the pattern joins it to the next
/// word; otherwise the character is its own match. No match depends on text after the split. White space ends a word, and
/// so does the end of a text. A run at the end of a text is one match.
///
/// Without pieces, a long run fails. The pattern matches a run with `\s+(?!\S)`, which backtracks from the end of the run. To
/// backtrack, the regex engine stores a position for each character, and it fails after a million. In a piece, a long run
/// can only be at the end, and there the pattern does not backtrack.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let piece = &rest[..end_of_piece(rest)?];
        rest = &rest[piece.len()..];
        Some(piece)
    })
}

/// The end of the first piece of `text`. `None` if `text` is empty.
fn end_of_piece(text: &str) -> Option<usize> {
    let mut run = 0; // number of white-space characters before this character
    let mut last = 0; // start of the previous character
    for (start, character) in text.char_indices() {
        match character.is_whitespace() {
            true => run += 1,
            false if run > 1 => return Some(last),
            false => run = 0,
        }
        last = start;
    }
    Some(text.len()).filter(|&end| end > 0)
}
