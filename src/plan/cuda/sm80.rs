//! Kernels that use mma.sync. They run on every GPU from Ampere on.

use super::spec::Spec;

pub(super) struct Sm80;

/// sm80 kernels have only the limits of all CUDA kernels, and suit every call.
impl Spec for Sm80 {}
