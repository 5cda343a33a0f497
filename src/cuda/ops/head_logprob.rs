//! Launcher of `kernels/head_logprob.cu` and `head_logprob_hopper.cu`: log-probs of targets straight from the last
//! hidden states, and back.
//!
//! Which file's kernels make logits and dh is decided by the device, H and the rank, never by the rows: a row has the
//! same bits in any batch.
//!
//! Scratch memory, with L the rank rounded up to a multiple of 8:
//! - forward: 2 R L bytes, and 12 bytes per row and 1024 entries of the vocabulary, 8 `top_k` more with a list;
//! - backward: slopes of at most 2048 rows x 8192 entries or as many in another shape (32 MiB), and for those
//!   rows H floats once, twice if there is LoRA or more than one span is made at a time (at most 16 KiB x H).

use crate::cuda::{Buffer, Gpu, Launch, TensorMap, copies_rows_of};
use crate::problem::Problem;
use half::bf16;

/// As in the kernels.
const THREADS: usize = 256;
const TILE: usize = 128;
const PIPELINE_BYTES: usize = 3 * 2 * 128 * 32 * 2;
const STRIP_BYTES: usize = 128 * 33 * 4;
const FORWARD_SPAN: usize = 1024;
const BACKWARD_SPAN: usize = 8192;

/// Of the kernels by warpgroups: blocks of `TILE` rows as the others, ...
const WARPGROUPS_THREADS: usize = 384;
/// ... but this many columns, ...
const WARPGROUPS_COLS: usize = 256;
/// ... and of shared memory this many stages of 64 summed indices with their two barriers; three beside lists.
const STAGE_BYTES: usize = (TILE + WARPGROUPS_COLS) * 64 * 2 + 16;
const STAGES: usize = 4;
const STAGES_BESIDE_LISTS: usize = 3;

/// The most rows whose slopes are made at once, and how many rows times spans. No result depends on either, save
/// for sums over rows, which are made `ROWS` at a time.
const ROWS: usize = 2048;

/// The longest list per row.
pub const MOST_TOP: usize = 32;

pub use super::lora_matmul::Lora;

/// Results, one entry per row.
pub struct Forward {
    /// The log-probability of each row's target.
    pub logprob: Buffer<f32>,
    /// The logarithm of the sum of each row's exponentiated logits.
    pub lse: Buffer<f32>,
    /// In nats; if wanted.
    pub entropy: Option<Buffer<f32>>,
    /// Ids and logprobs [R, top_k] of the most likely entries, most likely first, smaller id first among equals;
    /// if wanted. Places that the vocabulary is too small for hold the id `u32::MAX`.
    pub top: Option<(Buffer<u32>, Buffer<f32>)>,
}

/// Gradients that are added to (+=), each if it is wanted: dA [r, H] and dB [V, r] together, dW [V, H].
#[derive(Default)]
pub struct Gradients<'a> {
    /// Those of the adapter's A and B, added to.
    pub lora: Option<(&'a mut Buffer<f32>, &'a mut Buffer<f32>)>,
    /// That of the matrix itself, added to.
    pub weight: Option<&'a mut Buffer<f32>>,
}

/// What both passes read.
#[derive(Clone, Copy)]
struct Head<'a> {
    h: &'a Buffer<bf16>,
    w: &'a Buffer<bf16>,
    lora: Option<Lora<'a>>,
    targets: &'a Buffer<u32>,
    rows: usize,
    vocabulary: usize,
    hidden: usize,
}

/// logprob and lse of h [R, H] (normed rows) for `targets` \[R\] under W [V, H] and `lora`; entropy and the `top_k` most
/// likely entries (at most 32) if wanted. A target that is not below V has logprob NaN.
pub fn forward(
    h: &Buffer<bf16>,
    w: &Buffer<bf16>,
    lora: Option<Lora<'_>>,
    targets: &Buffer<u32>,
    hidden: usize,
    entropy: bool,
    top_k: usize,
) -> Result<Forward, Problem> {
    assert!(top_k <= MOST_TOP, "a list of {top_k} entries per row");
    let head = Head::new(h, w, lora, targets, hidden);
    let (gpu, rows, vocabulary) = (h.gpu(), head.rows, head.vocabulary);
    let result = Forward {
        logprob: gpu.alloc(rows)?,
        lse: gpu.alloc(rows)?,
        entropy: entropy.then(|| gpu.alloc(rows)).transpose()?,
        top: if top_k > 0 { Some((gpu.alloc(rows * top_k)?, gpu.alloc(rows * top_k)?)) } else { None },
    };

    let low = head.low(0..rows)?;
    let spans = vocabulary.div_ceil(FORWARD_SPAN);
    let part = gpu.alloc::<f32>(rows * spans * 3)?;
    let target_logit = gpu.alloc::<f32>(rows)?;
    let part_top = if top_k > 0 {
        Some((gpu.alloc::<f32>(rows * spans * top_k)?, gpu.alloc::<u32>(rows * spans * top_k)?))
    } else {
        None
    };

    let by_warpgroups = head.by_warpgroups();
    let (kernel, threads, shared) = match (by_warpgroups, top_k) {
        (false, 0) => ("head_forward", THREADS, PIPELINE_BYTES),
        (false, _) => ("head_forward_top", THREADS, PIPELINE_BYTES + list_bytes(top_k)),
        (true, 0) => ("head_forward_hopper", WARPGROUPS_THREADS, STAGES * STAGE_BYTES),
        (true, _) => {
            ("head_forward_top_hopper", WARPGROUPS_THREADS, STAGES_BESIDE_LISTS * STAGE_BYTES + list_bytes(top_k))
        }
    };
    let mut launch =
        gpu.launch(kernel, (rows.div_ceil(TILE), spans), threads).shared(shared).buffer(&part).buffer(&target_logit);
    if let Some((value, id)) = &part_top {
        launch = launch.buffer(value).buffer(id);
    }
    launch = head.inputs(launch, 0..rows, 0..vocabulary, low.as_ref())?;
    launch = launch.buffer(targets).int(rows).int(vocabulary).int(hidden).int(head.rank());
    if !by_warpgroups {
        launch = launch.int(head.low_stride());
    }
    if top_k > 0 {
        launch = launch.int(top_k);
    }
    // SAFETY: the arguments of the kernel in their order; those by warpgroups have maps in the inputs' places and no
    // stride of low. `Head::new` asserts the sizes of the inputs; `part` and `part_top` have a slot per row and span of
    // the grid. The kernel bounds rows and entries.
    unsafe { launch.run()? };

    let launch = gpu
        .launch("head_finish", rows.div_ceil(THREADS / 32), THREADS)
        .buffer(&result.logprob)
        .buffer(&result.lse)
        .optional(result.entropy.as_ref())
        .optional(result.top.as_ref().map(|(id, _)| id))
        .optional(result.top.as_ref().map(|(_, logprob)| logprob))
        .buffer(&part)
        .buffer(&target_logit)
        .optional(part_top.as_ref().map(|(value, _)| value))
        .optional(part_top.as_ref().map(|(_, id)| id))
        .buffer(targets)
        .int(rows)
        .int(vocabulary)
        .int(spans)
        .int(top_k);
    // SAFETY: the arguments of `head_finish` in their order, buffers of the sizes above; the lists are null only
    // with `top_k` 0, when the kernel does not touch them.
    unsafe { launch.run()? };
    Ok(result)
}

/// dh [R, H] = and what `gradients` asks for +=, from dlogprob \[R\] and the forward's lse \[R\]. The caller leaves out
/// rows that are not learned; a row with dlogprob 0 costs like any other.
#[expect(clippy::too_many_arguments, reason = "the gradients, then the forward's arguments and result")]
pub fn backward(
    dh: &mut Buffer<bf16>,
    mut gradients: Gradients<'_>,
    dlogprob: &Buffer<f32>,
    h: &Buffer<bf16>,
    w: &Buffer<bf16>,
    lora: Option<Lora<'_>>,
    targets: &Buffer<u32>,
    lse: &Buffer<f32>,
    hidden: usize,
) -> Result<(), Problem> {
    let head = Head::new(h, w, lora, targets, hidden);
    assert!(dh.len() == h.len() && dlogprob.len() == head.rows && lse.len() == head.rows);
    assert!(gradients.lora.is_none() || lora.is_some(), "gradients of a LoRA that is not there");
    if let (Some((da, db)), Some(lora)) = (&gradients.lora, &lora) {
        assert!(da.len() == lora.a.len() && db.len() == lora.b.len());
    }
    assert!(gradients.weight.as_ref().is_none_or(|dw| dw.len() == w.len()));

    for first in (0..head.rows).step_by(ROWS) {
        let rows = first..head.rows.min(first + ROWS);
        head.backward_of_rows(dh, &mut gradients, dlogprob, lse, rows)?;
    }
    Ok(())
}

/// A strip of logits, and lists of this many places.
fn list_bytes(top_k: usize) -> usize {
    STRIP_BYTES + top_k * TILE * (size_of::<f32>() + size_of::<u32>())
}

impl<'a> Head<'a> {
    fn new(
        h: &'a Buffer<bf16>,
        w: &'a Buffer<bf16>,
        lora: Option<Lora<'a>>,
        targets: &'a Buffer<u32>,
        hidden: usize,
    ) -> Head<'a> {
        assert!(hidden > 0 && !w.is_empty() && w.len().is_multiple_of(hidden), "{} weights of {hidden}", w.len());
        let (rows, vocabulary) = (targets.len(), w.len() / hidden);
        assert_eq!(h.len(), rows * hidden);
        if let Some(Lora { a, b, rank, .. }) = lora {
            assert!(rank > 0 && rank <= BACKWARD_SPAN && a.len() == rank * hidden && b.len() == vocabulary * rank);
        }
        Head { h, w, lora, targets, rows, vocabulary, hidden }
    }

    fn gpu(&self) -> &'a Gpu {
        self.h.gpu()
    }

    /// 0 without LoRA.
    fn rank(&self) -> usize {
        self.lora.map_or(0, |lora| lora.rank)
    }

    /// Whether logits and dh are made by warpgroups: rows of h, W, low and B must begin where tensor copies can.
    fn by_warpgroups(&self) -> bool {
        // Without rows there is nothing to make a map of, nor to launch.
        let rows_can_be_copied = copies_rows_of(self.hidden) && (self.rank() == 0 || copies_rows_of(self.rank()));
        self.gpu().has_wgmma() && rows_can_be_copied && self.rows > 0
    }

    /// L, so that a row of h Aᵀ starts at a multiple of 16 bytes.
    fn low_stride(&self) -> usize {
        self.rank().next_multiple_of(8)
    }

    /// scale * h Aᵀ [rows, L] of some rows, if there is LoRA.
    fn low(&self, rows: std::ops::Range<usize>) -> Result<Option<Buffer<bf16>>, Problem> {
        let Some(Lora { a, rank, scale, .. }) = self.lora else { return Ok(None) };
        let low = self.gpu().alloc::<bf16>(rows.len() * self.low_stride())?;
        let launch = self
            .gpu()
            .launch("head_low", (rows.len().div_ceil(TILE), rank.div_ceil(TILE)), THREADS)
            .shared(PIPELINE_BYTES)
            .buffer(&low)
            .at(self.h, rows.start * self.hidden)
            .buffer(a)
            .int(rows.len())
            .int(self.hidden)
            .int(rank)
            .int(self.low_stride())
            .float(scale);
        // SAFETY: the arguments of `head_low` in their order; h from `rows.start` on has this many rows, and L - r < 8
        // columns more than r are within the grid's last tile.
        unsafe { launch.run()? };
        Ok(Some(low))
    }

    /// The arguments h, W, low, B for some rows and entries; `low` is of these rows. Pointers, or maps for the kernels
    /// by warpgroups.
    fn inputs<'g>(
        &self,
        launch: Launch<'g>,
        rows: std::ops::Range<usize>,
        entries: std::ops::Range<usize>,
        low: Option<&Buffer<bf16>>,
    ) -> Result<Launch<'g>, Problem> {
        let (row, entry) = (rows.start * self.hidden, entries.start * self.hidden);
        if !self.by_warpgroups() {
            let launch = launch.at(self.h, row).at(self.w, entry).optional(low);
            return Ok(match self.lora {
                Some(lora) => launch.at(lora.b, entries.start * lora.rank),
                None => launch.address(0),
            });
        }
        let map = |matrix: &Buffer<bf16>, first, count, columns, tile| -> Result<TensorMap, Problem> {
            self.gpu().tensor_map_from(matrix, first, &[count, columns], &[tile, 64])
        };
        let h = map(self.h, row, rows.len(), self.hidden, TILE)?;
        let w = map(self.w, entry, entries.len(), self.hidden, WARPGROUPS_COLS)?;
        let (low, b) = match (self.lora, low) {
            (Some(Lora { b, rank, .. }), Some(low)) => (
                map(low, 0, rows.len(), rank, TILE)?,
                map(b, entries.start * rank, entries.len(), rank, WARPGROUPS_COLS)?,
            ),
            // Of rank 0 no step is made.
            _ => (h, w),
        };
        Ok(launch.map(h).map(w).map(low).map(b))
    }

    fn backward_of_rows(
        &self,
        dh: &mut Buffer<bf16>,
        gradients: &mut Gradients<'_>,
        dlogprob: &Buffer<f32>,
        lse: &Buffer<f32>,
        rows: std::ops::Range<usize>,
    ) -> Result<(), Problem> {
        let (gpu, hidden, rank, low_stride) = (self.gpu(), self.hidden, self.rank(), self.low_stride());
        let count = rows.len();
        // Few rows are made with many spans at once, or most of the device would have nothing to do.
        let spans = (ROWS / count).clamp(1, self.vocabulary.div_ceil(BACKWARD_SPAN));
        let chunk = (spans * BACKWARD_SPAN).min(self.vocabulary);
        let h = self.h.address_of(rows.start * hidden);
        let low = self.low(rows.clone())?;
        let slopes = gpu.alloc::<bf16>(count * chunk.next_multiple_of(8))?;
        let by_warpgroups = self.by_warpgroups();
        let parts = if spans > 1 { spans } else { self.lora.iter().len() };
        let states = Sum::new(gpu, count, hidden, parts, by_warpgroups)?;
        // Far fewer columns than a tile has: by the kernels with the smaller one.
        let parts = if spans > 1 { spans } else { 0 };
        let ups = self.lora.map(|lora| Sum::new(gpu, count, lora.rank, parts, false)).transpose()?;

        for first in (0..self.vocabulary).step_by(chunk) {
            let entries = chunk.min(self.vocabulary - first);
            let stride = entries.next_multiple_of(8);
            let launch = if by_warpgroups {
                let grid = (count.div_ceil(TILE), entries.div_ceil(FORWARD_SPAN));
                gpu.launch("head_slopes_hopper", grid, WARPGROUPS_THREADS).shared(STAGES * STAGE_BYTES)
            } else {
                let grid = (count.div_ceil(TILE), entries.div_ceil(TILE));
                gpu.launch("head_slopes", grid, THREADS).shared(PIPELINE_BYTES)
            };
            let launch = self
                .inputs(launch.buffer(&slopes), rows.clone(), first..first + entries, low.as_ref())?
                .at(self.targets, rows.start)
                .at(dlogprob, rows.start)
                .at(lse, rows.start)
                .int(count)
                .int(entries)
                .int(first)
                .int(hidden)
                .int(rank);
            let launch = if by_warpgroups { launch } else { launch.int(low_stride) };
            let launch = launch.int(stride);
            // SAFETY: the arguments of `head_slopes` or `head_slopes_hopper` in their order; every address has `count`
            // rows or `entries` entries behind it. `slopes` has room for the longest chunk's stride, which the grid's
            // tiles cover.
            unsafe { launch.run()? };

            let slopes = Left { buffer: &slopes, inner: entries, stride };
            states.add_product(slopes, Right { buffer: self.w, first: first * hidden }, first == 0)?;
            if let Some(dw) = &mut gradients.weight {
                outer(gpu, dw.address_of(first * hidden), slopes, h, [entries, hidden, count], hidden)?;
            }
            if let (Some(Lora { b, .. }), Some(ups), Some(low)) = (self.lora, &ups, &low) {
                ups.add_product(slopes, Right { buffer: b, first: first * rank }, first == 0)?;
                if let Some((_, db)) = &mut gradients.lora {
                    outer(gpu, db.address_of(first * rank), slopes, low.address(), [entries, rank, count], low_stride)?;
                }
            }
        }

        let mut last_part = 0;
        if let (Some(Lora { a, scale, .. }), Some(ups)) = (self.lora, &ups) {
            let up = gpu.alloc::<bf16>(count * low_stride)?;
            ups.fold(0, false, Some((up.address(), low_stride, scale)))?;
            let up = Left { buffer: &up, inner: rank, stride: low_stride };
            states.product(states.part(), up, Right { buffer: a, first: 0 }, false)?;
            last_part = 1;
            if let Some((da, _)) = &mut gradients.lora {
                outer(gpu, da.address(), up, h, [rank, hidden, count], hidden)?;
            }
        }
        states.fold(last_part, false, Some((dh.address_of(rows.start * hidden), hidden, 1.0)))
    }
}

/// A left operand [R, inner] of bf16 rows `stride` apart.
#[derive(Clone, Copy)]
struct Left<'a> {
    buffer: &'a Buffer<bf16>,
    inner: usize,
    stride: usize,
}

/// A right operand [inner, N] from an element on.
#[derive(Clone, Copy)]
struct Right<'a> {
    buffer: &'a Buffer<bf16>,
    first: usize,
}

/// A sum [R, N] of products, f32, and room for parts of it. By warpgroups, if its caller says that N and the operands'
/// rows are fit for it.
struct Sum<'g> {
    gpu: &'g Gpu,
    sum: Buffer<f32>,
    parts: Option<Buffer<f32>>,
    rows: usize,
    columns: usize,
    by_warpgroups: bool,
}

impl<'g> Sum<'g> {
    fn new(gpu: &'g Gpu, rows: usize, columns: usize, parts: usize, by_warpgroups: bool) -> Result<Sum<'g>, Problem> {
        let sum = gpu.alloc(rows * columns)?;
        let parts = if parts > 0 { Some(gpu.alloc(parts * rows * columns)?) } else { None };
        Ok(Sum { gpu, sum, parts, rows, columns, by_warpgroups })
    }

    /// Of the first part.
    fn part(&self) -> u64 {
        self.parts.as_ref().expect("room for parts").address()
    }

    /// sum = or (unless `fresh`) += left m, for m [inner, N]: span by span in ascending order, whether the spans
    /// are made one at a time or at once.
    fn add_product(&self, left: Left<'_>, m: Right<'_>, fresh: bool) -> Result<(), Problem> {
        let spans = left.inner.div_ceil(BACKWARD_SPAN);
        if spans == 1 {
            return self.product(self.sum.address(), left, m, !fresh);
        }
        self.product(self.part(), left, m, false)?;
        self.fold(spans, fresh, None)
    }

    /// to [spans, R, N] = or (with `add`, of one span) += the products of left's spans with m.
    fn product(&self, to: u64, left: Left<'_>, m: Right<'_>, add: bool) -> Result<(), Problem> {
        let spans = left.inner.div_ceil(BACKWARD_SPAN);
        if self.by_warpgroups {
            return self.product_by_warpgroups(to, left, m, add);
        }
        let launch = self
            .gpu
            .launch("head_through", (self.rows.div_ceil(TILE), self.columns.div_ceil(TILE), spans), THREADS)
            .shared(PIPELINE_BYTES)
            .address(to)
            .buffer(left.buffer)
            .at(m.buffer, m.first)
            .int(self.rows)
            .int(left.inner)
            .int(self.columns)
            .int(left.stride)
            .int(usize::from(add));
        // SAFETY: the arguments of `head_through` in their order; `to` is the sum, for one span, or the parts, which
        // the caller made room for, and the kernel bounds rows and columns.
        unsafe { launch.run() }
    }

    fn product_by_warpgroups(&self, to: u64, left: Left<'_>, m: Right<'_>, add: bool) -> Result<(), Problem> {
        let (gpu, rows, columns) = (self.gpu, self.rows, self.columns);
        let grid = (rows.div_ceil(TILE), columns.div_ceil(WARPGROUPS_COLS), left.inner.div_ceil(BACKWARD_SPAN));
        let launch = gpu
            .launch("head_through_hopper", grid, WARPGROUPS_THREADS)
            .shared(STAGES * STAGE_BYTES)
            .address(to)
            .map(gpu.tensor_map(left.buffer, &[rows, left.stride], &[TILE, 64])?)
            .map(gpu.tensor_map_from(m.buffer, m.first, &[left.inner, columns], &[64, 64])?)
            .int(rows)
            .int(left.inner)
            .int(columns)
            .int(usize::from(add));
        // SAFETY: the arguments of `head_through_hopper` in their order; `to` as in `product`.
        unsafe { launch.run() }
    }

    /// x = sum (not if `fresh`) + the first `parts` parts; `sum` = x, or bf16 rows at (address, stride) = scale * x.
    fn fold(&self, parts: usize, fresh: bool, out: Option<(u64, usize, f32)>) -> Result<(), Problem> {
        let (address, stride, scale) = out.unwrap_or((0, self.columns, 1.0));
        let launch = self
            .gpu
            .launch("head_fold", (self.rows * stride).div_ceil(THREADS), THREADS)
            .buffer(&self.sum)
            .address(address)
            .optional(self.parts.as_ref())
            .int(parts)
            .int(usize::from(fresh))
            .int(self.rows)
            .int(self.columns)
            .int(stride)
            .float(scale);
        // SAFETY: the arguments of `head_fold` in their order; `out` has R rows of `stride`, at least N, elements.
        unsafe { launch.run() }
    }
}

/// c [m, n] += the transpose of a [inner, m] times b [inner, n], for bf16 rows `b_stride` apart.
fn outer(gpu: &Gpu, c: u64, a: Left<'_>, b: u64, [m, n, inner]: [usize; 3], b_stride: usize) -> Result<(), Problem> {
    let launch = gpu
        .launch("head_outer", (m.div_ceil(TILE), n.div_ceil(TILE)), THREADS)
        .shared(PIPELINE_BYTES)
        .address(c)
        .buffer(a.buffer)
        .address(b)
        .int(m)
        .int(n)
        .int(inner)
        .int(a.stride)
        .int(b_stride);
    // SAFETY: the arguments of `head_outer` in their order; the callers give c room for m x n, and a and b `inner`
    // rows of at least m and n columns.
    unsafe { launch.run() }
}
