//! Where the time of a step goes, when it is asked for; otherwise every call here does nothing.
//!
//! Time is a row of stretches. Each belongs to the phase that was named last. On a GPU a mark is an event in the
//! stream, so that nothing waits for it and a stretch is what the GPU needed, its idle time included.

use anyhow::Result;
use candle_core::Device;
use std::cell::RefCell;
use std::time::Instant;

thread_local! {
    static PROFILE: RefCell<Option<Profile>> = const { RefCell::new(None) };
}

struct Profile {
    device: Device,
    marks: Vec<(&'static str, Mark)>,
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
    PROFILE.set(Some(Profile { device: device.clone(), marks: Vec::new() }));
}

/// What follows belongs to the phase `name`.
pub fn phase(name: &'static str) -> Result<()> {
    PROFILE.with_borrow_mut(|profile| {
        let Some(profile) = profile else { return Ok(()) };
        let mark = Mark::new(&profile.device)?;
        profile.marks.push((name, mark));
        Ok(())
    })
}

/// Seconds of each phase since [`start`], in the order in which they first came. The last mark only ends a stretch.
pub fn finish() -> Result<Vec<(&'static str, f64)>> {
    let Some(profile) = PROFILE.take() else { return Ok(Vec::new()) };
    profile.device.synchronize()?;
    let mut seconds: Vec<(&'static str, f64)> = Vec::new();
    for pair in profile.marks.windows(2) {
        let [(name, start), (_, end)] = pair else { unreachable!("windows of two") };
        let stretch = start.seconds_until(end)?;
        match seconds.iter_mut().find(|(known, _)| known == name) {
            Some((_, sum)) => *sum += stretch,
            None => seconds.push((name, stretch)),
        }
    }
    Ok(seconds)
}
