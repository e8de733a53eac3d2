//! The filter words of `cargo bench -- WORD ..`. A word that selects no case is an error.

#[path = "../../benches/attention/filters.rs"]
mod filters;

fn say(words: &[&str]) -> Option<String> {
    let words: Vec<String> = words.iter().map(|word| word.to_string()).collect();
    let chooses = |word: &str| ["grid", "mha/d128/causal"].iter().any(|name| name.contains(word));
    filters::check(&words, chooses, "case of benches/cuda.toml", "the parts are grid")
        .err()
        .map(|error| error.to_string())
}

#[test]
fn words_that_choose_nothing_are_refused() {
    assert_eq!(say(&[]), None);
    assert_eq!(say(&["grid", "d128"]), None);
    assert_eq!(
        say(&["d128", "casual", "d129"]).unwrap(),
        "no case of benches/cuda.toml is left for \"casual\" or \"d129\"; the parts are grid"
    );
}
