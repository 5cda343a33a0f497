//! Matrix products: with frozen weights kept in the layout of the kernels, and of plain slices.
//!
//! The law of every product here: each element of the result is ONE chain of fused multiply-adds
//! over the summed index in ascending order, from zero or, with `add`, from what was there. So a
//! row of a result does not depend on the rows computed with it, on the number of threads or, in
//! f32, on the instruction set. With bf16 weights the other operand is rounded to bf16 too, and
//! products go in ascending pairs, summed in f32.
//!
//! Small products run on the calling thread, large ones on rayon's current pool.

mod drive;
mod kernels;
mod pack;

use super::Isa;
use drive::{FEW_ROWS, Left, Panels, Product, Right};
use half::bf16;
use kernels::NR;
use pack::{Line, lines};
use rayon::prelude::*;
use std::ops::Range;

/// How frozen weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// Four bytes a value.
    F32,
    /// Two bytes a value: the upper half of an f32.
    Bf16,
}

impl Dtype {
    /// The word manifests and messages use.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
        }
    }
}

/// A weight W [n, k] (n outputs, k inputs), stored once, packed for products.
///
/// Layout: panels of 32 outputs, `[panel][k][32]` in f32 or `[panel][k / 2][32][2]` in bf16, the
/// last panel and an odd last k filled up with zeros.
#[derive(Clone)]
pub struct Matrix {
    n: usize,
    k: usize,
    dtype: Dtype,
    lines: Vec<Line>,
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Matrix[{}, {}] {}", self.n, self.k, self.dtype.name())
    }
}

impl Matrix {
    /// From row-major `w` [n, k]; rounds to nearest, ties to even, when `dtype` is bf16.
    pub fn pack(w: &[f32], n: usize, k: usize, dtype: Dtype) -> Matrix {
        let mut matrix = Matrix::zero(n, k, dtype);
        matrix.repack(w);
        matrix
    }

    /// From row-major bf16 `w` [n, k], stored as it is.
    pub fn pack_bf16(w: &[bf16], n: usize, k: usize) -> Matrix {
        assert_eq!(w.len(), n * k);
        let mut matrix = Matrix::zero(n, k, Dtype::Bf16);
        matrix.fill(|to, first, rows| {
            for (i, to) in to.chunks_exact_mut(k.div_ceil(2)).take(rows).enumerate() {
                let from = &w[(first + i) * k..][..k];
                for (to, pair) in to.iter_mut().zip(from.chunks(2)) {
                    let high = pair.get(1).map_or(0, |x| u32::from(x.to_bits()));
                    *to = u32::from(pair[0].to_bits()) | high << 16;
                }
            }
        });
        matrix
    }

    fn zero(n: usize, k: usize, dtype: Dtype) -> Matrix {
        let steps = if dtype == Dtype::Bf16 { k.div_ceil(2) } else { k };
        Matrix { n, k, dtype, lines: lines(n.div_ceil(NR) * NR * steps) }
    }

    /// New values for all elements, from row-major `w` [n, k].
    pub fn repack(&mut self, w: &[f32]) {
        assert_eq!(w.len(), self.n * self.k);
        let (k, dtype, isa) = (self.k, self.dtype, Isa::best());
        self.fill(|to, first, rows| {
            let from = w[first * k..][..rows * k].chunks_exact(k);
            match dtype {
                Dtype::F32 => to[..rows * k].copy_from_slice(bytemuck::cast_slice(&w[first * k..][..rows * k])),
                Dtype::Bf16 => {
                    for (to, from) in to.chunks_exact_mut(k.div_ceil(2)).zip(from) {
                        pack::pair_slowly(isa, to, from);
                    }
                }
            }
        });
    }

    /// Lets `rows_of(to, first, rows)` write the words of some rows, and turns them into a panel.
    fn fill(&mut self, rows_of: impl Fn(&mut [u32], usize, usize) + Sync) {
        let (n, steps, isa) = (self.n, self.steps(), Isa::best());
        if steps == 0 {
            return;
        }
        let words: &mut [u32] = bytemuck::cast_slice_mut(&mut self.lines);
        words.par_chunks_exact_mut(steps * NR).enumerate().for_each_init(
            || vec![0u32; steps * NR],
            |plain, (panel, to)| {
                let rows = NR.min(n - panel * NR);
                rows_of(plain, panel * NR, rows);
                // SAFETY: `plain` holds `rows` rows of `steps` words, `to` `steps` rows of NR.
                unsafe { pack::transpose(isa, (to.as_mut_ptr(), NR), (plain.as_ptr(), steps), rows, steps) };
            },
        );
    }

    /// Row-major values [n, k], widened when they are bf16.
    pub fn unpack(&self) -> Vec<f32> {
        let mut all = vec![0.0; self.n * self.k];
        if self.k > 0 {
            all.par_chunks_exact_mut(self.k).enumerate().for_each(|(i, row)| self.row(i, row));
        }
        all
    }

    /// Copies row `i` (the weights of one output) into `out` \[k\].
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n, "row {i} of a matrix with {} rows", self.n);
        assert_eq!(out.len(), self.k);
        let words = &self.words()[i / NR * NR * self.steps()..];
        let column = words.iter().skip(i % NR).step_by(NR);
        match self.dtype {
            Dtype::F32 => {
                for (out, word) in out.iter_mut().zip(column) {
                    *out = f32::from_bits(*word);
                }
            }
            Dtype::Bf16 => {
                for (out, word) in out.chunks_mut(2).zip(column) {
                    out[0] = f32::from_bits(word << 16);
                    if let Some(second) = out.get_mut(1) {
                        *second = f32::from_bits(word & 0xffff_0000);
                    }
                }
            }
        }
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// How its values are stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Memory held, with padding.
    pub fn bytes(&self) -> usize {
        std::mem::size_of_val(&self.lines[..])
    }

    /// Words of one row.
    fn steps(&self) -> usize {
        match self.dtype {
            Dtype::F32 => self.k,
            Dtype::Bf16 => self.k.div_ceil(2),
        }
    }

    fn words(&self) -> &[u32] {
        bytemuck::cast_slice(&self.lines)
    }

    /// The panels of some rows, which start at a multiple of 32.
    fn panels(&self, rows: &Range<usize>) -> Panels<'_> {
        assert!(rows.start.is_multiple_of(NR) && rows.end <= self.n, "rows {rows:?} of {self:?}");
        Panels {
            words: &self.words()[rows.start * self.steps()..],
            steps: self.steps(),
            bf16: self.dtype == Dtype::Bf16,
        }
    }
}

/// y[m, n] = x[m, k] Wᵀ, or += with `add`.
pub fn linear(y: &mut [f32], x: &[f32], m: usize, w: &Matrix, add: bool) {
    linear_rows(Isa::best(), y, x, m, w, 0..w.n, add);
}

/// y[m, n] = x[m, k] Wᵀ for several matrices and one x. Few rows, which wait for the weights, wait for all together.
pub fn linears(products: &mut [(&mut [f32], &Matrix)], x: &[f32], m: usize) {
    let alike = products.windows(2).all(|two| (two[0].1.k, two[0].1.dtype) == (two[1].1.k, two[1].1.dtype));
    if m > FEW_ROWS || !alike {
        return products.iter_mut().for_each(|(y, w)| linear(y, x, m, w, false));
    }
    linears_on(Isa::best(), products, x, m);
}

/// [`linears`] of at most [`FEW_ROWS`] rows and matrices with the same inputs and dtype.
fn linears_on(isa: Isa, products: &mut [(&mut [f32], &Matrix)], x: &[f32], m: usize) {
    let products = products.iter_mut().map(|(y, w)| product(isa, y, x, m, w, 0..w.n, false).into(y));
    drive::run_few(&products.collect::<Vec<_>>());
}

/// dx[m, k] = dy[m, n] W, or += with `add`.
pub fn linear_backward(dx: &mut [f32], dy: &[f32], m: usize, w: &Matrix, add: bool) {
    linear_backward_rows(Isa::best(), dx, dy, m, w, 0..w.n, add);
}

/// [`linear`] with some rows of W only, which start at a multiple of 32: y is [m, rows.len()].
pub(crate) fn linear_rows(isa: Isa, y: &mut [f32], x: &[f32], m: usize, w: &Matrix, rows: Range<usize>, add: bool) {
    product(isa, y, x, m, w, rows, add).run(y);
}

fn product<'a>(
    isa: Isa,
    y: &[f32],
    x: &'a [f32],
    m: usize,
    w: &'a Matrix,
    rows: Range<usize>,
    add: bool,
) -> Product<'a> {
    let (n, k) = (rows.len(), w.k);
    assert_eq!((y.len(), x.len()), (m * n, m * k), "sizes of y and x for {m} rows of {w:?}");
    let left = Left { data: x, row: k, column: 1, factor: 1.0 };
    Product { isa, m, n, k, left, right: Right::Panels(w.panels(&rows)), c_stride: n, add }
}

/// [`linear_backward`] with some rows of W only, which start at a multiple of 32: dy is [m, rows.len()].
pub(crate) fn linear_backward_rows(
    isa: Isa,
    dx: &mut [f32],
    dy: &[f32],
    m: usize,
    w: &Matrix,
    rows: Range<usize>,
    add: bool,
) {
    let (n, k) = (rows.len(), w.k);
    assert_eq!((dx.len(), dy.len()), (m * k, m * n), "sizes of dx and dy for {m} rows of {w:?}");
    let left = Left { data: dy, row: n, column: 1, factor: 1.0 };
    Product { isa, m, n: k, k: n, left, right: Right::Turned(w.panels(&rows)), c_stride: k, add }.run(dx);
}

/// c[m, n] = alpha op(a) op(b), or += with `add`; all row-major f32.
///
/// op(a) [m, k] is `a` as stored, or, with `ta`, the transpose of the stored [k, m]; op(b) [k, n]
/// likewise, stored [n, k] with `tb`. `alpha` is multiplied into the elements of `a` first.
#[expect(clippy::too_many_arguments, reason = "the operands of a product, in the order everybody knows from BLAS")]
pub fn gemm(
    c: &mut [f32],
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: &[f32],
    ta: bool,
    b: &[f32],
    tb: bool,
    add: bool,
) {
    assert_eq!((c.len(), a.len(), b.len()), (m * n, m * k, k * n), "sizes of c, a and b for {m} x {n} x {k}");
    let (row, column) = if ta { (1, m) } else { (k, 1) };
    let left = Left { data: a, row, column, factor: alpha };
    let (row, column) = if tb { (1, k) } else { (n, 1) };
    let right = Right::Plain { data: b, row, column };
    Product { isa: Isa::best(), m, n, k, left, right, c_stride: n, add }.run(c);
}

/// A matrix inside a larger one: rows `stride` apart, read across (`turned`: down) its elements.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a> {
    /// The values.
    pub data: &'a [f32],
    /// From one row, as stored, to the next.
    pub stride: usize,
    /// Whether it is read with rows and columns exchanged.
    pub turned: bool,
}

/// c[m, n] = alpha a b, or += with `add`, for blocks of larger matrices and on the calling thread:
/// the building stone of operations that are parallel themselves. Same law as [`gemm`].
pub(crate) fn gemm_here(
    isa: Isa,
    (c, c_stride): (&mut [f32], usize),
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    a: Block,
    b: Block,
    add: bool,
) {
    let (row, column) = if a.turned { (1, a.stride) } else { (a.stride, 1) };
    let left = Left { data: a.data, row, column, factor: alpha };
    let (row, column) = if b.turned { (1, b.stride) } else { (b.stride, 1) };
    let right = Right::Plain { data: b.data, row, column };
    Product { isa, m, n, k, left, right, c_stride, add }.run_here(c);
}

#[cfg(test)]
mod tests;
