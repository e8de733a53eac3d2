//! Pairs of f64, more exact than f64. The reference of f64 inputs is computed in them.

use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

use crate::number::Number;

/// An unevaluated sum `hi + lo`, where `|lo|` is at most half a rounding step of `hi`: about 32 decimal digits.
/// If `hi` is not finite, `lo` is 0.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Double {
    hi: f64,
    lo: f64,
}

const LN_2: Double = Double { hi: std::f64::consts::LN_2, lo: 2.319_046_813_846_299_6e-17 };
const ONE: Double = Double { hi: 1.0, lo: 0.0 };

impl Double {
    /// `hi + lo` renormalised, for `|hi| >= |lo|`. If `hi` is not finite, it is the result.
    #[inline]
    fn renormalised(hi: f64, lo: f64) -> Self {
        // Selections instead of branches, so that loops over many numbers use vector instructions.
        let lo = if hi.is_finite() { lo } else { 0.0 };
        let sum = hi + lo;
        let rest = lo - (sum - hi);
        Self { hi: sum, lo: if sum.is_finite() { rest } else { 0.0 } }
    }

    /// `self * 2^exponent`, in two steps because `2^exponent` alone may overflow.
    fn times_power_of_two(self, exponent: i32) -> Self {
        let half = 2f64.powi(exponent / 2);
        let rest = 2f64.powi(exponent - exponent / 2);
        Self { hi: self.hi * half * rest, lo: self.lo * half * rest }
    }
}

impl Add for Double {
    type Output = Self;
    #[inline]
    fn add(self, other: Self) -> Self {
        let hi = self.hi + other.hi;
        let taken = hi - self.hi;
        let error = (self.hi - (hi - taken)) + (other.hi - taken);
        Self::renormalised(hi, error + (self.lo + other.lo))
    }
}

impl Neg for Double {
    type Output = Self;
    fn neg(self) -> Self {
        Self { hi: -self.hi, lo: -self.lo }
    }
}

impl Sub for Double {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self + (-other)
    }
}

impl Mul for Double {
    type Output = Self;
    #[inline]
    fn mul(self, other: Self) -> Self {
        let hi = self.hi * other.hi;
        let error = self.hi.mul_add(other.hi, -hi);
        Self::renormalised(hi, error + (self.hi * other.lo + self.lo * other.hi))
    }
}

impl Div for Double {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        let quotient = self.hi / other.hi;
        if !quotient.is_finite() || other.hi.is_infinite() {
            return Self { hi: quotient, lo: 0.0 };
        }
        let rest = self - other * Self::from_f64(quotient);
        let next = rest.hi / other.hi;
        let rest = rest - other * Self::from_f64(next);
        Self::renormalised(quotient, next) + Self::from_f64(rest.hi / other.hi)
    }
}

impl AddAssign for Double {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Number for Double {
    const ZERO: Self = Self { hi: 0.0, lo: 0.0 };
    const ONE: Self = ONE;

    fn from_f64(x: f64) -> Self {
        Self { hi: x, lo: 0.0 }
    }

    fn to_f64(self) -> f64 {
        self.hi
    }

    fn exp(self) -> Self {
        // Beyond these bounds the f64 result is infinite or zero.
        if self.hi.is_nan() || self.hi > 710.0 {
            return Self::from_f64(self.hi.exp());
        }
        if self.hi < -746.0 {
            return Self::from_f64(0.0);
        }
        // exp(x) = 2^k exp(r). Compute exp(r / 2^9) - 1 by its Taylor series, then double the argument nine times.
        const HALVINGS: i32 = 9;
        const TERMS: usize = 9; // (ln 2 / 2^10)^9 / 9! is below 1e-33
        let exponent = (self.hi / LN_2.hi).round();
        let rest = (self - LN_2 * Self::from_f64(exponent)).times_power_of_two(-HALVINGS);
        let mut term = rest;
        let mut less_one = rest;
        for n in 2..=TERMS {
            term = term * rest / Self::from_f64(n as f64);
            less_one += term;
        }
        for _ in 0..HALVINGS {
            less_one = less_one + less_one + less_one * less_one;
        }
        (less_one + ONE).times_power_of_two(exponent as i32)
    }

    fn ln(self) -> Self {
        let guess = self.hi.ln();
        if !guess.is_finite() {
            return Self::from_f64(guess);
        }
        // One Newton step squares the relative error of the f64 guess.
        let guess = Self::from_f64(guess);
        guess + (self * (-guess).exp() - ONE)
    }

    fn tanh(self) -> Self {
        // 1 - tanh(40) is below 1e-34.
        if self.hi.is_nan() || self.hi.abs() > 40.0 {
            return Self::from_f64(self.hi.tanh());
        }
        let square = (self + self).exp();
        (square - ONE) / (square + ONE)
    }
}

/// Checks identities of each function of [`Double`]. In f64 the errors would be 1e15 times as large.
#[test]
fn pairs_of_f64_carry_thirty_digits() {
    let close = |what: &str, got: Double, want: Double| {
        let error = (got - want).to_f64().abs();
        assert!(error <= 1e-29 * (1.0 + want.to_f64().abs()), "{what}: {got:?}, want {want:?}, error {error:e}");
    };
    let third = ONE / Double::from_f64(3.0);
    close("1/3 + 1/3 + 1/3", third + third + third, ONE);
    for x in [-30.25, -1.0, -1e-3, 0.0, 0.1, 0.7, 3.0, 20.5] {
        let x = Double::from_f64(x) * third;
        close("exp(x) exp(-x)", x.exp() * (-x).exp(), ONE);
        close("ln(exp(x))", x.exp().ln(), x);
        let (t, t2) = (x.tanh(), (x + x).tanh());
        close("tanh(2x) (1 + tanh(x)^2)", t2 * (ONE + t * t), t + t);
    }
    // e to 32 digits, as hi + lo.
    let e = Double { hi: std::f64::consts::E, lo: 1.445_646_891_729_250_2e-16 };
    close("e", ONE.exp(), e);
    assert_eq!(Double::from_f64(f64::NEG_INFINITY).exp().to_f64(), 0.0);
    assert_eq!(Double::from_f64(0.0).ln().to_f64(), f64::NEG_INFINITY);
    assert!((Double::from_f64(f64::INFINITY) - Double::from_f64(f64::INFINITY)).to_f64().is_nan());
}
