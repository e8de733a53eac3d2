//! Measures where the time of a training step goes, operator by operator.
//!
//! Marks divide time into intervals. Each operator of this crate makes a mark when its forward is queued, and two around its
//! backward. On a GPU a mark is an event in the stream, so nothing waits for it. An interval is then time on the GPU, including its
//! idle time. Without [`start`], a mark does nothing.
//!
//! ```
//! # use candle_core::{Device, Tensor, Var};
//! use candle_fused_ops::{gelu, profile};
//!
//! # let x = Var::randn(0f32, 1f32, (2, 3), &Device::Cpu)?;
//! profile::start(x.device())?;
//! let y = gelu(&x)?; // a mark
//! let y = (y.sqr()? + 1.0)?;
//! profile::mark("square")?; // what Candle's operators have done since the mark before
//! y.sum_all()?.backward()?;
//! let names: Vec<String> = profile::finish()?.into_iter().map(|(name, _)| name).collect();
//! assert_eq!(names, ["gelu", "square", "after gelu", "gelu backward"]);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! `after NAME` covers operators without marks that used the result of NAME: their backward, and Candle's sums of gradients.

use std::cell::RefCell;
use std::time::Instant;

use candle_core::{Device, Result};

thread_local! {
    static PROFILE: RefCell<Option<Profile>> = const { RefCell::new(None) };
}

struct Profile {
    device: Device,
    /// Each mark, and the name of the interval that it ends.
    marks: Vec<(Name, Mark)>,
}

#[derive(Clone, Copy)]
enum Name {
    Of(&'static str),
    Backward(&'static str),
    After(&'static str),
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
            Device::Cuda(device) => {
                use candle_core::cuda::{cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT, WrapErr};
                Ok(Self::Event(device.cuda_stream().record_event(Some(CU_EVENT_DEFAULT)).w()?))
            }
            _ => Ok(Self::Clock(Instant::now())),
        }
    }

    fn seconds_until(&self, end: &Self) -> Result<f64> {
        match (self, end) {
            (Self::Clock(start), Self::Clock(end)) => Ok((*end - *start).as_secs_f64()),
            #[cfg(feature = "cuda")]
            (Self::Event(start), Self::Event(end)) => {
                use candle_core::cuda::WrapErr;
                Ok(f64::from(start.elapsed_ms(end).w()?) / 1e3)
            }
            #[cfg(feature = "cuda")]
            _ => unreachable!("all marks are of one device"),
        }
    }
}

/// Begins a profile of this thread. Its device is `device`.
///
/// # Errors
/// If the device cannot record an event.
pub fn start(device: &Device) -> Result<()> {
    PROFILE.set(Some(Profile { device: device.clone(), marks: Vec::new() }));
    mark("")
}

/// Names what has been queued since the mark before.
///
/// # Errors
/// If the device cannot record an event.
pub fn mark(name: &'static str) -> Result<()> {
    end(Name::Of(name))
}

/// The backward of the operator `name` begins.
pub(crate) fn mark_after(name: &'static str) -> Result<()> {
    end(Name::After(name))
}

/// The backward of the operator `name` has ended.
pub(crate) fn mark_backward(name: &'static str) -> Result<()> {
    end(Name::Backward(name))
}

fn end(name: Name) -> Result<()> {
    PROFILE.with_borrow_mut(|profile| {
        if let Some(Profile { device, marks }) = profile {
            marks.push((name, Mark::new(device)?));
        }
        Ok(())
    })
}

/// Ends the profile. Waits for the device, and returns the seconds of all names, in the order of their first interval.
///
/// # Errors
/// If the device fails.
pub fn finish() -> Result<Vec<(String, f64)>> {
    let mut sums: Vec<(String, f64)> = Vec::new();
    let Some(Profile { device, marks }) = PROFILE.take() else { return Ok(sums) };
    device.synchronize()?;
    for pair in marks.windows(2) {
        let [(_, start), (name, end)] = pair else { unreachable!("windows of two") };
        let name = match name {
            Name::Of(name) => name.to_string(),
            Name::Backward(name) => format!("{name} backward"),
            Name::After(name) => format!("after {name}"),
        };
        let seconds = start.seconds_until(end)?;
        match sums.iter_mut().find(|(known, _)| *known == name) {
            Some((_, sum)) => *sum += seconds,
            None => sums.push((name, seconds)),
        }
    }
    Ok(sums)
}
