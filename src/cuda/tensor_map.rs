//! Tensor maps: what a kernel for compute capability 9.0 is told of a matrix, so that the device copies whole boxes
//! of it by itself. The kernels' side is `kernels/hopper.cuh`.
//!
//! All ours are alike: bf16, boxes of 64 elements along the contiguous extent (128 bytes, swizzled), zeros beyond the
//! edges. What is left to say is the matrix and how many rows a box has.

use super::driver::{TensorMap, TensorView};
use super::memory::{Buffer, Gpu};
use super::unit::Capability;
use crate::problem::Problem;
use half::bf16;

/// Elements of a box along the contiguous extent.
pub const BOX_COLS: usize = 64;
/// The most rows of a box.
pub const BOX_ROWS: usize = 256;

/// Whether rows of this many bf16 begin where a tensor copy can take them: at multiples of 16 bytes.
pub fn copies_rows_of(cols: usize) -> bool {
    cols > 0 && cols.is_multiple_of(8)
}

impl Gpu {
    /// Whether kernels named `<op>_hopper` run here: they use instructions that only compute capability 9.0 has.
    pub fn has_wgmma(&self) -> bool {
        self.driver().capability() == Capability { major: 9, minor: 0 }
    }

    /// A map of the row-major tensor `extents` (two or three, the contiguous one last) at the beginning of `buffer`,
    /// of which one copy takes a box of the size `tile`: its last is `BOX_COLS`, the others are up to `BOX_ROWS`.
    /// The contiguous extent must be one that [`copies_rows_of`] takes.
    pub fn tensor_map(&self, buffer: &Buffer<bf16>, extents: &[usize], tile: &[usize]) -> Result<TensorMap, Problem> {
        self.tensor_map_from(buffer, 0, extents, tile)
    }

    /// The same of a tensor that begins at element `first` of the buffer, a multiple of 8.
    pub fn tensor_map_from(
        &self,
        buffer: &Buffer<bf16>,
        first: usize,
        extents: &[usize],
        tile: &[usize],
    ) -> Result<TensorMap, Problem> {
        let cols = *extents.last().expect("a tensor has extents");
        assert!([2, 3].contains(&extents.len()) && extents.len() == tile.len(), "{extents:?}, {tile:?}");
        assert!(first.is_multiple_of(8), "element {first} does not begin at a multiple of 16 bytes");
        assert!(
            first + extents.iter().product::<usize>() <= buffer.len() && extents.iter().all(|n| *n > 0),
            "{extents:?}"
        );
        assert!(copies_rows_of(cols), "rows of {cols} elements do not begin at multiples of 16 bytes");
        assert!(tile.last() == Some(&BOX_COLS) && tile.iter().all(|n| (1..=BOX_ROWS).contains(n)), "{tile:?}");
        self.keep(buffer);
        let inner_first = |sizes: &[usize]| -> Vec<u64> { sizes.iter().rev().map(|n| *n as u64).collect() };
        let extents = inner_first(extents);
        let mut pitches = vec![2 * extents[0]];
        if let [_, rows, _] = extents[..] {
            pitches.push(pitches[0] * rows);
        }
        let tile = inner_first(tile).iter().map(|n| *n as u32).collect();
        self.driver().tensor_map(&TensorView { address: buffer.address_of(first), extents, pitches, tile })
    }
}
