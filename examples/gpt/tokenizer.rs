//! Text to tokens and back: raw bytes, or GPT-2's byte-pair encoding.

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
            // r50k_base is the vocabulary that GPT-2 was trained with; tiktoken-rs carries it.
            TokenizerKind::Gpt2 => Tokenizer::Gpt2(tiktoken_rs::r50k_base_singleton()),
        }
    }

    pub fn vocab_size(&self) -> usize {
        match self {
            Tokenizer::Bytes => 256,
            Tokenizer::Gpt2(_) => 50_257,
        }
    }

    /// The vocabulary of a model: padded to rows of whole 128 bytes in bf16, without which a GPU's tensor cores are slow or
    /// idle. A checkpoint says which it has.
    pub fn padded_vocab_size(&self) -> usize {
        self.vocab_size().next_multiple_of(64)
    }

    /// Tokens of `text`; `name` is what an error calls it.
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
                // Ordinary: "<|endoftext|>" in a text is these 13 characters, not a control token.
                Ok(pieces(text).flat_map(|piece| bpe.encode_ordinary(piece)).collect())
            }
        }
    }

    /// The bytes that `tokens` stand for. A token can be a part of a character, so they need not be UTF-8.
    pub fn decode(&self, tokens: &[u32]) -> Result<Vec<u8>> {
        match self {
            Tokenizer::Bytes => Ok(tokens.iter().map(|&token| token as u8).collect()),
            Tokenizer::Gpt2(bpe) => {
                bpe.decode_bytes(tokens).map_err(|error| anyhow!("the model's tokens are not GPT-2's: {error}"))
            }
        }
    }
}

/// Splits `text` into pieces. The tokens of the pieces, one piece after the other, are the tokens of the whole text.
///
/// A piece ends before the last character of a run of two or more white-space characters, or at the end of the text.
/// GPT-2's pattern splits the text there too. It joins the last character of such a run to the next word if it is a space.
/// Otherwise that character is a match of its own. No match depends on text beyond the split: white space ends a word as the
/// end of a text does, and a run at the end of a text stays whole.
///
/// Without the pieces, long runs fail. The pattern matches them with `\s+(?!\S)`, which steps back from the end of the run.
/// For that the regex engine stores a position for each character, and it fails after a million. In a piece only the
/// run at the end is long, and the pattern matches that one without stepping back.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let piece = &rest[..end_of_piece(rest)?];
        rest = &rest[piece.len()..];
        Some(piece)
    })
}

/// Where the first piece of `text` ends. `None` if `text` is empty.
fn end_of_piece(text: &str) -> Option<usize> {
    let mut run = 0; // number of white-space characters before this character
    let mut last = 0; // where the previous character starts
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
