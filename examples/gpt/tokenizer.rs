//! Converts text to tokens and back: raw bytes, or GPT-2's byte-pair encoding.

use anyhow::{anyhow, bail, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tiktoken_rs::r50k_base_singleton;

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ValueEnum)]
pub enum Tokenizer {
    /// One token per byte: 256 tokens, any file
    Bytes,
    /// GPT-2's byte-pair encoding: 50,257 tokens, UTF-8 text
    Gpt2,
}

/// Longest run of white space that GPT-2's pattern takes. The regex engine backtracks from the end of a run, and panics after
/// a million characters.
pub const LONGEST_BLANK: usize = 500_000;

impl Tokenizer {
    pub fn vocab_size(self) -> usize {
        match self {
            Tokenizer::Bytes => 256,
            Tokenizer::Gpt2 => 50_257,
        }
    }

    /// The vocabulary size of a model, padded to a multiple of 64. Rows in bf16 are then multiples of 128 bytes. With other
    /// sizes a GPU's tensor cores are slow or idle. A checkpoint stores its size.
    pub fn padded_vocab_size(self) -> usize {
        self.vocab_size().next_multiple_of(64)
    }

    /// Tokens of `text`. An error calls the text `name`.
    pub fn encode(self, text: &[u8], name: &str) -> Result<Vec<u32>> {
        match self {
            Tokenizer::Bytes => Ok(text.iter().map(|&byte| u32::from(byte)).collect()),
            Tokenizer::Gpt2 => {
                let text = std::str::from_utf8(text).map_err(|error| {
                    anyhow!(
                        "{name} is not UTF-8 text (byte {} is the first that is not), which --tokenizer gpt2 needs; \
                         use --tokenizer bytes",
                        error.valid_up_to()
                    )
                })?;
                if text.split(|c: char| !c.is_whitespace()).any(|run| run.len() > LONGEST_BLANK) {
                    bail!(
                        "{name} has more than {LONGEST_BLANK} bytes of white space in a row, which --tokenizer gpt2 \
                         cannot encode; remove them, or use --tokenizer bytes"
                    );
                }
                // r50k_base is GPT-2's vocabulary. The crate tiktoken-rs contains it. `encode_ordinary` has no control tokens:
                // "<|endoftext|>" in a text is these 13 characters.
                Ok(r50k_base_singleton().encode_ordinary(text))
            }
        }
    }

    /// The bytes of `tokens`. They may be invalid UTF-8, because a token can be a part of a character.
    pub fn decode(self, tokens: &[u32]) -> Result<Vec<u8>> {
        match self {
            Tokenizer::Bytes => Ok(tokens.iter().map(|&token| token as u8).collect()),
            Tokenizer::Gpt2 => r50k_base_singleton()
                .decode_bytes(tokens)
                .map_err(|error| anyhow!("the model's tokens are not GPT-2's: {error}")),
        }
    }
}
