//! The environment variables of this crate. Each is read once per process. docs/environment.md describes them.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::plan::Plan;
use crate::problem::Problem;

/// Prints `problem` and `plan` if `CANDLE_FA2_LOG` is `plan` and they were not printed before.
pub(crate) fn log(problem: &Problem, plan: &Plan) {
    static WANTED: OnceLock<bool> = OnceLock::new();
    static SEEN: OnceLock<Mutex<HashSet<u64>>> = OnceLock::new();
    let wanted = || match std::env::var("CANDLE_FA2_LOG").as_deref() {
        Ok("plan") => true,
        Ok("") | Err(_) => false,
        Ok(other) => {
            eprintln!("candle-fa2: CANDLE_FA2_LOG={other} is unknown; plan prints each distinct call once");
            false
        }
    };
    if !WANTED.get_or_init(wanted) {
        return;
    }
    let text = format!("candle-fa2: {problem:?} -> {plan:?}");
    // Decoding has a new problem for every token, so keep only a hash of each text.
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let mut seen = SEEN.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if seen.insert(hasher.finish()) {
        eprintln!("{text}");
    }
}

/// The limit of shared memory per thread block from `CANDLE_FA2_SHARED_LIMIT`, in bytes.
///
/// # Errors
/// [`Error::Environment`](crate::Error::Environment) if the variable is not a number.
#[cfg(feature = "cuda")]
pub(crate) fn shared_limit() -> crate::error::Result<Option<usize>> {
    const NAME: &str = "CANDLE_FA2_SHARED_LIMIT";
    static VALUE: OnceLock<Option<String>> = OnceLock::new();
    let value = VALUE.get_or_init(|| std::env::var(NAME).ok().filter(|value| !value.is_empty()));
    let parse = |value: &String| {
        value.parse().map_err(|_| crate::error::Error::Environment {
            name: NAME,
            value: value.clone(),
            expected: "a number of bytes",
        })
    };
    value.as_ref().map(parse).transpose()
}
