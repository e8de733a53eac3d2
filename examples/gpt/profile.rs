//! Measures where the time of a step goes. Without [`start`], every call here does nothing.
//!
//! Marks divide time into intervals. Each interval belongs to a phase of the step, the phase that was named last, and to a
//! part of the model. The forward and the backward of an operator in `ops.rs` belong to the part of that operator. The time
//! between such operators is Candle's autograd, which allocates zeros and adds gradients to them.
//!
//! The backward of attention is not an operator of `ops.rs`. Its time is measured from the end of the backward of the layer
//! after it to the next operator of `ops.rs`. It includes Candle's sums of gradients.
//!
//! On a GPU a mark is an event in the stream, so nothing waits for it. An interval is then time on the GPU, including its
//! idle time.

use anyhow::Result;
use candle_core::Device;
use std::cell::RefCell;
use std::time::Instant;

thread_local! {
    static PROFILE: RefCell<Option<Profile>> = const { RefCell::new(None) };
}

/// A part of the model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Part {
    Attention,
    Linear,
    Norm,
    /// In bf16 on a GPU, GELU is inside the matrix products and counts as `Linear`.
    Gelu,
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

/// Begins an interval of `part`. It ends when the guard is dropped; after it comes [`Part::Rest`].
#[must_use]
pub fn part(part: Part) -> Guard {
    part_before(part, Part::Rest)
}

/// Begins an interval of `part`. It ends when the guard is dropped; after it comes `next`.
#[must_use]
pub fn part_before(part: Part, next: Part) -> Guard {
    set_part(part);
    Guard { next }
}

fn set_part(part: Part) {
    PROFILE.with_borrow_mut(|profile| {
        let Some(profile) = profile else { return };
        profile.part = part;
        // If the device cannot record an event, the next operator fails too and reports the error.
        let _ = profile.mark();
    });
}

pub struct Guard {
    next: Part,
}

impl Drop for Guard {
    fn drop(&mut self) {
        set_part(self.next);
    }
}

/// Seconds by name.
pub type Seconds = Vec<(String, f64)>;

/// Ends the profile. Returns the seconds of each phase and of each part, in the order of their first interval. The last mark
/// begins no interval.
pub fn finish() -> Result<(Seconds, Seconds)> {
    let (mut phases, mut parts) = (Seconds::new(), Seconds::new());
    let Some(profile) = PROFILE.take() else { return Ok((phases, parts)) };
    profile.device.synchronize()?;
    for pair in profile.marks.windows(2) {
        let [(phase, part, start), (_, _, end)] = pair else { unreachable!("windows of two") };
        let seconds = start.seconds_until(end)?;
        // The optimizer is not a part of the model.
        let part = match (*part, *phase) {
            (Part::Rest, "weights" | "optimizer") => "optimizer, weights".to_string(),
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
