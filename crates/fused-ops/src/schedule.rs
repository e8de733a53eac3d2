//! Learning-rate schedules.

use std::f64::consts::PI;

/// A learning rate for each step: a linear warm-up to the peak, then a constant, a line, or half a cosine.
///
/// Steps count from 1. With `w` steps of warm-up, `n` steps in all and `progress = min(1, (step - w) / (n - w))`:
///
/// ```text
/// step <= w       lr = peak step / w
/// constant        lr = peak
/// linear          lr = last + (peak - last) (1 - progress)
/// cosine          lr = last + (peak - last) (1 + cos(pi progress)) / 2
/// ```
///
/// ```
/// # use candle_fused_ops::Schedule;
/// let schedule = Schedule::cosine(1e-3, 1e-4, 100).warmup(10);
/// assert_eq!(schedule.at(5), 0.5e-3);
/// assert_eq!(schedule.at(10), 1e-3);
/// assert_eq!(schedule.at(100), 1e-4);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    peak: f64,
    warmup: usize,
    decay: Decay,
}

#[derive(Clone, Copy, Debug)]
enum Decay {
    Constant,
    Linear { last: f64, steps: usize },
    Cosine { last: f64, steps: usize },
}

impl Schedule {
    /// `lr` in every step after the warm-up.
    pub fn constant(lr: f64) -> Self {
        Self { peak: lr, warmup: 0, decay: Decay::Constant }
    }

    /// A line from `peak` to `last`, which step `steps` and all later ones have.
    pub fn linear(peak: f64, last: f64, steps: usize) -> Self {
        Self { peak, warmup: 0, decay: Decay::Linear { last, steps } }
    }

    /// Half a cosine from `peak` to `last`, which step `steps` and all later ones have.
    pub fn cosine(peak: f64, last: f64, steps: usize) -> Self {
        Self { peak, warmup: 0, decay: Decay::Cosine { last, steps } }
    }

    /// The first `steps` steps rise in a line to the peak. They are part of the steps of the whole schedule.
    pub fn warmup(mut self, steps: usize) -> Self {
        self.warmup = steps;
        self
    }

    /// The learning rate of `step`, which counts from 1.
    pub fn at(&self, step: usize) -> f64 {
        if step <= self.warmup {
            return self.peak * step as f64 / self.warmup.max(1) as f64;
        }
        let progress = |steps: usize| {
            let decaying = steps.saturating_sub(self.warmup).max(1);
            ((step - self.warmup) as f64 / decaying as f64).min(1.0)
        };
        match self.decay {
            Decay::Constant => self.peak,
            Decay::Linear { last, steps } => last + (self.peak - last) * (1.0 - progress(steps)),
            Decay::Cosine { last, steps } => last + (self.peak - last) * 0.5 * (1.0 + (PI * progress(steps)).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule;

    #[test]
    fn schedules_rise_and_fall_as_their_formulas_say() {
        let cosine = Schedule::cosine(2.0, 1.0, 12).warmup(4);
        let rates: Vec<f64> = [0, 1, 4, 8, 12, 99].map(|step| cosine.at(step)).to_vec();
        assert_eq!(rates, [0.0, 0.5, 2.0, 1.5, 1.0, 1.0]);
        let linear = Schedule::linear(2.0, 0.0, 8);
        assert_eq!([1, 4, 8, 9].map(|step| linear.at(step)), [1.75, 1.0, 0.0, 0.0]);
        assert_eq!([1, 2, 3].map(|step| Schedule::constant(3.0).warmup(2).at(step)), [1.5, 3.0, 3.0]);
    }

    /// A warm-up as long as the schedule, or longer, has no decay to divide by.
    #[test]
    fn a_schedule_of_warmup_only_stays_finite() {
        let schedule = Schedule::cosine(1.0, 0.0, 3).warmup(5);
        assert_eq!([3, 5, 6].map(|step| schedule.at(step)), [0.6, 1.0, 0.0]);
    }
}
