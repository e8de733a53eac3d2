//! The GPU: events around calls, and nvidia-smi's clock and power during them.
//!
//! Candle queues on the calling thread's own stream. So all of this runs on the thread that made the device.

use std::cell::Cell;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::cuda::cudarc::driver::sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
use candle_core::cuda::cudarc::driver::sys::CUevent_flags_enum::CU_EVENT_DEFAULT;
use candle_core::cuda::cudarc::driver::{CudaEvent, CudaSlice, CudaStream};
use candle_core::Device;
use candle_fused_ops::pool;

use crate::timing::Timing;

pub struct Gpu {
    pub device: Device,
    stream: Arc<CudaStream>,
    /// Zeroed before each timed call, so that its inputs are not in the L2 cache.
    flush: CudaSlice<u8>,
    /// nvidia-smi's name of this GPU. It does not depend on CUDA's numbering.
    uuid: String,
    /// Whether nvidia-smi has answered so far. After its first failure the bench does not ask again.
    answers: Cell<bool>,
}

/// The cost of one call.
pub struct Cost {
    /// On the GPU, between events.
    pub timing: Timing,
    /// Median seconds until a call has been queued.
    pub host_s: f64,
    pub gauges: Gauges,
}

/// Clock and power under the load of the timed call; empty without nvidia-smi.
#[derive(Default)]
pub struct Gauges {
    pub sm_mhz: String,
    pub watts: String,
}

/// More than the L2 cache of any GPU so far (50 MB on an H100).
const FLUSH_BYTES: usize = 192 << 20;

/// A pause between points, because the clock depends on the power drawn before.
const PAUSE: Duration = Duration::from_millis(100);

/// The smallest and the largest number of timed calls of a point.
const RUNS: std::ops::RangeInclusive<f64> = 7.0..=100.0;

/// A call that takes longer is timed at least [`SLOW_RUNS`] times. Some calls of standard attention take half a second.
const SLOW_MS: f64 = 50.0;
const SLOW_RUNS: f64 = 3.0;

/// Calls whose queueing is timed. The queue is full after about a thousand launches, and then the host waits for the
/// GPU. This many calls launch far fewer kernels.
const HOST_CALLS: usize = 16;

impl Gpu {
    /// # Errors
    /// If there is no GPU, or no driver.
    pub fn new() -> Result<Self> {
        let device = Device::new_cuda(0)?;
        let stream = device.as_cuda_device()?.cuda_stream();
        let flush = stream.alloc_zeros::<u8>(FLUSH_BYTES)?;
        // Eight, four, four, four and twelve hexadecimal digits.
        let digits: String = stream.context().uuid()?.bytes.iter().map(|&byte| format!("{:02x}", byte as u8)).collect();
        let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| &digits[part]);
        let uuid = format!("GPU-{}", parts.join("-"));
        Ok(Self { device, stream, flush, uuid, answers: Cell::new(true) })
    }

    /// Name, compute capability, multiprocessors, driver and limits in one line.
    pub fn describe(&self) -> Result<String> {
        let context = self.stream.context();
        let (major, minor) = context.compute_capability()?;
        let multiprocessors = context.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let name = context.name()?;
        let of_driver = match self.ask("driver_version,clocks.max.sm,power.limit,temperature.gpu") {
            Some(question) => self.answer(question),
            None => String::new(),
        };
        let of_driver = match of_driver.as_str() {
            "" => "nvidia-smi does not answer: no clocks, no watts".into(),
            answer => format!("driver, MHz at most, W at most, degrees Celsius: {answer}"),
        };
        Ok(format!("{name}, sm_{major}{minor}, {multiprocessors} multiprocessors; {of_driver}"))
    }

    pub fn name(&self) -> Result<String> {
        Ok(self.stream.context().name()?)
    }

    /// All of its memory, free or not.
    pub fn memory_bytes(&self) -> Result<usize> {
        Ok(self.stream.context().total_mem()?)
    }

    /// The result of `run`, and the most bytes of tensors that it had allocated at once.
    pub fn peak_bytes<R>(&self, run: impl FnOnce() -> Result<R>) -> Result<(R, usize)> {
        const NO_POOL: &str = "peak memory is measured with memory pools, but this GPU has none";
        self.stream.synchronize()?;
        let before = pool::used_bytes(&self.device)?.context(NO_POOL)?;
        let result = run()?;
        let peak = pool::peak_bytes(&self.device)?.context(NO_POOL)?;
        self.stream.synchronize()?;
        Ok((result, peak.saturating_sub(before) as usize))
    }

    /// Returns free memory to the driver. Called after a call ran out of memory and its tensors were dropped.
    pub fn recover(&self) -> Result<()> {
        self.stream.synchronize()?;
        Ok(pool::release_freed_memory(&self.device)?)
    }

    /// The result of one `call`, and the seconds until the GPU was done with it.
    pub fn once<R>(&self, call: impl FnOnce() -> Result<R>) -> Result<(R, f64)> {
        self.stream.synchronize()?;
        let begun = Instant::now();
        let result = call()?;
        self.stream.synchronize()?;
        Ok((result, begun.elapsed().as_secs_f64()))
    }

    /// Times `call` for about `milliseconds`: warm, after a pause, with the L2 cache flushed before each run.
    pub fn time<R>(&mut self, milliseconds: f64, call: impl Fn() -> Result<R>) -> Result<Cost> {
        call()?;
        self.stream.synchronize()?;
        std::thread::sleep(PAUSE);

        // A synchronisation returns freed memory to the driver. The first of the two calls allocates it again.
        let marks = [self.event()?, self.event()?, self.event()?];
        marks[0].record(&self.stream)?;
        for mark in &marks[1..] {
            call()?;
            mark.record(&self.stream)?;
        }
        let estimate_ms = f64::from(marks[0].elapsed_ms(&marks[1])?.min(marks[1].elapsed_ms(&marks[2])?));
        let least = if estimate_ms > SLOW_MS { SLOW_RUNS } else { *RUNS.start() };
        let runs = (milliseconds / estimate_ms).clamp(least, *RUNS.end()) as usize;

        let events: Vec<[CudaEvent; 2]> =
            (0..runs).map(|_| Ok([self.event()?, self.event()?])).collect::<Result<_>>()?;
        let mut queued = Vec::new();
        for [start, end] in &events {
            self.stream.memset_zeros(&mut self.flush)?;
            start.record(&self.stream)?;
            let begun = Instant::now();
            let result = call()?;
            queued.push(begun.elapsed().as_secs_f64());
            end.record(&self.stream)?;
            drop(result);
        }
        let gauges = self.gauges(estimate_ms, &call)?;
        self.stream.synchronize()?;
        let seconds = |[start, end]: &[CudaEvent; 2]| Ok(f64::from(start.elapsed_ms(end)?) / 1e3);
        let timing = Timing::new(events.iter().map(seconds).collect::<Result<_>>()?, None);
        queued.truncate(HOST_CALLS);
        Ok(Cost { timing, host_s: Timing::new(queued, None).median(), gauges })
    }

    /// Median seconds until `call` has been queued. A round is too short to fill the queue.
    pub fn host<R>(&self, call: impl Fn() -> Result<R>) -> Result<f64> {
        const ROUNDS: usize = 20;
        let mut queued = Vec::new();
        for round in 0..=ROUNDS {
            for _ in 0..HOST_CALLS {
                let begun = Instant::now();
                let result = call()?;
                let seconds = begun.elapsed().as_secs_f64();
                drop(result);
                // The first round loads the kernels.
                if round > 0 {
                    queued.push(seconds);
                }
            }
            self.stream.synchronize()?;
        }
        Ok(Timing::new(queued, None).median())
    }

    fn event(&self) -> Result<CudaEvent> {
        Ok(self.stream.context().new_event(Some(CU_EVENT_DEFAULT))?)
    }

    /// Clock and power. Until nvidia-smi answers, the GPU repeats the same call, which takes `milliseconds`, without
    /// timing it. Several calls are queued at once, because the first one after a synchronisation waits for its memory.
    fn gauges<R>(&self, milliseconds: f64, call: impl Fn() -> Result<R>) -> Result<Gauges> {
        const PATIENCE: Duration = Duration::from_secs(2);
        const AT_ONCE_MS: f64 = 20.0;
        let at_once = (AT_ONCE_MS / milliseconds).clamp(1.0, HOST_CALLS as f64) as usize;
        let Some(mut question) = self.ask("clocks.sm,power.draw") else { return Ok(Gauges::default()) };
        let begun = Instant::now();
        while question.try_wait()?.is_none() {
            if begun.elapsed() > PATIENCE {
                question.kill()?;
            }
            for _ in 0..at_once {
                call()?;
            }
            self.stream.synchronize()?;
        }
        let answer = self.answer(question);
        let (sm_mhz, watts) = answer.split_once(", ").unwrap_or_default();
        // nvidia-smi prints a text in brackets if the GPU does not report a value.
        let value = |text: &str| if text.starts_with('[') { String::new() } else { text.to_string() };
        Ok(Gauges { sm_mhz: value(sm_mhz), watts: value(watts) })
    }

    /// Asks nvidia-smi; `None` if it is missing or did not answer before.
    fn ask(&self, fields: &str) -> Option<Child> {
        let mut command = Command::new("nvidia-smi");
        command.arg(format!("--id={}", self.uuid)).arg(format!("--query-gpu={fields}"));
        command.arg("--format=csv,noheader,nounits").stdout(Stdio::piped()).stderr(Stdio::null());
        let question = if self.answers.get() { command.spawn().ok() } else { None };
        self.answers.set(question.is_some());
        question
    }

    /// The line that nvidia-smi prints; empty if it fails.
    fn answer(&self, question: Child) -> String {
        let line = match question.wait_with_output() {
            Ok(output) if output.status.success() => {
                String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().trim().to_string()
            }
            _ => String::new(),
        };
        self.answers.set(!line.is_empty());
        line
    }
}
