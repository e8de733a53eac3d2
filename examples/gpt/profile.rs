//! Measures where the time of a step goes. Without [`start`], every call here does nothing.
//!
//! Marks divide time into intervals. Each interval belongs to a phase of the step, the phase that was named last, and to a
//! part of the model. `model.rs` marks its operators in the forward, and candle-fused-ops those of the backward. What is between
//! them is Candle's autograd.
//!
//! Attention has no marks in the backward. Its time there is that from the end of the layer after it, the only `linear_add`, to
//! the next operator. It includes Candle's sums of gradients.
//!
//! On a GPU a mark is an event in the stream, so nothing waits for it. An interval is then time on the GPU, including its
//! idle time.

use anyhow::Result;
use candle_core::Device;
use candle_fused_ops::{observe_backward, Moment};
use std::cell::RefCell;
use std::time::Instant;

thread_local! {
    static PROFILE: RefCell<Option<Profile>> = const { RefCell::new(None) };
}

/// A part of the model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Part {
    Attention,
    /// With bias, GELU and residual.
    Linear,
    Norm,
    Embedding,
    Loss,
    /// Zeros, sums and copies of autograd, and everything else.
    Rest,
}

struct Profile {
    device: Device,
    phase: &'static str,
    part: Part,
    marks: Vec<(&'static str, Part, Mark)>,
}

impl Profile {
    /// Begins an interval of `self.phase` and `self.part`.
    fn mark(&mut self) -> Result<()> {
        let mark = Mark::new(&self.device)?;
        self.marks.push((self.phase, self.part, mark));
        Ok(())
    }
}

enum Mark {
    Clock(Instant),
    #[cfg(feature = "cuda")]
    Event(candle_core::cuda::cudarc::driver::CudaEvent),
}

impl Mark {
    fn new(device: &Device) -> Result<Self> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Mark::Event(crate::gpu::event(device)?)),
            _ => Ok(Mark::Clock(Instant::now())),
        }
    }

    fn seconds_until(&self, end: &Mark) -> Result<f64> {
        match (self, end) {
            (Mark::Clock(start), Mark::Clock(end)) => Ok((*end - *start).as_secs_f64()),
            #[cfg(feature = "cuda")]
            (Mark::Event(start), Mark::Event(end)) => Ok(f64::from(start.elapsed_ms(end)?) / 1e3),
            #[cfg(feature = "cuda")]
            _ => unreachable!("all marks are of one device"),
        }
    }
}

/// Begins a profile.
pub fn start(device: &Device) {
    observe_backward(Some(backward));
    PROFILE.set(Some(Profile { device: device.clone(), phase: "", part: Part::Rest, marks: Vec::new() }));
}

/// Begins the phase `name`.
pub fn phase(name: &'static str) -> Result<()> {
    PROFILE.with_borrow_mut(|profile| {
        let Some(profile) = profile else { return Ok(()) };
        profile.phase = name;
        profile.mark()
    })
}

/// Runs `operator` in an interval of `part`.
pub fn part<T>(part: Part, operator: impl FnOnce() -> T) -> T {
    set_part(part);
    let result = operator();
    set_part(Part::Rest);
    result
}

/// The backward of the operator `name` begins, or has ended.
fn backward(name: &'static str, moment: Moment) {
    set_part(match (name, moment) {
        ("linear_add", Moment::End) => Part::Attention,
        (_, Moment::End) => Part::Rest,
        ("layer_norm", Moment::Begin) => Part::Norm,
        ("embedding", Moment::Begin) => Part::Embedding,
        ("linear_cross_entropy", Moment::Begin) => Part::Loss,
        (_, Moment::Begin) => Part::Linear,
    });
}

fn set_part(part: Part) {
    PROFILE.with_borrow_mut(|profile| {
        let Some(profile) = profile else { return };
        profile.part = part;
        // If the device cannot record an event, the next operator fails too and reports the error.
        let _ = profile.mark();
    });
}

/// Seconds by name.
pub type Seconds = Vec<(String, f64)>;

/// Ends the profile. Returns the seconds of each phase and of each part, in the order of their first interval. The last mark
/// begins no interval.
pub fn finish() -> Result<(Seconds, Seconds)> {
    let (mut phases, mut parts) = (Seconds::new(), Seconds::new());
    let Some(profile) = PROFILE.take() else { return Ok((phases, parts)) };
    observe_backward(None);
    profile.device.synchronize()?;
    for pair in profile.marks.windows(2) {
        let [(phase, part, start), (_, _, end)] = pair else { unreachable!("windows of two") };
        let seconds = start.seconds_until(end)?;
        // The optimizer is not a part of the model.
        let part = match (*part, *phase) {
            (Part::Rest, "optimizer") => "optimizer".to_string(),
            (Part::Rest, _) => "autograd, rest".to_string(),
            (part, _) => format!("{part:?}").to_lowercase(),
        };
        add(&mut phases, phase.to_string(), seconds);
        add(&mut parts, part, seconds);
    }
    Ok((phases, parts))
}

fn add(sums: &mut Seconds, name: String, seconds: f64) {
    match sums.iter_mut().find(|(known, _)| *known == name) {
        Some((_, sum)) => *sum += seconds,
        None => sums.push((name, seconds)),
    }
}
