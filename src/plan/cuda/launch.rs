//! One launch of one kernel.

use super::schedule::{Schedule, Tiles};
use crate::instances::{Grid, Kernel, Pass};
use crate::problem::Problem;

/// One launch of one kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// The kernel.
    pub kernel: &'static Kernel,
    /// Number of thread blocks along x, y and z. If one is 0, nothing runs. If z is too large for one grid, the launch is split.
    pub grid: (u32, u32, u32),
    /// The work tiles of a persistent kernel. `None` if the position of a block in the grid determines its tile.
    pub schedule: Option<Schedule>,
}

impl Launch {
    /// A launch with one block for each work tile.
    pub(super) fn by_tile(kernel: &'static Kernel, grid: (u32, u32, u32)) -> Self {
        Self { kernel, grid, schedule: None }
    }

    /// The launch of a forward or a backward, for all its work tiles.
    pub(super) fn of_tiles(problem: &Problem, kernel: &'static Kernel, multiprocessors: usize) -> Self {
        match kernel.grid {
            Grid::Tiles => {
                let Tiles { rows, seqlen, heads } = Tiles::of(problem, kernel);
                let blocks = seqlen.div_ceil(rows) * kernel.parts();
                Self::by_tile(kernel, (blocks as u32, heads as u32, problem.batch() as u32))
            }
            Grid::Persistent { max_tiles } => {
                let schedule = Schedule::new(problem, kernel, multiprocessors);
                let blocks = schedule.blocks(kernel, multiprocessors, max_tiles);
                Self { kernel, grid: (blocks as u32, 1, 1), schedule: Some(schedule) }
            }
        }
    }

    /// Whether there are more work tiles than blocks, or clusters.
    pub fn shares_tiles(&self) -> bool {
        self.schedule.is_some_and(|schedule| schedule.tiles > self.grid.0 as usize / self.kernel.cluster)
    }

    /// Whether the kernel takes its work tiles from a counter. A forward does not if there is a block for every tile.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(crate) fn counts_tiles(&self) -> bool {
        self.schedule.is_some() && (self.kernel.pass == Pass::Backward || self.shares_tiles())
    }
}

impl std::fmt::Display for Launch {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let (grid, block, shared) = (self.grid, self.kernel.threads(), self.kernel.shared_bytes);
        write!(f, "grid {grid:?}, block {block}, shared {shared} bytes")
    }
}

impl std::fmt::Debug for Launch {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match &self.schedule {
            None => write!(f, "{} ({self})", self.kernel.name),
            Some(schedule) => write!(f, "{} ({self}, {schedule:?})", self.kernel.name),
        }
    }
}
