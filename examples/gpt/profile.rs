//! Where the time of a step goes, when it is asked for; otherwise every call here does nothing.
//!
//! Time is a row of stretches. Each belongs to a phase of the step, the one that was named last, and to a part of the
//! model: what an operator with a gradient by hand does, forward and backward, is its part's; all that lies between them
//! is Candle's autograd: zeros, and the sums of gradients into them. The backward of attention is no operator of ours: it
//! is the time from the backward of the layer behind it to that of the layer before it, the sums between them included.
//!
//! On a GPU a mark is an event in the stream, so that nothing waits for it and a stretch is what the GPU needed, its idle
//! time included.

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
    /// Where it is not inside the products, and counted with them: in bf16 on a GPU.
    Gelu,
    Embedding,
    Loss,
    /// Zeros, sums and copies of autograd, and what is not named above.
    Rest,
}

struct Profile {
    device: Device,
    phase: &'static str,
    part: Part,
    marks: Vec<(&'static str, Part, Mark)>,
}

impl Profile {
    /// What follows belongs to `self.phase` and `self.part`.
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

/// From here on, marks are kept.
pub fn start(device: &Device) {
    PROFILE.set(Some(Profile { device: device.clone(), phase: "", part: Part::Rest, marks: Vec::new() }));
}

/// What follows belongs to the phase `name`.
pub fn phase(name: &'static str) -> Result<()> {
    PROFILE.with_borrow_mut(|profile| {
        let Some(profile) = profile else { return Ok(()) };
        profile.phase = name;
        profile.mark()
    })
}

/// What follows belongs to `part`, until the guard goes; then to none.
#[must_use]
pub fn part(part: Part) -> Guard {
    part_before(part, Part::Rest)
}

/// What follows belongs to `part`, until the guard goes; then to `next`.
#[must_use]
pub fn part_before(part: Part, next: Part) -> Guard {
    set_part(part);
    Guard { next }
}

fn set_part(part: Part) {
    PROFILE.with_borrow_mut(|profile| {
        let Some(profile) = profile else { return };
        profile.part = part;
        // A device that takes no event any more refuses the next operator too, which says so.
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

/// Seconds of each phase and of each part since [`start`], in the order in which they first came. The last mark only
/// ends a stretch.
pub fn finish() -> Result<(Seconds, Seconds)> {
    let (mut phases, mut parts) = (Seconds::new(), Seconds::new());
    let Some(profile) = PROFILE.take() else { return Ok((phases, parts)) };
    profile.device.synchronize()?;
    for pair in profile.marks.windows(2) {
        let [(phase, part, start), (_, _, end)] = pair else { unreachable!("windows of two") };
        let stretch = start.seconds_until(end)?;
        // The optimizer is no part of the model.
        let part = match (*part, *phase) {
            (Part::Rest, "weights" | "optimizer") => "optimizer, weights".to_string(),
            (Part::Rest, _) => "autograd, rest".to_string(),
            (part, _) => format!("{part:?}").to_lowercase(),
        };
        add(&mut phases, phase.to_string(), stretch);
        add(&mut parts, part, stretch);
    }
    Ok((phases, parts))
}

fn add(seconds: &mut Seconds, name: String, more: f64) {
    match seconds.iter_mut().find(|(known, _)| *known == name) {
        Some((_, sum)) => *sum += more,
        None => seconds.push((name, more)),
    }
}
