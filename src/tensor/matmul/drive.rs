//! How a product is cut up: into tasks for threads, blocks for caches, tiles for registers.
//!
//! No cut changes a result: sums go on through C from block to block in ascending order, and every
//! element of C belongs to one task.

use super::kernels::{self, NR, Tile, Words};
use super::pack::{self, Line, lines};
use crate::tensor::Isa;
use rayon::prelude::*;
use std::cell::Cell;

/// Summed words per block: a right panel of this length is 128 KiB and stays in the L2 cache while
/// the rows of a block pass by it.
const BLOCK_STEPS: usize = 1024;
/// Words of the left operand per block of rows: with the right panel, half of a 1 MiB L2.
const LEFT_WORDS: usize = 96 * 1024;
/// Words of the right operand per group of panels: read from memory once, then from the L3 cache
/// by every block of rows.
const RIGHT_WORDS: usize = 256 * 1024;
/// Rows of the left operand that are packed at once.
const LEFT_ROWS: usize = 1024;
/// Below this many multiply-adds a product runs on the calling thread, and no task has fewer.
const SERIAL: usize = 512 * 1024;

/// Up to this many rows a product with stored panels waits for the memory they come from (or nearly).
pub(super) const FEW_ROWS: usize = 32;
/// Words of panels per task of such a product: what one core reads in the time of some hand-overs.
const FEW_WORDS: usize = 64 * 1024;

/// Element (i, p) is `data[i * row + p * column]`, times `factor`. One of the strides is 1.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    /// The values.
    pub data: &'a [f32],
    /// From one row to the next.
    pub row: usize,
    /// From one column to the next.
    pub column: usize,
    /// What each value is multiplied by.
    pub factor: f32,
}

/// The right operand, R columns by P summed elements.
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    /// Panels of a matrix [columns, summed].
    Panels(Panels<'a>),
    /// Panels of a matrix [summed, columns].
    Turned(Panels<'a>),
    /// Element (p, j) is `data[p * row + j * column]`. One of the strides is 1.
    Plain { data: &'a [f32], row: usize, column: usize },
}

/// Panels of a stored matrix: `[panel][steps][NR]` words; rows beyond the last one are zero.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    /// The packed values.
    pub words: &'a [u32],
    /// Words of one row: k, or half of it (rounded up) for bf16.
    pub steps: usize,
    /// Whether a word holds two bf16, in place of one f32.
    pub bf16: bool,
}

/// c[m, n] (= or +=) left[m, k] right[k, n].
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    /// The instructions it is computed with.
    pub isa: Isa,
    /// Rows of the result.
    pub m: usize,
    /// Its columns.
    pub n: usize,
    /// The length of the sums.
    pub k: usize,
    /// The first factor.
    pub left: Left<'a>,
    /// The second factor.
    pub right: Right<'a>,
    /// From one row of the result to the next.
    pub c_stride: usize,
    /// Whether the product is added to what is there.
    pub add: bool,
}

/// C, shared by tasks that write disjoint parts.
#[derive(Clone, Copy)]
pub(super) struct Out(*mut f32);
// SAFETY: tasks get disjoint rectangles of C, and C is borrowed exclusively while they run.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// The left operand packed beforehand, for all tasks: rows a stride apart.
type Packed<'a> = Option<(&'a [u32], usize)>;

/// A rectangle of C.
#[derive(Clone, Copy)]
struct Part {
    row: usize,
    rows: usize,
    column: usize,
    columns: usize,
}

thread_local! {
    /// Kept between calls: fresh memory of this size would be mapped and zeroed by the system each time.
    static SCRATCH: Cell<(Vec<Line>, Vec<Line>)> = const { Cell::new((Vec::new(), Vec::new())) };
}

impl Product<'_> {
    /// Computes on as many threads as pay; `c` must hold `m` rows `c_stride` apart.
    pub(super) fn run(&self, c: &mut [f32]) {
        self.check(c);
        if let Right::Panels(_) = self.right
            && self.m <= FEW_ROWS
        {
            return run_few(&[(*self, Out(c.as_mut_ptr()))]);
        }
        let threads = rayon::current_num_threads();
        let (row_tasks, column_tasks) = self.tasks(threads);
        let out = Out(c.as_mut_ptr());
        let rows = split(self.m, row_tasks, kernels::tile_rows(self.isa));
        let columns = split(self.n, column_tasks, NR);
        if rows.len() * columns.len() <= 1 {
            return self.part(out, Part { row: 0, rows: self.m, column: 0, columns: self.n });
        }
        (0..rows.len() * columns.len()).into_par_iter().with_max_len(1).for_each(|task| {
            let ((row, rows), (column, columns)) = (rows[task % rows.len()], columns[task / rows.len()]);
            self.part(out, Part { row, rows, column, columns });
        });
    }

    /// The same on the calling thread, for use inside other tasks.
    pub(super) fn run_here(&self, c: &mut [f32]) {
        self.check(c);
        self.part(Out(c.as_mut_ptr()), Part { row: 0, rows: self.m, column: 0, columns: self.n });
    }

    /// This product with its result, for [`run_few`].
    pub(super) fn into(self, c: &mut [f32]) -> (Self, Out) {
        self.check(c);
        (self, Out(c.as_mut_ptr()))
    }

    /// Everything the unsafe code below relies on.
    fn check(&self, c: &[f32]) {
        let holds = |len: usize, rows: usize, row: usize, columns: usize, column: usize| {
            rows == 0 || columns == 0 || (rows - 1) * row + (columns - 1) * column < len
        };
        assert!(holds(c.len(), self.m, self.c_stride, self.n, 1), "the result is too small");
        assert!(self.c_stride >= self.n || self.m <= 1, "rows of the result overlap");
        assert!(
            holds(self.left.data.len(), self.m, self.left.row, self.k, self.left.column),
            "the left operand is too small"
        );
        let panels = |panels: &Panels, rows: usize, k: usize| {
            let steps = if panels.bf16 { k.div_ceil(2) } else { k };
            steps == panels.steps && panels.words.len() >= rows.div_ceil(NR) * panels.steps * NR
        };
        assert!(
            match &self.right {
                Right::Panels(w) => panels(w, self.n, self.k),
                Right::Turned(w) => panels(w, self.k, self.n),
                Right::Plain { data, row, column } => holds(data.len(), self.k, *row, self.n, *column),
            },
            "the right operand is too small"
        );
    }

    /// Rows and columns of the grid of tasks.
    fn tasks(&self, threads: usize) -> (usize, usize) {
        let work = self.m * self.n * self.k;
        if threads <= 1 || work < 2 * SERIAL {
            return (1, 1);
        }
        let wanted =
            (work / SERIAL).clamp(1, threads * 2).next_multiple_of(if work / SERIAL >= threads { threads } else { 1 });
        // Cutting columns packs the left operand again in each task, cutting rows the right one.
        let columns = (self.n / 128).clamp(1, wanted);
        let rows = (wanted.div_ceil(columns)).min(self.m.div_ceil(48)).max(1);
        let columns = wanted.div_ceil(rows).min(self.n.div_ceil(NR)).max(1);
        (rows, columns)
    }

    /// Words of the summed dimension.
    fn steps(&self) -> usize {
        if self.words() == Words::F32 { self.k } else { self.k.div_ceil(2) }
    }

    fn words(&self) -> Words {
        match self.right {
            Right::Panels(w) | Right::Turned(w) if w.bf16 => match self.isa {
                Isa::Avx512Bf16 => Words::PairsByPairs,
                _ => Words::F32ByPairs,
            },
            _ => Words::F32,
        }
    }

    /// One rectangle of C, on this thread. Its first column is a multiple of NR.
    fn part(&self, out: Out, part: Part) {
        let (mut left_lines, mut right_lines) = SCRATCH.take();
        self.part_in(out, part, None, &mut left_lines, &mut right_lines);
        SCRATCH.set((left_lines, right_lines));
    }

    fn part_in(&self, out: Out, part: Part, packed: Packed, left_lines: &mut Vec<Line>, right_lines: &mut Vec<Line>) {
        if part.rows == 0 || part.columns == 0 {
            return;
        }
        let steps = self.steps();
        if steps == 0 {
            if !self.add {
                for i in part.row..part.row + part.rows {
                    // SAFETY: the row lies in C, see `check`, and in this part only.
                    unsafe { out.at(i * self.c_stride + part.column).write_bytes(0, part.columns) };
                }
            }
            return;
        }
        let blocks = steps.div_ceil(BLOCK_STEPS);
        let block_steps = steps.div_ceil(blocks).next_multiple_of(NR);
        let mut first = 0;
        while first < steps {
            let count = block_steps.min(steps - first);
            self.block(out, part, packed, (first, count), left_lines, right_lines);
            first += count;
        }
    }

    /// Adds `count` steps from `first` on to one rectangle of C.
    fn block(
        &self,
        out: Out,
        part: Part,
        packed: Packed,
        (first, count): (usize, usize),
        left_lines: &mut Vec<Line>,
        right_lines: &mut Vec<Line>,
    ) {
        let words = self.words();
        let tile_rows = kernels::tile_rows(self.isa);
        // A stride that is no multiple of a page, or the rows would evict one another.
        let packed_stride = packed_stride(words, count);
        let group_columns = (RIGHT_WORDS / count.next_multiple_of(NR) / NR * NR).max(NR);
        let block_rows = (LEFT_WORDS / packed_stride / tile_rows * tile_rows).max(tile_rows);
        let panel_stride = match self.right {
            Right::Panels(w) => w.steps * NR,
            _ => count.next_multiple_of(NR) * NR,
        };

        for (row, rows) in chunks(part.row, part.rows, LEFT_ROWS / tile_rows * tile_rows) {
            let (left, left_stride) = if let Some((left, stride)) = packed {
                (left[row * stride + per_step(words) * first..].as_ptr(), stride)
            } else if self.left_lies_well(words) {
                (self.left.data[row * self.left.row + first..].as_ptr().cast(), self.left.row)
            } else {
                self.pack_left(left_lines, packed_stride, words, (row, rows), (first, count));
                (left_lines.as_ptr().cast::<u32>(), packed_stride)
            };
            for (column, columns) in chunks(part.column, part.columns, group_columns) {
                let right = match &self.right {
                    Right::Panels(w) => w.words[column / NR * panel_stride + first * NR..].as_ptr(),
                    right => {
                        self.pack_right(right, right_lines, panel_stride, (column, columns), (first, count));
                        right_lines.as_ptr().cast::<u32>()
                    }
                };
                for (block, height) in chunks(row, rows, block_rows) {
                    // SAFETY: both operands were packed for these sizes (or checked, where they
                    // are used as they lie), and the rectangle of C belongs to this task.
                    unsafe {
                        let tile = Tile {
                            steps: count,
                            left: left.add((block - row) * left_stride),
                            left_stride,
                            right,
                            panel_stride,
                            c: out.at(block * self.c_stride + column),
                            c_stride: self.c_stride,
                            fresh: first == 0 && !self.add,
                        };
                        self.tiles(words, height, columns, &tile);
                    }
                }
            }
        }
    }

    /// All tiles of one packed block.
    ///
    /// # Safety
    /// `all` must describe operands and a part of C of `rows` by `columns`.
    unsafe fn tiles(&self, words: Words, rows: usize, columns: usize, all: &Tile) {
        let count = rows.div_ceil(kernels::tile_rows(self.isa));
        let mut column = 0;
        while column < columns {
            let mut panels = 1;
            if count == 1 {
                panels = kernels::tile_panels(self.isa, rows);
                if columns - column < panels * NR {
                    panels = 1;
                }
            }
            let width = (columns - column).min(panels * NR);
            // SAFETY: inside what the caller described.
            let right = unsafe { all.right.add(column / NR * all.panel_stride) };
            let mut row = 0;
            for index in 0..count {
                // Tiles of nearly equal height: a last one of a single row would be slow.
                let height = (rows - row).div_ceil(count - index);
                // SAFETY: as above; a tile that would reach over the edge goes through a copy.
                unsafe {
                    let c = all.c.add(row * all.c_stride + column);
                    let tile = Tile { left: all.left.add(row * all.left_stride), right, c, ..*all };
                    let narrow = width <= NR / 2;
                    if width == panels * NR || width == NR / 2 {
                        kernels::run(self.isa, words, height, panels, narrow, &tile);
                    } else {
                        let mut copy = [0.0f32; 12 * NR];
                        for i in 0..height {
                            if !tile.fresh {
                                copy.as_mut_ptr().add(i * NR).copy_from_nonoverlapping(c.add(i * all.c_stride), width);
                            }
                        }
                        let edge = Tile { c: copy.as_mut_ptr(), c_stride: NR, ..tile };
                        kernels::run(self.isa, words, height, 1, narrow, &edge);
                        for i in 0..height {
                            c.add(i * all.c_stride).copy_from_nonoverlapping(copy.as_ptr().add(i * NR), width);
                        }
                    }
                }
                row += height;
            }
            column += width;
        }
    }

    /// Whether the kernels can read the left operand where it is: f32 in rows, whose distance does
    /// not put all rows of a tile into the same few sets of a cache.
    fn left_lies_well(&self, words: Words) -> bool {
        let Left { row, column, factor, .. } = self.left;
        words == Words::F32 && column == 1 && factor == 1.0 && (row % 256 != 0 || self.m <= 2)
    }

    fn pack_left(
        &self,
        to: &mut Vec<Line>,
        stride: usize,
        words: Words,
        (row, rows): (usize, usize),
        (first, count): (usize, usize),
    ) {
        let to = room(to, rows * stride);
        let Left { data, row: row_stride, column: column_stride, factor } = self.left;
        if words == Words::F32 && column_stride != 1 {
            let from = &data[row * row_stride + first * column_stride..];
            // SAFETY: `check` saw that the last element of the block lies in `data`; `to` has room for `rows` rows.
            unsafe {
                let to = (to.as_mut_ptr(), stride);
                if row_stride == 1 {
                    pack::transpose(self.isa, to, (from.as_ptr().cast(), column_stride), count, rows);
                } else {
                    for i in 0..rows {
                        for p in 0..count {
                            *to.0.add(i * stride + p) = from[i * row_stride + p * column_stride].to_bits();
                        }
                    }
                }
            }
            if factor != 1.0 {
                for row in to.chunks_exact_mut(stride) {
                    for word in &mut row[..count] {
                        *word = (f32::from_bits(*word) * factor).to_bits();
                    }
                }
            }
            return;
        }
        let per_step = if words == Words::F32 { 1 } else { 2 };
        let real = (per_step * count).min(self.k - per_step * first);
        for (i, to) in to.chunks_exact_mut(stride).enumerate() {
            let from = &data[(row + i) * row_stride + per_step * first..][..real];
            match words {
                Words::F32 if factor == 1.0 => to[..count].copy_from_slice(bytemuck::cast_slice(from)),
                Words::F32 => pack::scaled_row(self.isa, &mut to[..count], from, factor),
                Words::PairsByPairs => pack::pair_row(self.isa, &mut to[..count], from),
                Words::F32ByPairs => {
                    pack::rounded_row(self.isa, &mut to[..real], from);
                    to[real..2 * count].fill(0);
                }
            }
        }
    }

    fn pack_right(
        &self,
        right: &Right,
        to: &mut Vec<Line>,
        stride: usize,
        (column, columns): (usize, usize),
        (first, count): (usize, usize),
    ) {
        let panels = columns.div_ceil(NR);
        let to = room(to, panels * stride);
        let width = |panel: usize| NR.min(self.n - column - panel * NR);
        match right {
            Right::Panels(_) => unreachable!("panels are used where they lie"),
            Right::Turned(w) => {
                // Summed elements are rows of the matrix now; steps of it are columns. Blocks are
                // the outer loop so that the matrix is read in long runs.
                let per_step = if w.bf16 { 2 } else { 1 };
                let rows_per_block = NR / per_step;
                for block in 0..count.div_ceil(rows_per_block) {
                    let row = (first / rows_per_block + block) * w.steps + column / per_step;
                    for panel in 0..panels {
                        let from = (row + panel * rows_per_block) * NR;
                        let from = &w.words[from..][..width(panel).div_ceil(per_step) * NR];
                        let to = &mut to[panel * stride + block * rows_per_block * NR..][..rows_per_block * NR];
                        // SAFETY: both slices were just cut to the sizes that `turn_panel` names.
                        unsafe { pack::turn_panel(self.isa, to.as_mut_ptr(), from.as_ptr(), width(panel), w.bf16) };
                    }
                }
            }
            Right::Plain { data, row, column: 1 } => {
                for p in 0..count {
                    let from = &data[(first + p) * row + column..][..columns];
                    for (panel, from) in from.chunks(NR).enumerate() {
                        let to = &mut to[panel * stride + p * NR..][..NR];
                        if let Ok(from) = <&[f32; NR]>::try_from(from) {
                            to.copy_from_slice(bytemuck::cast_slice(from));
                        } else {
                            to[..from.len()].copy_from_slice(bytemuck::cast_slice(from));
                            to[from.len()..].fill(0);
                        }
                    }
                }
            }
            Right::Plain { data, row, column: column_stride } => {
                assert!(*row == 1, "one stride of a plain operand is 1");
                for (panel, to) in to.chunks_exact_mut(stride).enumerate() {
                    if width(panel) < NR {
                        to[..count * NR].fill(0);
                    }
                    let from = &data[first + (column + panel * NR) * column_stride..];
                    assert!((width(panel) - 1) * column_stride + count <= from.len());
                    // SAFETY: just asserted for `from`; `to` has `count` rows of NR.
                    unsafe {
                        let from = (from.as_ptr().cast(), *column_stride);
                        pack::transpose(self.isa, (to.as_mut_ptr(), NR), from, width(panel), count);
                    }
                }
            }
        }
    }
}

/// Left words per step.
fn per_step(words: Words) -> usize {
    if words == Words::F32ByPairs { 2 } else { 1 }
}

/// Distance of rows of the packed left operand: no multiple of a page, or the rows would evict one another.
fn packed_stride(words: Words, steps: usize) -> usize {
    (per_step(words) * steps).next_multiple_of(16) + 16
}

/// Products of the same few rows with stored panels, all at once. The left operand is packed once; tasks are cut so
/// that each reads its part of the panels in one go, and none is so long that the others wait for it.
pub(super) fn run_few(products: &[(Product, Out)]) {
    let Some((first, _)) = products.first() else { return };
    let (words, steps) = (first.words(), first.steps());
    let (mut lines, nothing) = SCRATCH.take();
    let stride = packed_stride(words, steps);
    let packed = if first.m == 0 || steps == 0 || first.left_lies_well(words) {
        None
    } else {
        first.pack_left(&mut lines, stride, words, (0, first.m), (0, steps));
        Some((&bytemuck::cast_slice::<Line, u32>(&lines)[..first.m * stride], stride))
    };
    let run = |product: &Product, out: Out, (column, columns): (usize, usize)| {
        let part = Part { row: 0, rows: product.m, column, columns };
        product.part_in(out, part, packed, &mut Vec::new(), &mut Vec::new());
    };
    let threads = rayon::current_num_threads();
    let count = |product: &Product| product.steps() * product.n;
    let all: usize = products.iter().map(|(product, _)| count(product)).sum();
    let tasks = (all / FEW_WORDS).min(16 * threads);
    if threads == 1 || tasks < 2 {
        products.iter().for_each(|(product, out)| run(product, *out, (0, product.n)));
    } else {
        let columns = NR * kernels::tile_panels(first.isa, first.m.max(1));
        let parts = products.iter().flat_map(|(product, out)| {
            let parts = split(product.n, (count(product) * tasks).div_ceil(all), columns);
            parts.into_iter().map(move |part| (product, *out, part))
        });
        let parts: Vec<(&Product, Out, (usize, usize))> = parts.collect();
        parts.into_par_iter().with_max_len(1).for_each(|(product, out, part)| run(product, out, part));
    }
    SCRATCH.set((lines, nothing));
}

/// The first `words` words of a buffer that grows when needed.
fn room(buffer: &mut Vec<Line>, words: usize) -> &mut [u32] {
    if buffer.len() * 16 < words {
        *buffer = lines(words);
    }
    &mut bytemuck::cast_slice_mut(buffer)[..words]
}

/// `(start, length)` of pieces of `len` elements from `start` on, `size` each but the last.
fn chunks(start: usize, len: usize, size: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..len).step_by(size).map(move |at| (start + at, size.min(len - at)))
}

/// `(start, length)` of at most `parts` nearly equal parts of `0..len`, cut at multiples of `unit`.
fn split(len: usize, parts: usize, unit: usize) -> Vec<(usize, usize)> {
    let units = len.div_ceil(unit);
    let parts = parts.min(units).max(1);
    (0..parts)
        .map(|i| {
            let (start, end) = (units * i / parts * unit, (units * (i + 1) / parts * unit).min(len));
            (start, end - start)
        })
        .collect()
}
