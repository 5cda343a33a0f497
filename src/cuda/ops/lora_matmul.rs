//! Launchers of `kernels/lora_matmul.cu` and `lora_matmul_hopper.cu`: a linear layer with an optional low-rank adapter,
//! forward and backward, and the gradient of its weight.
//!
//! Every element of low, y, dlow and dx is one chain over the summed index, whichever kernel computes it. So the choice
//! between the kernels of the first file is about speed alone: a row has the same bits by itself and in any batch. Those
//! of the second, for compute capability 9.0, have the same law and may differ from the others in last bits: who calls
//! says which ([`Rows`]), never the number of rows.

use crate::cuda::{Buffer, Dim, Gpu, copies_rows_of};
use crate::problem::Problem;
use half::bf16;

/// x is [m, k], y is [m, n], W is [n, k] (n outputs, k inputs).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dims {
    /// Rows of the result.
    pub m: usize,
    /// Its columns.
    pub n: usize,
    /// The length of the sums.
    pub k: usize,
}

impl Dims {
    fn check(self) {
        assert!(self.m > 0 && self.n > 0 && self.k > 0, "{self:?}");
    }
}

/// An adapter adds `scale` B A to W: A is [rank, k], B is [n, rank]. Rank 0 is no adapter.
#[derive(Clone, Copy)]
pub struct Lora<'a> {
    /// A, `rank` rows as wide as the input.
    pub a: &'a Buffer<bf16>,
    /// B, `rank` columns, as many rows as the output is wide.
    pub b: &'a Buffer<bf16>,
    /// The rank of the adapter.
    pub rank: usize,
    /// What the adapter's product is multiplied by.
    pub scale: f32,
}

impl Lora<'_> {
    fn check(&self, Dims { n, k, .. }: Dims) {
        assert_eq!(self.a.len(), self.rank * k);
        assert_eq!(self.b.len(), n * self.rank);
    }
}

/// The gradients of an adapter: da [rank, k] and db [n, rank].
pub struct Gradients<'a> {
    /// That of A, added to.
    pub da: &'a mut Buffer<f32>,
    /// That of B, added to.
    pub db: &'a mut Buffer<f32>,
}

/// A kernel, the results of its block, and the threads and shared memory that it takes for them.
struct Tile {
    kernel: &'static str,
    rows: usize,
    cols: usize,
    threads: usize,
    shared: usize,
}

impl Tile {
    const fn new(kernel: &'static str, (rows, cols): (usize, usize), threads: usize, shared: usize) -> Tile {
        Tile { kernel, rows, cols, threads, shared }
    }

    fn over(&self, rows: usize, cols: usize) -> (usize, usize) {
        (rows.div_ceil(self.rows), cols.div_ceil(self.cols))
    }
}

const FORWARD: Tile = Tile::new("lora_matmul_forward", (128, 128), 256, 48 << 10);
const FEW: Tile = Tile::new("lora_matmul_few", (64, 32), 64, 48 << 10);
const DECODE: Tile = Tile::new("lora_matmul_decode", (16, 16), 32, 48 << 10);
const LOW: Tile = Tile::new("lora_matmul_low", (16, 64), 128, 40 << 10);
const DLOW: Tile = Tile::new("lora_matmul_dlow", (16, 64), 128, 40 << 10);
const DX: Tile = Tile::new("lora_matmul_dx", (128, 128), 256, 48 << 10);
const DW: Tile = Tile::new("lora_matmul_dw", (128, 128), 256, 48 << 10);
const FACTOR: Tile = Tile::new("lora_matmul_factor", (64, 64), 128, 32 << 10);

/// These take tensor maps: of x, dy, low and dlow boxes of as many rows as the tile has; of W and B forward, as it has
/// columns; of W and A for dx, 64 rows.
const FORWARD_HOPPER: Tile = Tile::new("lora_matmul_forward_hopper", (128, 256), 384, 4 * (48 << 10) + 64);
const DX_HOPPER: Tile = Tile::new("lora_matmul_dx_hopper", (128, 256), 384, 4 * (48 << 10) + 64);

/// At most this many rows are decoded sixteen at a time, ...
const DECODE_ROWS: usize = 16;
/// ... and at most this many in tiles of 64 rows. Above, there are enough tiles of 128.
const FEW_ROWS: usize = 256;

/// Rows that one block sums for da and db, unless that made more than this many parts.
const PART_ROWS: usize = 512;
const PARTS: usize = 16;

/// Rows of a part of m, a multiple of the kernel's step of 32. A function of m only, so that equal batches have equal
/// gradients.
fn part_rows(m: usize) -> usize {
    m.div_ceil(PARTS).max(PART_ROWS).next_multiple_of(32)
}

/// How many parts of a factor's gradient are summed by themselves: scratch of the backward pass.
pub fn gradient_parts(m: usize) -> usize {
    m.div_ceil(part_rows(m))
}

/// What rows are, which says by which kernels y is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// Tokens of whole sequences. Where the device has wgmma and the sizes suit it, that is used for any m, so that a row
    /// has the same bits in every batch.
    Sequences,
    /// A token each, of as many completions as happen to be in the making: small tiles, the same kernels whatever the
    /// device.
    Steps,
}

/// y [m, n] = (or += with `add`) x W^T + scale low B^T + bias, with low [m, rank] = x A^T in bf16, which the backward
/// pass wants; with `low` absent it is thrown away. x [m, k], W [n, k], bias \[n\].
///
/// The adapter's product and the base's are summed in the same f32 accumulators; y is rounded once.
#[expect(clippy::too_many_arguments, reason = "two results, the operands of a layer, sizes and what rows are")]
pub fn forward(
    y: &mut Buffer<bf16>,
    low: Option<&mut Buffer<bf16>>,
    x: &Buffer<bf16>,
    w: &Buffer<bf16>,
    bias: Option<&Buffer<f32>>,
    lora: Option<Lora<'_>>,
    dims: Dims,
    rows: Rows,
    add: bool,
) -> Result<(), Problem> {
    let Dims { m, n, k } = dims;
    dims.check();
    assert!(y.len() == m * n && x.len() == m * k && w.len() == n * k, "{dims:?}");
    assert!(bias.is_none_or(|bias| bias.len() == n));
    let lora = lora.filter(|lora| lora.rank > 0);

    let fresh;
    let low = match (lora, low) {
        (None, _) => None,
        (Some(lora), Some(low)) => {
            project(low, x, lora, dims)?;
            Some(&*low)
        }
        (Some(lora), None) => {
            let mut scratch = y.gpu().alloc(m * lora.rank)?;
            project(&mut scratch, x, lora, dims)?;
            fresh = scratch;
            Some(&fresh)
        }
    };

    let suits = copies_rows_of(k) && lora.is_none_or(|lora| copies_rows_of(lora.rank));
    if rows == Rows::Sequences && y.gpu().has_wgmma() && suits {
        return forward_hopper(y, x, w, bias, lora.zip(low), dims, add);
    }
    let tile = if m <= DECODE_ROWS {
        DECODE
    } else if m <= FEW_ROWS {
        FEW
    } else {
        FORWARD
    };
    let (tall, wide) = tile.over(m, n);
    let grid = if m <= FEW_ROWS { Dim::from((wide, tall)) } else { Dim::from(tall * wide) };
    let launch = y
        .gpu()
        .launch(tile.kernel, grid, tile.threads)
        .shared(tile.shared)
        .buffer(y)
        .buffer(x)
        .buffer(w)
        .optional(bias)
        .optional(low)
        .optional(lora.map(|lora| lora.b))
        .int(m)
        .int(n)
        .int(k)
        .int(lora.map_or(0, |lora| lora.rank))
        .float(lora.map_or(1.0, |lora| lora.scale))
        .int(usize::from(add));
    // SAFETY: the arguments of the three forward kernels, which are the same, in their order; all lengths have been
    // asserted here and in `project`, and with rank 0 neither low nor B is touched.
    unsafe { launch.run() }
}

/// y of [`forward`], by warpgroups and tensor copies.
fn forward_hopper(
    y: &mut Buffer<bf16>,
    x: &Buffer<bf16>,
    w: &Buffer<bf16>,
    bias: Option<&Buffer<f32>>,
    lora: Option<(Lora<'_>, &Buffer<bf16>)>,
    Dims { m, n, k }: Dims,
    add: bool,
) -> Result<(), Problem> {
    let gpu = y.gpu();
    let tile = FORWARD_HOPPER;
    let map = |matrix: &Buffer<bf16>, rows, cols, tile_rows| gpu.tensor_map(matrix, &[rows, cols], &[tile_rows, 64]);
    let (x_map, w_map) = (map(x, m, k, tile.rows)?, map(w, n, k, tile.cols)?);
    let (low_map, b_map) = match lora {
        Some((lora, low)) => (map(low, m, lora.rank, tile.rows)?, map(lora.b, n, lora.rank, tile.cols)?),
        None => (x_map, w_map),
    };
    let (tall, wide) = tile.over(m, n);
    let launch = gpu
        .launch(tile.kernel, tall * wide, tile.threads)
        .shared(tile.shared)
        .buffer(y)
        .map(x_map)
        .map(w_map)
        .optional(bias)
        .map(low_map)
        .map(b_map)
        .int(m)
        .int(n)
        .int(k)
        .int(lora.map_or(0, |(lora, _)| lora.rank))
        .float(lora.map_or(1.0, |(lora, _)| lora.scale))
        .int(usize::from(add));
    // SAFETY: the arguments of `lora_matmul_forward_hopper` in their order; lengths are asserted by the caller, those of
    // the maps as they are made, and with rank 0 the last two are not used.
    unsafe { launch.run() }
}

/// low [m, rank] = x A^T.
fn project(low: &mut Buffer<bf16>, x: &Buffer<bf16>, lora: Lora<'_>, dims: Dims) -> Result<(), Problem> {
    let Dims { m, k, .. } = dims;
    lora.check(dims);
    assert_eq!(low.len(), m * lora.rank);
    let launch = low
        .gpu()
        .launch(LOW.kernel, LOW.over(m, lora.rank), LOW.threads)
        .shared(LOW.shared)
        .buffer(low)
        .buffer(x)
        .buffer(lora.a)
        .int(m)
        .int(k)
        .int(lora.rank);
    // SAFETY: the arguments of `lora_matmul_low` in their order; low and A have been asserted here, x by the caller.
    unsafe { launch.run() }
}

/// dx [m, k] = (or += where it says so) dy W + dlow A, with dlow = scale dy B; and, for the adapter, da [rank, k] +=
/// dlow^T x and db [n, rank] += scale dy^T low. dy [m, n]; x and `low` are those of the forward pass. The weight is
/// frozen: for its gradient there is [`weight_gradient`].
///
/// `grads` need an adapter and its `low`; with rank 0 there is nothing to add to them.
#[expect(clippy::too_many_arguments, reason = "gradients, what the forward pass was given, and sizes")]
pub fn backward(
    dx: Option<(&mut Buffer<bf16>, bool)>,
    grads: Option<Gradients<'_>>,
    dy: &Buffer<bf16>,
    x: &Buffer<bf16>,
    low: Option<&Buffer<bf16>>,
    w: &Buffer<bf16>,
    lora: Option<Lora<'_>>,
    dims: Dims,
) -> Result<(), Problem> {
    let Dims { m, n, k } = dims;
    dims.check();
    assert!(dy.len() == m * n && x.len() == m * k && w.len() == n * k, "{dims:?}");
    assert!(grads.is_none() || lora.is_some(), "gradients of an adapter that is not there");
    let lora = lora.filter(|lora| lora.rank > 0);
    if let Some(lora) = &lora {
        lora.check(dims);
    }

    let dlow = match lora {
        Some(lora) if dx.is_some() || grads.is_some() => Some(project_back(dy, lora, dims)?),
        _ => None,
    };

    if let Some((dx, add)) = dx {
        assert_eq!(dx.len(), m * k);
        input_gradient(dx, dy, w, lora.zip(dlow.as_ref()), dims, add)?;
    }

    if let (Some(Gradients { da, db }), Some(lora), Some(dlow)) = (grads, lora, &dlow) {
        let low = low.expect("the gradient of B needs the forward pass's low");
        assert_eq!(low.len(), m * lora.rank);
        factor_gradient(da, dlow, x, m, (lora.rank, k), 1.0)?;
        factor_gradient(db, dy, low, m, (n, lora.rank), lora.scale)?;
    }
    Ok(())
}

/// dx of [`backward`]. Which kernel it is depends on n, k and rank, not on m: a row has the same bits in any batch.
fn input_gradient(
    dx: &mut Buffer<bf16>,
    dy: &Buffer<bf16>,
    w: &Buffer<bf16>,
    lora: Option<(Lora<'_>, &Buffer<bf16>)>,
    Dims { m, n, k }: Dims,
    add: bool,
) -> Result<(), Problem> {
    let (gpu, rank) = (dx.gpu(), lora.map_or(0, |(lora, _)| lora.rank));
    let by_warpgroups =
        gpu.has_wgmma() && [n, k].into_iter().all(copies_rows_of) && (rank == 0 || copies_rows_of(rank));
    let tile = if by_warpgroups { DX_HOPPER } else { DX };
    let (tall, wide) = tile.over(m, k);
    let launch = gpu.launch(tile.kernel, tall * wide, tile.threads).shared(tile.shared).buffer(dx);
    let launch = if by_warpgroups {
        let dy_map = gpu.tensor_map(dy, &[m, n], &[tile.rows, 64])?;
        let w_map = gpu.tensor_map(w, &[n, k], &[64, 64])?;
        let (dlow_map, a_map) = match lora {
            Some((lora, dlow)) => {
                (gpu.tensor_map(dlow, &[m, rank], &[tile.rows, 64])?, gpu.tensor_map(lora.a, &[rank, k], &[64, 64])?)
            }
            None => (dy_map, w_map),
        };
        launch.map(dy_map).map(w_map).map(dlow_map).map(a_map)
    } else {
        launch.buffer(dy).buffer(w).optional(lora.map(|(_, dlow)| dlow)).optional(lora.map(|(lora, _)| lora.a))
    };
    let launch = launch.int(m).int(n).int(k).int(rank).int(usize::from(add));
    // SAFETY: the arguments of `lora_matmul_dx` or `lora_matmul_dx_hopper`, which differ in maps for pointers, in their
    // order; lengths asserted by the caller, and with rank 0 neither dlow nor A is touched.
    unsafe { launch.run() }
}

/// dlow [m, rank] = scale dy B.
fn project_back(dy: &Buffer<bf16>, lora: Lora<'_>, dims: Dims) -> Result<Buffer<bf16>, Problem> {
    let Dims { m, n, .. } = dims;
    let gpu: &Gpu = dy.gpu();
    let dlow = gpu.alloc(m * lora.rank)?;
    let launch = gpu
        .launch(DLOW.kernel, DLOW.over(m, lora.rank), DLOW.threads)
        .shared(DLOW.shared)
        .buffer(&dlow)
        .buffer(dy)
        .buffer(lora.b)
        .int(m)
        .int(n)
        .int(lora.rank)
        .float(lora.scale);
    // SAFETY: the arguments of `lora_matmul_dlow` in their order; dlow is as long as it says, dy and B have been
    // asserted by the caller.
    unsafe { launch.run()? };
    Ok(dlow)
}

/// out [rows, cols] += scale p^T q, of p [m, rows] and q [m, cols]. Parts of m are summed by blocks of their own, then
/// added up in ascending order.
fn factor_gradient(
    out: &mut Buffer<f32>,
    p: &Buffer<bf16>,
    q: &Buffer<bf16>,
    m: usize,
    (rows, cols): (usize, usize),
    scale: f32,
) -> Result<(), Problem> {
    assert!(out.len() == rows * cols && p.len() == m * rows && q.len() == m * cols);
    let gpu = out.gpu();
    let length = part_rows(m);
    let parts = gradient_parts(m);
    let partial = gpu.alloc::<f32>(parts * rows * cols)?;
    let (tall, wide) = FACTOR.over(rows, cols);
    let launch = gpu
        .launch(FACTOR.kernel, (tall * wide, parts), FACTOR.threads)
        .shared(FACTOR.shared)
        .buffer(&partial)
        .buffer(p)
        .buffer(q)
        .int(m)
        .int(rows)
        .int(cols)
        .int(length);
    // SAFETY: the arguments of `lora_matmul_factor` in their order; lengths asserted, `partial` has a [rows, cols] for
    // each of the grid's parts, and `length` is a multiple of 32.
    unsafe { launch.run()? };

    let launch = gpu
        .launch("lora_matmul_reduce", (rows * cols).div_ceil(256), 256usize)
        .buffer(out)
        .buffer(&partial)
        .int(parts)
        .int(rows)
        .int(cols)
        .float(scale);
    // SAFETY: the arguments of `lora_matmul_reduce` in their order, lengths as above.
    unsafe { launch.run() }
}

/// dw [n, k] += dy^T x, of dy [m, n] and x [m, k]: the gradient of a weight that is not frozen.
pub fn weight_gradient(dw: &mut Buffer<f32>, dy: &Buffer<bf16>, x: &Buffer<bf16>, dims: Dims) -> Result<(), Problem> {
    let Dims { m, n, k } = dims;
    dims.check();
    assert!(dw.len() == n * k && dy.len() == m * n && x.len() == m * k, "{dims:?}");
    let (tall, wide) = DW.over(n, k);
    let launch = dw
        .gpu()
        .launch(DW.kernel, tall * wide, DW.threads)
        .shared(DW.shared)
        .buffer(dw)
        .buffer(dy)
        .buffer(x)
        .int(m)
        .int(n)
        .int(k);
    // SAFETY: the arguments of `lora_matmul_dw` in their order, with lengths asserted above.
    unsafe { launch.run() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_rows_and_are_few() {
        for m in [1, 31, 32, 511, 512, 513, 8191, 8192, 8193, 100_000] {
            let rows = part_rows(m);
            assert!(rows.is_multiple_of(32) && m.div_ceil(rows) <= PARTS, "{m}: {rows}");
            assert!(rows * m.div_ceil(rows) >= m);
        }
    }
}
