//! Launchers of `kernels/attention.cu` and, where a device has what it takes, of `kernels/attention_hopper.cu`: causal
//! attention over packed sequences, forward and backward.

use crate::cuda::tensor_map::BOX_COLS;
use crate::cuda::{Buffer, Gpu, Launch, TensorMap};
use crate::problem::{Exit, Problem};
use half::bf16;

/// Threads of a block.
const THREADS: usize = 128;
/// Queries or keys that a block owns.
const OWN: usize = 64;
/// Keys that the forward kernel visits at once, and rows that the backward kernels visit.
const FORWARD_VISIT: usize = 64;
const BACKWARD_VISIT: usize = 32;

/// The same of `attention_hopper.cu`.
mod hopper {
    pub(super) const THREADS: usize = 384;
    /// Also the keys that the forward kernel visits at once.
    pub(super) const OWN: usize = 128;
    pub(super) const QUERIES_VISITED: usize = 64;
    pub(super) const KEYS_VISITED: usize = 128;
    /// Turns that tiles take.
    pub(super) const STAGES: usize = 2;
    /// A full and an empty barrier of each stage.
    const RING_BARRIERS: usize = STAGES * 16;
    /// Of the tiles that stay.
    const OWN_BARRIER: usize = 8;

    fn tile_bytes(rows: usize, head_dim: usize) -> usize {
        rows * head_dim * size_of::<half::bf16>()
    }

    pub(super) fn forward_bytes(head_dim: usize) -> usize {
        (1 + 2 * STAGES) * tile_bytes(OWN, head_dim) + 2 * RING_BARRIERS + OWN_BARRIER
    }

    /// Also lse and delta of each stage.
    pub(super) fn key_gradients_bytes(head_dim: usize) -> usize {
        let tiles = 2 * tile_bytes(OWN, head_dim) + STAGES * 2 * tile_bytes(QUERIES_VISITED, head_dim);
        tiles + STAGES * 2 * QUERIES_VISITED * size_of::<f32>() + RING_BARRIERS + OWN_BARRIER
    }

    pub(super) fn query_gradients_bytes(head_dim: usize) -> usize {
        let tiles = 2 * tile_bytes(OWN, head_dim) + STAGES * 2 * tile_bytes(KEYS_VISITED, head_dim);
        tiles + RING_BARRIERS + OWN_BARRIER
    }
}

/// Columns of the tiles of heads below 64: those of a head, and zeros.
const SMALL: usize = 64;

/// Whether there are kernels for heads of this many elements: 128, 64, and every even size below.
pub const fn supports(head_dim: usize) -> bool {
    head_dim == 128 || (head_dim > 0 && head_dim <= SMALL && head_dim.is_multiple_of(2))
}

/// Sizes of an attention: q and o are [T, heads, head_dim], k and v [T, kv_heads, head_dim].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dims {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values, each shared by as many heads of queries.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl Dims {
    /// `Err` (`cuda::head_dim`) if there is no kernel for heads of this size.
    pub fn check(&self) -> Result<(), Problem> {
        assert!(self.kv_heads > 0 && self.heads > 0 && self.heads.is_multiple_of(self.kv_heads), "{self:?}");
        if supports(self.head_dim) {
            return Ok(());
        }
        let message = format!("the attention kernels do not take heads of {} elements", self.head_dim);
        Err(Problem::new("cuda::head_dim", message)
            .exit(Exit::Missing)
            .note("they take heads of 128 elements, and of every even number up to 64"))
    }

    /// Of these kernels, which differ in the size of a head, the one for this size.
    pub(super) fn pick(&self, small: &'static str, of_64: &'static str, of_128: &'static str) -> &'static str {
        match self.head_dim {
            64 => of_64,
            128 => of_128,
            _ => small,
        }
    }

    /// Of these kernels of `attention_hopper.cu`, the one that takes it on this device.
    fn pick_wgmma(&self, gpu: &Gpu, of_64: &'static str, of_128: &'static str) -> Option<&'static str> {
        match self.head_dim {
            64 => Some(of_64),
            128 => Some(of_128),
            _ => None,
        }
        .filter(|_| gpu.has_wgmma())
    }

    /// Columns of a tile in shared memory.
    pub(super) fn columns(&self) -> usize {
        self.head_dim.max(SMALL)
    }

    /// Elements of a token's queries, and of its keys.
    pub(super) fn widths(&self) -> (usize, usize) {
        (self.heads * self.head_dim, self.kv_heads * self.head_dim)
    }

    /// A map by which a block takes `rows` tokens of one head of x [T, heads, head_dim], 64 columns at a time.
    fn map(&self, gpu: &Gpu, x: &Buffer<bf16>, heads: usize, rows: usize) -> Result<TensorMap, Problem> {
        let tokens = x.len() / (heads * self.head_dim);
        gpu.tensor_map(x, &[tokens, heads, self.head_dim], &[rows, 1, BOX_COLS])
    }

    pub(super) fn scale(&self) -> f32 {
        (self.head_dim as f32).sqrt().recip()
    }
}

impl Launch<'_> {
    /// The sizes and the factor of the scores: the last arguments of most kernels here.
    pub(super) fn dims(self, dims: Dims) -> Self {
        self.int(dims.heads).int(dims.kv_heads).float(dims.scale()).head_dim(dims)
    }

    /// The size of a head, which the kernels of 64 and of 128 know by themselves.
    fn head_dim(self, dims: Dims) -> Self {
        if matches!(dims.head_dim, 64 | 128) { self } else { self.int(dims.head_dim) }
    }
}

/// Shared memory of kernels that keep `kept` tiles of OWN rows and have two pairs of tiles of `visit` rows take turns.
fn tile_bytes(kept: usize, visit: usize, dims: Dims) -> usize {
    (kept * OWN + 4 * visit) * dims.columns() * size_of::<bf16>()
}

fn forward_bytes(dims: Dims) -> usize {
    tile_bytes(1, FORWARD_VISIT, dims)
}

fn query_gradients_bytes(dims: Dims) -> usize {
    tile_bytes(2, BACKWARD_VISIT, dims)
}

/// Also lse and delta of two tiles.
fn key_gradients_bytes(dims: Dims) -> usize {
    tile_bytes(2, BACKWARD_VISIT, dims) + 4 * BACKWARD_VISIT * size_of::<f32>()
}

/// o [T, H, D] = and lse [T, H] =, of q [T, H, D] and k, v [T, KV, D].
///
/// Sequence i is the tokens `cu_seqlens[i]..cu_seqlens[i + 1]`; the first entry is 0, the last T, and none is below
/// the one before. `longest` is at least the length of the longest sequence. The device's memory is not looked at:
/// the caller sees to this.
#[expect(clippy::too_many_arguments, reason = "two results, the operands, where sequences lie, and sizes")]
pub fn forward(
    o: &mut Buffer<bf16>,
    lse: &mut Buffer<f32>,
    q: &Buffer<bf16>,
    k: &Buffer<bf16>,
    v: &Buffer<bf16>,
    cu_seqlens: &Buffer<i32>,
    longest: usize,
    dims: Dims,
) -> Result<(), Problem> {
    dims.check()?;
    let (sequences, tokens) = sequences_and_tokens(q, k, cu_seqlens, longest, dims);
    assert!(v.len() == k.len() && o.len() == q.len() && lse.len() == tokens * dims.heads);
    if longest == 0 {
        return Ok(());
    }
    let gpu = o.gpu();
    if let Some(kernel) = dims.pick_wgmma(gpu, "attention_forward_64_hopper", "attention_forward_128_hopper") {
        let launch = gpu
            .launch(kernel, (dims.heads * sequences, longest.div_ceil(hopper::OWN)), hopper::THREADS)
            .shared(hopper::forward_bytes(dims.head_dim))
            .buffer(o)
            .buffer(lse)
            .map(dims.map(gpu, q, dims.heads, hopper::OWN)?)
            .map(dims.map(gpu, k, dims.kv_heads, hopper::OWN)?)
            .map(dims.map(gpu, v, dims.kv_heads, hopper::OWN)?)
            .buffer(cu_seqlens)
            .dims(dims);
        // SAFETY: the arguments of `attention_forward_*_hopper` in their order; maps are of whole buffers, the rest is
        // as below.
        return unsafe { launch.run() };
    }
    let kernel = dims.pick("attention_forward_small", "attention_forward_64", "attention_forward_128");
    let launch = gpu
        .launch(kernel, (dims.heads * sequences, longest.div_ceil(OWN)), THREADS)
        .shared(forward_bytes(dims))
        .buffer(o)
        .buffer(lse)
        .buffer(q)
        .buffer(k)
        .buffer(v)
        .buffer(cu_seqlens)
        .dims(dims);
    // SAFETY: the arguments of `attention_forward_*` in their order; q and o have T * H * D elements, k and v
    // T * KV * D, lse T * H. The kernel reads and writes rows of tokens below cu_seqlens' last entry, by the contract T.
    unsafe { launch.run() }
}

/// dq [T, H, D] =, dk and dv [T, KV, D] =, of d_o [T, H, D], of what the forward pass was given and of its results.
/// `cu_seqlens` and `longest` as in [`forward`].
#[expect(clippy::too_many_arguments, reason = "three gradients, the forward's arrays and its sizes")]
pub fn backward(
    dq: &mut Buffer<bf16>,
    dk: &mut Buffer<bf16>,
    dv: &mut Buffer<bf16>,
    d_o: &Buffer<bf16>,
    q: &Buffer<bf16>,
    k: &Buffer<bf16>,
    v: &Buffer<bf16>,
    o: &Buffer<bf16>,
    lse: &Buffer<f32>,
    cu_seqlens: &Buffer<i32>,
    longest: usize,
    dims: Dims,
) -> Result<(), Problem> {
    dims.check()?;
    let (sequences, tokens) = sequences_and_tokens(q, k, cu_seqlens, longest, dims);
    let rows = tokens * dims.heads;
    assert!([o.len(), d_o.len(), dq.len()] == [q.len(); 3] && lse.len() == rows);
    assert!([v.len(), dk.len(), dv.len()] == [k.len(); 3]);
    if longest == 0 {
        return Ok(());
    }
    let gpu = dq.gpu();

    let delta = gpu.alloc::<f32>(rows)?;
    let rows_per_block = THREADS * 8 / dims.columns();
    let kernel = dims.pick("attention_delta_small", "attention_delta_64", "attention_delta_128");
    let launch = gpu
        .launch(kernel, rows.div_ceil(rows_per_block), THREADS)
        .buffer(&delta)
        .buffer(d_o)
        .buffer(o)
        .int(rows)
        .head_dim(dims);
    // SAFETY: the arguments of `attention_delta_*` in their order; delta has `rows` elements, o and d_o D times as
    // many.
    unsafe { launch.run()? };

    let by_warpgroups = dims
        .pick_wgmma(gpu, "attention_key_gradients_64_hopper", "attention_key_gradients_128_hopper")
        .zip(dims.pick_wgmma(gpu, "attention_query_gradients_64_hopper", "attention_query_gradients_128_hopper"));
    // What both kernels read, after what each writes: by warpgroups through maps by which this many queries and keys come
    // at once.
    let read = |launch: Launch<'_>, queries: usize, keys: usize| -> Result<(), Problem> {
        let launch = match by_warpgroups {
            Some(_) => launch
                .map(dims.map(gpu, d_o, dims.heads, queries)?)
                .map(dims.map(gpu, q, dims.heads, queries)?)
                .map(dims.map(gpu, k, dims.kv_heads, keys)?)
                .map(dims.map(gpu, v, dims.kv_heads, keys)?),
            None => launch.buffer(d_o).buffer(q).buffer(k).buffer(v),
        };
        let launch = launch.buffer(lse).buffer(&delta).buffer(cu_seqlens).dims(dims);
        // SAFETY: the arguments of `attention_key_gradients_*` or `attention_query_gradients_*` in their order, behind
        // the gradients that `launch` has; maps are of whole buffers. Sizes are as in `forward`, those of a gradient
        // are those of what it belongs to, lse and delta have T * H elements.
        unsafe { launch.run() }
    };
    let of_keys = |kernel, tiles, threads| gpu.launch(kernel, (dims.kv_heads * sequences, tiles), threads);
    let of_queries = |kernel, tiles, threads| gpu.launch(kernel, (dims.heads * sequences, tiles), threads);
    if let Some((keys, queries)) = by_warpgroups {
        let (tiles, threads) = (longest.div_ceil(hopper::OWN), hopper::THREADS);
        let launch = of_keys(keys, tiles, threads).shared(hopper::key_gradients_bytes(dims.head_dim));
        read(launch.buffer(dk).buffer(dv), hopper::QUERIES_VISITED, hopper::OWN)?;
        let launch = of_queries(queries, tiles, threads).shared(hopper::query_gradients_bytes(dims.head_dim));
        return read(launch.buffer(dq), hopper::OWN, hopper::KEYS_VISITED);
    }
    let keys = dims.pick("attention_key_gradients_small", "attention_key_gradients_64", "attention_key_gradients_128");
    let queries =
        dims.pick("attention_query_gradients_small", "attention_query_gradients_64", "attention_query_gradients_128");
    let tiles = longest.div_ceil(OWN);
    let launch = of_keys(keys, tiles, THREADS).shared(key_gradients_bytes(dims));
    read(launch.buffer(dk).buffer(dv), BACKWARD_VISIT, OWN)?;
    let launch = of_queries(queries, tiles, THREADS).shared(query_gradients_bytes(dims));
    read(launch.buffer(dq), OWN, BACKWARD_VISIT)
}

/// The numbers of sequences and of tokens.
fn sequences_and_tokens(
    q: &Buffer<bf16>,
    k: &Buffer<bf16>,
    cu_seqlens: &Buffer<i32>,
    longest: usize,
    dims: Dims,
) -> (usize, usize) {
    let (width, kv_width) = dims.widths();
    assert!(q.len().is_multiple_of(width), "{} elements for {dims:?}", q.len());
    let tokens = q.len() / width;
    assert_eq!(k.len(), tokens * kv_width, "keys of {tokens} tokens, {dims:?}");
    assert!(!cu_seqlens.is_empty() && longest <= tokens, "the longest of {tokens} tokens has {longest}");
    (cu_seqlens.len() - 1, tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What every device since sm_80 grants a block that asks for more than 48 KiB, and what one of 9.0 does.
    const GRANTED: usize = 99 * 1024;
    const GRANTED_BY_HOPPER: usize = 227 * 1024;

    #[test]
    fn a_block_needs_no_more_shared_memory_than_any_device_grants() {
        for head_dim in [2, 64, 128] {
            let dims = Dims { heads: 1, kv_heads: 1, head_dim };
            for bytes in [forward_bytes(dims), key_gradients_bytes(dims), query_gradients_bytes(dims)] {
                assert!(bytes <= GRANTED, "{dims:?}: {bytes}");
            }
            for bytes in [
                hopper::forward_bytes(head_dim),
                hopper::key_gradients_bytes(head_dim),
                hopper::query_gradients_bytes(head_dim),
            ] {
                assert!(bytes <= GRANTED_BY_HOPPER, "{dims:?}: {bytes}");
            }
        }
    }
}
