//! What every test stands on: the cases, the reference that decides what is right, the rule for how near is near
//! enough, and the asserts.

pub mod cases;
pub mod compare;
pub mod real;
pub mod reference;
pub mod run;
pub mod tolerance;
