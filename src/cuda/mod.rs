//! Memory and kernels of a CUDA device: buffers, launches, and who carries them out. Knows no model.
//!
//! Work goes to one queue, in order: a launch returns at once, a download waits. Beside it there is a queue of
//! copies, which [`Mark`]s order against the first. There are two who carry them out, and nothing else may tell
//! them apart: NVIDIA's driver, and the emulator of the tests, which compiles the same kernels for the CPU.
//!
//! | file | holds |
//! |---|---|
//! | `memory.rs` | [`Gpu`] and [`Buffer`]: allocation from a pool, the peak, copies |
//! | `staging.rs` | small uploads nobody waits for, through a ring of host memory |
//! | `beside.rs` | buffers parked in host memory, by copies beside the launches |
//! | `graph.rs` | launches captured once and carried out many times; `capture.rs`: what a thread is capturing |
//! | `region.rs` | the memory that captured steps work in, one after another |
//! | `launch.rs` | one launch: name, grid, shared memory, arguments |
//! | `tensor_map.rs` | what kernels for compute capability 9.0 are told of a matrix |
//! | `driver.rs` | [`Driver`]: what is asked of whoever carries it out |
//! | `nvidia.rs` | NVIDIA's driver; [`open`] says why there is none. `survey.rs`: what it shows, how it says no |
//! | `unit.rs` | kernels compiled together, and which of their forms a device runs |
//! | `prebuilt.rs` | the compiled kernels that are embedded; its table is generated |
//! | `kernels.rs` | where the kernels of a device come from: embedded, a test's, or compiled now |
//! | `jit.rs` | kernels compiled at run time, for whoever works on them; `units.rs` and `nvrtc.rs`: what and by whom |
//! | `ops/` | the launcher of each kernel, under the stem of its `.cu` and of its reference in `tensor::ops` |

mod beside;
mod capture;
mod driver;
mod graph;
pub mod jit;
mod kernels;
mod launch;
mod memory;
mod nvidia;
pub mod nvrtc;
pub mod ops;
pub mod prebuilt;
mod prebuilt_table;
mod region;
mod staging;
mod survey;
mod tensor_map;
mod unit;
pub mod units;

pub use beside::{Arriving, Leaving, Parked};
pub use capture::Turn;
pub use driver::{Dim, Driver, Mark, Queue, TensorMap, TensorView};
pub use graph::Graph;
pub use launch::{LARGEST_COUNT, Launch, check_rows};
pub use memory::{Buffer, Gpu, Usage, block_bytes};
pub use nvidia::{open, open_with};
pub use region::Region;
pub use staging::STAGING_BYTES;
pub use survey::{Facts, Shown, survey};
pub use tensor_map::copies_rows_of;
pub use unit::Capability;
