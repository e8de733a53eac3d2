//! The words of the command line that choose among cases and parts.

use anyhow::{bail, Result};

/// Checks that each of `words` has something to run, by `chooses`: a word that is misspelt would leave out cases in silence.
/// `cases` names what they choose from, and `known` says what there is.
pub fn check(words: &[String], chooses: impl Fn(&str) -> bool, cases: &str, known: &str) -> Result<()> {
    let idle: Vec<&String> = words.iter().filter(|word| !chooses(word)).collect();
    if idle.is_empty() {
        return Ok(());
    }
    let quoted: Vec<String> = idle.iter().map(|word| format!("{word:?}")).collect();
    bail!("no {cases} is left for {}; {known}", quoted.join(" or "))
}
