//! The words of the command line that choose among cases and parts.

use anyhow::{bail, Result};

/// Checks that each of `words` chooses a case, because a misspelt word would silently leave cases out. `chooses` tells
/// whether a word does. For the error, `cases` names the list of cases, and `known` lists the words.
pub fn check(words: &[String], chooses: impl Fn(&str) -> bool, cases: &str, known: &str) -> Result<()> {
    let idle: Vec<&String> = words.iter().filter(|word| !chooses(word)).collect();
    if idle.is_empty() {
        return Ok(());
    }
    let quoted: Vec<String> = idle.iter().map(|word| format!("{word:?}")).collect();
    bail!("no {cases} is left for {}; {known}", quoted.join(" or "))
}
