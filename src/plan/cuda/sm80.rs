//! Kernels of mma.sync, which run on every GPU from Ampere on.

use super::spec::Spec;

pub(super) struct Sm80;

/// They take what all CUDA kernels take, and suit every call.
impl Spec for Sm80 {}
