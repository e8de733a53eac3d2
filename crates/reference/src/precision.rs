//! The types that tensors are stored in.

use std::fmt;
use std::str::FromStr;

use anyhow::{bail, Error, Result};
use half::f16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    F64,
    F32,
    /// An f32 with 11 bits: what one product of TF32 reads. Tensors store it as f32.
    Tf32,
    F16,
    Bf16,
}

impl Precision {
    /// The type of lse and of all sums, for tensors of this type.
    pub fn accumulator(self) -> Self {
        match self {
            Self::F64 => Self::F64,
            Self::F32 | Self::Tf32 | Self::F16 | Self::Bf16 => Self::F32,
        }
    }

    /// `x` as a tensor of this type stores it.
    pub fn round(self, x: f64) -> f64 {
        match self {
            Self::F64 => x,
            Self::F32 => x as f32 as f64,
            Self::Tf32 => tf32(x as f32) as f64,
            Self::F16 => f16::from_f64(x).to_f64(),
            Self::Bf16 => half::bf16::from_f64(x).to_f64(),
        }
    }

    /// Numbers of this size and larger ones round to infinity: the largest number of the type, and half a step.
    pub fn overflow(self) -> f64 {
        let largest_exponent = match self {
            Self::F64 => 1023,
            Self::F32 | Self::Tf32 | Self::Bf16 => 127,
            Self::F16 => 15,
        };
        power_of_two(largest_exponent) * (2.0 - self.half_step())
    }

    /// The smallest normal number.
    pub fn smallest_normal(self) -> f64 {
        power_of_two(self.smallest_exponent())
    }

    /// The distance between neighbouring numbers at `|x|`.
    pub fn step(self, x: f64) -> f64 {
        let digits_after_the_leading_one = match self {
            Self::F64 => 52,
            Self::F32 => 23,
            Self::F16 | Self::Tf32 => 10,
            Self::Bf16 => 7,
        };
        // The exponent field of an f64. It is 0 for zero and for subnormal numbers.
        let exponent = ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023;
        // Two factors, because the result of a single one could underflow.
        power_of_two(exponent.max(self.smallest_exponent())) * power_of_two(-digits_after_the_leading_one)
    }

    /// The largest relative error of one rounding of a normal number: half a step at 1.
    pub fn half_step(self) -> f64 {
        self.step(1.0) / 2.0
    }

    fn smallest_exponent(self) -> i32 {
        match self {
            Self::F64 => -1022,
            Self::F32 | Self::Tf32 | Self::Bf16 => -126,
            Self::F16 => -14,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::Tf32 => "tf32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// `2^exponent`, for the exponents of normal f64. `powi` is a loop.
fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

/// `x` rounded to the nearest bf16. The crate half gives the same bits, but it branches on each, and no processor predicts that.
pub fn bf16(x: f32) -> f32 {
    const LAST_BITS: u32 = 0xffff;
    let bits = x.to_bits();
    // A tie goes to the even one of its neighbours.
    let odd = (bits >> 16) & 1;
    match x.is_nan() {
        true => x,
        false => f32::from_bits((bits + LAST_BITS / 2 + odd) & !LAST_BITS),
    }
}

/// `x` rounded to the nearest TF32.
pub fn tf32(x: f32) -> f32 {
    const LAST_BITS: u32 = 0x1fff;
    match x.is_finite() {
        true => f32::from_bits((x.to_bits() + LAST_BITS.div_ceil(2)) & !LAST_BITS),
        false => x,
    }
}

/// Parses Candle's name of the type. TF32 is no type of Candle.
impl FromStr for Precision {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "f64" => Self::F64,
            "f32" => Self::F32,
            "f16" => Self::F16,
            "bf16" => Self::Bf16,
            _ => bail!("the reference supports f64, f32, f16 and bf16, got {name:?}"),
        })
    }
}

#[test]
fn steps_are_those_of_each_type() {
    for (precision, epsilon) in [
        (Precision::F64, f64::EPSILON),
        (Precision::F32, f32::EPSILON as f64),
        (Precision::Tf32, 9.765625e-4),
        (Precision::F16, 9.765625e-4),
        (Precision::Bf16, 7.8125e-3),
    ] {
        assert_eq!(precision.step(1.0), epsilon);
        assert_eq!(precision.step(1.99), epsilon);
        assert_eq!(precision.step(-2.0), 2.0 * epsilon);
        assert_eq!(precision.step(0.75), epsilon / 2.0);
    }
    assert_eq!(
        [1.0 + 9e-4, -1.0 - 4e-4, f64::INFINITY].map(|x| Precision::Tf32.round(x)),
        [1.0009765625, -1.0, f64::INFINITY]
    );
    assert_eq!(Precision::F16.step(0.0), 2f64.powi(-24));
    assert_eq!(Precision::F16.step(1e-9), 2f64.powi(-24));
    assert_eq!(Precision::F64.step(f64::MIN_POSITIVE), f64::from_bits(1));
    assert_eq!(Precision::F32.step(1e-300), f32::from_bits(1) as f64);
    assert_eq!(Precision::F64.smallest_normal(), f64::MIN_POSITIVE);
    assert_eq!(Precision::F32.smallest_normal(), f32::MIN_POSITIVE as f64);
}

#[test]
fn bf16_is_that_of_half() {
    // Every sign, exponent and first bits, with the last bits that decide: below, at and above a tie, and none or all.
    for first in 0..=u16::MAX {
        for last in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let x = f32::from_bits((first as u32) << 16 | last);
            let want = half::bf16::from_f32(x).to_f32();
            assert!(bf16(x).to_bits() == want.to_bits() || x.is_nan() && bf16(x).is_nan(), "{x:e}");
        }
    }
}

#[test]
fn only_numbers_from_overflow_on_round_to_infinity() {
    for precision in [Precision::F64, Precision::F32, Precision::Tf32, Precision::F16, Precision::Bf16] {
        let overflow = precision.overflow();
        assert_eq!(precision.round(overflow), f64::INFINITY, "{precision}");
        assert!(precision.round((overflow * (1.0 - 1e-6)).min(f64::MAX)).is_finite(), "{precision}");
    }
}
