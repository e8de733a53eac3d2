//! GPT-2's tokenizer takes runs of white space up to a limit, because its pattern fails on longer ones.

use crate::tokenizer::{Tokenizer, LONGEST_BLANK};

#[test]
fn long_runs_of_white_space_are_encoded_or_refused() {
    let encode = |text: String| Tokenizer::Gpt2.encode(text.as_bytes(), "book.txt");
    for blank in [" ", "\n", "\u{a0}"] {
        let longest = blank.repeat(LONGEST_BLANK / blank.len());
        for text in [format!("{longest}word"), format!("a{longest}b{longest}")] {
            assert!(encode(text).is_ok(), "{blank:?}");
        }
        assert_eq!(
            encode(format!("a{longest}{blank}b")).unwrap_err().to_string(),
            "book.txt has more than 500000 bytes of white space in a row, which --tokenizer gpt2 cannot encode; remove them, \
             or use --tokenizer bytes"
        );
    }
}
