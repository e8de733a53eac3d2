//! SIGKILL at any time: the run resumes as if it had never been killed.

use super::resume::assert_same_run;
use super::{begin, child_command, small_config, train, Room};
use crate::checkpoint;
use crate::config::Config;
use anyhow::Result;
use candle_core::Device;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;

const KILLS: usize = 50;

/// Maximum time between the start of training and the kill. It is enough for some steps and their checkpoints.
const LONGEST: u64 = 60_000; // microseconds

/// Each run saves a checkpoint with every step. The test kills and resumes it until its last step. Its files must equal those
/// of a run that was never killed.
#[test]
fn a_run_killed_at_any_time_resumes_bit_for_bit() -> Result<()> {
    let room = Room::new();
    let config = Config { checkpoint_interval: Some(1), eval_interval: 7, ..small_config(&room, 100) };
    let uninterrupted = train(&room, "uninterrupted", &config)?;
    let mut state = 1u64;
    let mut time = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        Duration::from_micros((state >> 33) % LONGEST)
    };
    let (mut kills, mut runs) = (0, 0);
    while kills < KILLS {
        runs += 1;
        let name = format!("run {runs}");
        let dir = begin(&room, &name, &config)?;
        let step =
            || -> Result<usize> { Ok(checkpoint::load(&dir.join(checkpoint::FILE_NAME), &Device::Cpu)?.state.step) };
        while step()? < config.steps {
            let mut command = child_command(&["train", "--resume", &room.string(&name)], room.folder.path());
            let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            assert!(lines.any(|line| line.is_ok_and(|line| line.starts_with("steps  "))), "training starts");
            if kills < KILLS {
                kills += 1;
                sleep(time());
                child.kill()?;
            }
            lines.for_each(drop);
            child.wait()?;
        }
        assert_same_run(&dir, &uninterrupted, &format!("{kills} kills"));
    }
    Ok(())
}
