//! Launchers of `kernels/attention_decode.cu`: attention of one new token per sequence over a paged cache, and the
//! growth of the cache.

use super::attention::Dims;
use crate::cuda::{Buffer, Gpu};
use crate::problem::Problem;
use half::bf16;

/// Tokens of a page. Key s of a sequence is row `s % PAGE` of the page in entry `s / PAGE` of its table.
pub const PAGE: usize = 16;

/// Threads of a block, and its warps.
const THREADS: usize = 128;
const WARPS: usize = 4;
/// Keys of a sequence that a block takes. Part of the results.
pub const SPAN: usize = 256;
/// Query heads of a group that a block takes.
const HEADS: usize = 16;

/// Room for what is known of each 256 keys before they are put together.
pub struct Parts {
    /// [B, H, spans, D].
    o: Buffer<f32>,
    /// [B, H, spans, 2].
    sums: Buffer<f32>,
    spans: usize,
}

impl Parts {
    /// For `batch` sequences, the longest of at most `longest` keys.
    pub fn new(gpu: &Gpu, batch: usize, longest: usize, dims: Dims) -> Result<Parts, Problem> {
        let (rows, spans) = (batch * dims.heads, longest.div_ceil(SPAN));
        Ok(Parts { o: gpu.alloc(rows * spans * dims.head_dim)?, sums: gpu.alloc(rows * spans * 2)?, spans })
    }

    /// The same memory for fewer or shorter sequences.
    pub fn part(&self, batch: usize, longest: usize, dims: Dims) -> Parts {
        let (rows, spans) = (batch * dims.heads, longest.div_ceil(SPAN));
        Parts { o: self.o.part(0, rows * spans * dims.head_dim), sums: self.sums.part(0, rows * spans * 2), spans }
    }
}

/// o [B, H, D] = the attention of q [B, H, D], one token of each sequence, over the sequence's keys and values.
///
/// The caches are [pages, PAGE, KV, D], the page table [B, max_pages], lengths \[B\]. A sequence of length 0 gets
/// zeros. No length is above what `parts` was made for, nor above `max_pages * PAGE`; the entries of the table that
/// lengths reach are below the number of pages. The device's memory is not looked at: the caller sees to this. A
/// sequence's result depends neither on the others nor on how much room `parts` has.
#[expect(clippy::too_many_arguments, reason = "the result, the operands, where pages lie, and sizes")]
pub fn forward(
    o: &mut Buffer<bf16>,
    q: &Buffer<bf16>,
    k_cache: &Buffer<bf16>,
    v_cache: &Buffer<bf16>,
    page_table: &Buffer<u32>,
    lengths: &Buffer<u32>,
    parts: &mut Parts,
    dims: Dims,
) -> Result<(), Problem> {
    dims.check()?;
    let batch = lengths.len();
    assert!(q.len() == batch * dims.widths().0 && o.len() == q.len(), "{} elements for {batch} x {dims:?}", q.len());
    if batch == 0 {
        return Ok(());
    }
    let max_pages = check_cache(k_cache, v_cache, page_table, batch, dims);
    let (gpu, rows, Parts { o: part_o, sums: part_sums, spans }) = (o.gpu(), batch * dims.heads, parts);
    let spans = *spans;
    assert!(part_o.len() == rows * spans * dims.head_dim && part_sums.len() == rows * spans * 2, "parts for others");
    let groups = (dims.heads / dims.kv_heads).div_ceil(HEADS);
    let kernel = dims.pick("attention_decode_parts_small", "attention_decode_parts_64", "attention_decode_parts_128");
    let launch = gpu
        .launch(kernel, (batch * dims.kv_heads, spans, groups), THREADS)
        .shared(parts_bytes(dims))
        .buffer(part_o)
        .buffer(part_sums)
        .buffer(q)
        .buffer(k_cache)
        .buffer(v_cache)
        .buffer(page_table)
        .buffer(lengths)
        .int(max_pages)
        .dims(dims);
    // SAFETY: the arguments of `attention_decode_parts_*` in their order; q has B * H * D elements, the table
    // B * max_pages, lengths B, the parts B * H * spans times D and 2, where spans are the grid's y. Rows of the caches
    // are found through the table, by the contract inside.
    unsafe { launch.run()? };

    let launch = gpu
        .launch("attention_decode_merge", rows.div_ceil(WARPS), THREADS)
        .buffer(o)
        .buffer(part_o)
        .buffer(part_sums)
        .buffer(lengths)
        .int(batch)
        .int(dims.heads)
        .int(dims.head_dim)
        .int(spans);
    // SAFETY: the arguments of `attention_decode_merge` in their order; o has B * H * D elements, the rest as above.
    unsafe { launch.run() }
}

/// Row `positions[b]` of sequence b in the caches = k [b, KV, D], v [b, KV, D]. No two sequences may have the page
/// in common that they write to; its table entry is below the number of pages.
pub fn append(
    k_cache: &mut Buffer<bf16>,
    v_cache: &mut Buffer<bf16>,
    k: &Buffer<bf16>,
    v: &Buffer<bf16>,
    page_table: &Buffer<u32>,
    positions: &Buffer<u32>,
    dims: Dims,
) -> Result<(), Problem> {
    dims.check()?;
    let (batch, width) = (positions.len(), dims.widths().1);
    assert!(k.len() == batch * width && v.len() == k.len(), "{} elements for {batch} x {dims:?}", k.len());
    if batch == 0 {
        return Ok(());
    }
    let max_pages = check_cache(k_cache, v_cache, page_table, batch, dims);
    let launch = k_cache
        .gpu()
        .launch("attention_decode_append", batch, THREADS)
        .buffer(k_cache)
        .buffer(v_cache)
        .buffer(k)
        .buffer(v)
        .buffer(page_table)
        .buffer(positions)
        .int(max_pages)
        .int(width);
    // SAFETY: the arguments of `attention_decode_append` in their order; k and v have B * KV * D elements, the table
    // B * max_pages, positions B. Rows of the caches are found through the table, by the contract inside.
    unsafe { launch.run() }
}

/// Two pairs of pages that take turns for each warp; what warps tell each other about each head: two numbers.
fn parts_bytes(dims: Dims) -> usize {
    WARPS * (4 * PAGE * dims.columns() * size_of::<bf16>() + HEADS * 2 * size_of::<f32>())
}

/// The number of entries that the page table has for each sequence.
fn check_cache(
    k_cache: &Buffer<bf16>,
    v_cache: &Buffer<bf16>,
    page_table: &Buffer<u32>,
    batch: usize,
    dims: Dims,
) -> usize {
    let page = PAGE * dims.widths().1;
    assert!(k_cache.len() == v_cache.len() && k_cache.len().is_multiple_of(page), "no pages for {dims:?}");
    assert!(page_table.len().is_multiple_of(batch), "a table of {} entries for {batch}", page_table.len());
    page_table.len() / batch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_needs_no_more_shared_memory_than_any_device_grants() {
        for head_dim in [2, 64, 128] {
            let bytes = parts_bytes(Dims { heads: 1, kv_heads: 1, head_dim });
            assert!(bytes <= 99 * 1024, "{head_dim}: {bytes}");
        }
    }
}
