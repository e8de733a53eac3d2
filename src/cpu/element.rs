//! The element types of tensors, and the accumulator type that each is computed in.

use candle_core::WithDType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

/// An accumulator type, for scores, sums and products: f32, or f64 for f64 inputs.
pub(super) trait Real:
    Element<Acc = Self> + Copy + PartialOrd + std::ops::Neg<Output = Self> + std::ops::DivAssign
{
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;
    const LN_2: Self;

    fn from_f64_lossy(value: f64) -> Self;
    fn log2(self) -> Self;
    fn finite(self) -> bool;

    /// `2^self`. NaN stays NaN. In f32, results below 2^-126 are 0, and results above 2^127.999 are infinite.
    fn exp2(self) -> Self;

    /// The hyperbolic tangent.
    fn tanh(self) -> Self;

    /// `self * a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
}

/// An element type of tensors.
pub(super) trait Element: WithDType + Default {
    /// The accumulator type.
    type Acc: Real;

    /// Whether `Acc` is this type. Tiles are then read in place.
    const IN_PLACE: bool;

    /// Converts to the accumulator type, exactly.
    fn widen(from: &[Self], to: &mut [Self::Acc]);

    /// Converts from the accumulator type. Rounds to nearest, ties to even.
    fn narrow(from: &[Self::Acc], to: &mut [Self]);

    /// The same slice as accumulators; `None` unless `IN_PLACE`.
    fn as_acc(_: &[Self]) -> Option<&[Self::Acc]> {
        None
    }

    /// Rounds a whole tensor on all threads, as [`Self::narrow`] does.
    fn from_acc(from: Vec<Self::Acc>) -> Vec<Self> {
        // Elements per task: 64 KB of f32. This is large compared with the cost of handing a task to a thread.
        const CHUNK: usize = 1 << 14;
        let mut to = vec![Self::default(); from.len()];
        to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| Self::narrow(from, to));
        to
    }
}

/// Types that are their own accumulator.
macro_rules! in_place {
    ($type:ty) => {
        impl Element for $type {
            type Acc = $type;
            const IN_PLACE: bool = true;

            fn widen(from: &[Self], to: &mut [Self]) {
                to.copy_from_slice(from);
            }

            fn narrow(from: &[Self], to: &mut [Self]) {
                to.copy_from_slice(from);
            }

            fn as_acc(slice: &[Self]) -> Option<&[Self]> {
                Some(slice)
            }

            fn from_acc(from: Vec<Self>) -> Vec<Self> {
                from
            }
        }
    };
}

in_place!(f32);
in_place!(f64);

impl Element for f16 {
    type Acc = f32;
    const IN_PLACE: bool = false;

    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

impl Element for bf16 {
    type Acc = f32;
    const IN_PLACE: bool = false;

    // A bf16 is the upper half of an f32. The compiler vectorises this shift, with the instructions of the caller.
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f64::NEG_INFINITY;
    const LN_2: Self = std::f64::consts::LN_2;

    fn from_f64_lossy(value: f64) -> Self {
        value
    }

    fn log2(self) -> Self {
        f64::log2(self)
    }

    fn finite(self) -> bool {
        self.is_finite()
    }

    fn exp2(self) -> Self {
        f64::exp2(self)
    }

    fn tanh(self) -> Self {
        f64::tanh(self)
    }

    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f64::mul_add(self, a, b)
    }
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f32::NEG_INFINITY;
    const LN_2: Self = std::f32::consts::LN_2;

    fn from_f64_lossy(value: f64) -> Self {
        value as f32
    }

    fn log2(self) -> Self {
        f32::log2(self)
    }

    #[inline(always)]
    fn finite(self) -> bool {
        self.is_finite()
    }

    /// Splits `x = n + f` with an integer `n` and `f` in [-1/2, 1/2]. `2^n` is built from its exponent bits.
    ///
    /// `2^f` is a polynomial of degree 6, minimax by a Remez iteration. Its relative error is 1.9e-9; one rounding to f32
    /// is 6e-8. The code has no branch and no table, so the compiler can vectorise a loop over it.
    #[inline(always)]
    #[allow(clippy::excessive_precision)] // the digits of the Remez run
    fn exp2(self) -> Self {
        // x + 1.5 * 2^23 is rounded to an integer: n is in its low bits.
        const ROUND: f32 = 12_582_912.0;
        const SMALLEST: f32 = -126.0;
        const LARGEST: f32 = 127.999;
        // Comparisons with NaN are false. So NaN passes both, and the polynomial returns NaN.
        let x = if self < SMALLEST { SMALLEST } else { self };
        let x = if x > LARGEST { LARGEST } else { x };
        let shifted = x + ROUND;
        let f = x - (shifted - ROUND);
        let p = 0.000_153_458_121_613_116_3f32;
        let p = p.mul_add(f, 0.001_339_993_117_723_973_8);
        let p = p.mul_add(f, 0.009_618_488_956_331_181_6);
        let p = p.mul_add(f, 0.055_503_287_771_053_248);
        let p = p.mul_add(f, 0.240_226_468_906_455_21);
        let p = p.mul_add(f, 0.693_147_205_737_195_75);
        let p = p.mul_add(f, 1.000_000_000_554_164_8);
        // 127 is the bias of the exponent. 2^n overflows for n = 128, the largest n. So 2^n is applied as two factors.
        let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        let half = n >> 1;
        let factor = |n: i32| f32::from_bits(((n.wrapping_add(127)) as u32) << 23);
        let power = p * factor(half) * factor(n.wrapping_sub(half));
        if self < SMALLEST {
            0.0
        } else if self > LARGEST {
            f32::INFINITY
        } else {
            power
        }
    }

    /// An odd polynomial for `|x| < 0.625` (relative error 4.4e-9), else `1 - 2 / (exp(2|x|) + 1)` with the sign of `x`.
    #[inline(always)]
    #[allow(clippy::excessive_precision)] // the digits of the Remez run
    fn tanh(self) -> Self {
        let x = f32::abs(self);
        let z = self * self;
        let p = -0.005_704_987_007_491_008f32;
        let p = p.mul_add(z, 0.020_639_087_258_656_812);
        let p = p.mul_add(z, -0.053_739_715_090_629_539);
        let p = p.mul_add(z, 0.133_314_421_982_420_2);
        let p = p.mul_add(z, -0.333_332_819_420_157_05);
        let small = (self * z).mul_add(p, self);
        let exp = Real::exp2(x * (2.0 * std::f32::consts::LOG2_E));
        let large = (1.0 - 2.0 / (exp + 1.0)).copysign(self);
        if x < 0.625 {
            small
        } else {
            large
        }
    }

    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f32::mul_add(self, a, b)
    }
}
