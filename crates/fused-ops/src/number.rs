//! The element types of tensors, and the types that sums are computed in.

use std::ops::Neg;

use candle_core::{cpu::erf, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A type that formulas are computed in: f32, or f64 for f64 tensors.
pub(crate) trait Real: Element<Acc = Self> + Neg<Output = Self> {
    const ZERO: Self;
    const ONE: Self;

    fn real(value: f64) -> Self;
    fn sqrt(self) -> Self;
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn tanh(self) -> Self;
    fn erf(self) -> Self;
}

/// An element type of tensors.
pub(crate) trait Element: WithDType + Default {
    /// Sums of this type are computed in `Acc`.
    type Acc: Real;

    /// Converts to `Acc`, exactly.
    fn widen(from: &[Self], to: &mut [Self::Acc]);

    /// Converts from `Acc`. Rounds to nearest, ties to even.
    fn narrow(from: &[Self::Acc], to: &mut [Self]);

    /// Converts a whole result, without a copy if `Acc` is this type.
    fn from_acc(from: Vec<Self::Acc>) -> Vec<Self> {
        narrowed(&from)
    }
}

/// All of `numbers` in `Acc`.
pub(crate) fn widened<T: Element>(numbers: &[T]) -> Vec<T::Acc> {
    let mut wide = vec![T::Acc::ZERO; numbers.len()];
    T::widen(numbers, &mut wide);
    wide
}

/// All of `wide`, rounded.
pub(crate) fn narrowed<T: Element>(wide: &[T::Acc]) -> Vec<T> {
    let mut numbers = vec![T::default(); wide.len()];
    T::narrow(wide, &mut numbers);
    numbers
}

macro_rules! real {
    ($type:ty, $erf:path) => {
        impl Element for $type {
            type Acc = $type;

            fn widen(from: &[Self], to: &mut [Self]) {
                to.copy_from_slice(from);
            }

            fn narrow(from: &[Self], to: &mut [Self]) {
                to.copy_from_slice(from);
            }

            fn from_acc(from: Vec<Self>) -> Vec<Self> {
                from
            }
        }

        impl Real for $type {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;

            fn real(value: f64) -> Self {
                value as $type
            }

            fn sqrt(self) -> Self {
                self.sqrt()
            }

            fn exp(self) -> Self {
                self.exp()
            }

            fn ln(self) -> Self {
                self.ln()
            }

            fn tanh(self) -> Self {
                self.tanh()
            }

            fn erf(self) -> Self {
                $erf(self)
            }
        }
    };
}

real!(f32, erf::erf_f32);
real!(f64, erf::erf_f64);

macro_rules! half_float {
    ($type:ty) => {
        impl Element for $type {
            type Acc = f32;

            fn widen(from: &[Self], to: &mut [f32]) {
                from.convert_to_f32_slice(to);
            }

            fn narrow(from: &[f32], to: &mut [Self]) {
                to.convert_from_f32_slice(from);
            }
        }
    };
}

half_float!(f16);
half_float!(bf16);

/// Evaluates an expression with the type parameter `$T` set to the element type of `$dtype`, which is a checked float type.
macro_rules! for_float {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            other => unreachable!("check::float accepts no {other:?}"),
        }
    };
}

pub(crate) use for_float;
