//! Launchers of `kernels/embedding.cu`: rows of a table, and their gradient.

use super::residual::{EIGHT, THREADS, blocks_of_rows};
use crate::cuda::Buffer;
use crate::problem::Problem;
use half::bf16;

/// Threads of a block of the backward kernel.
const BACKWARD_THREADS: usize = 128;

/// y [T, H] = the rows of `table` [V, H] that `ids` \[T\] name. A row whose id is not below V becomes NaN.
pub fn forward(y: &mut Buffer<bf16>, table: &Buffer<bf16>, ids: &Buffer<u32>) -> Result<(), Problem> {
    if y.is_empty() {
        return Ok(());
    }
    let tokens = ids.len();
    assert!(tokens > 0 && y.len().is_multiple_of(tokens), "{} elements for {tokens} tokens", y.len());
    let width = y.len() / tokens;
    assert!(table.len().is_multiple_of(width), "a table of {} elements has no rows of {width}", table.len());
    let launch = y
        .gpu()
        .launch("embedding_forward", blocks_of_rows(tokens, width), THREADS)
        .buffer(y)
        .buffer(table)
        .buffer(ids)
        .int(tokens)
        .int(width)
        .int(table.len() / width);
    // SAFETY: the arguments of `embedding_forward` in their order; y has T * H elements, ids T and the table V * H.
    // The kernel takes a row of the table only after comparing its id with V.
    unsafe { launch.run() }
}

/// dw [V, H] += dy [T, H] in the rows that `ids` \[T\] name, in the order of the tokens. Panics on an id that is
/// not below V.
///
/// The ids come from the host, which sorts them: then each row of dw belongs to one block.
pub fn backward(dw: &mut Buffer<f32>, dy: &Buffer<bf16>, ids: &[u32]) -> Result<(), Problem> {
    if dy.is_empty() {
        return Ok(());
    }
    assert!(!ids.is_empty() && dy.len().is_multiple_of(ids.len()), "{} elements for {} tokens", dy.len(), ids.len());
    let width = dy.len() / ids.len();
    assert!(dw.len().is_multiple_of(width), "{} elements are no rows of {width}", dw.len());
    let Occurrences { distinct, starts, order } = occurrences(ids);
    let last = distinct[distinct.len() - 1] as usize;
    assert!(last < dw.len() / width, "id {last} with {} rows", dw.len() / width);

    let gpu = dw.gpu();
    let (distinct, starts, order) = (gpu.upload(&distinct)?, gpu.upload(&starts)?, gpu.upload(&order)?);
    let tiles = width.div_ceil(EIGHT * BACKWARD_THREADS);
    let launch = gpu
        .launch("embedding_backward", (distinct.len(), tiles), BACKWARD_THREADS)
        .buffer(dw)
        .buffer(dy)
        .buffer(&distinct)
        .buffer(&starts)
        .buffer(&order)
        .int(width);
    // SAFETY: the arguments of `embedding_backward` in their order; `starts` has an element more than there are
    // blocks in x, its last is the length of `order`, whose elements are below T; the ids are below V.
    unsafe { launch.run() }
}

/// The tokens, sorted by id.
struct Occurrences {
    /// The ids that occur, ascending.
    distinct: Vec<u32>,
    /// The tokens of `distinct[i]` are `order[starts[i]..starts[i + 1]]`, ascending.
    starts: Vec<u32>,
    order: Vec<u32>,
}

fn occurrences(ids: &[u32]) -> Occurrences {
    let tokens = u32::try_from(ids.len()).expect("a batch has fewer than 2^32 tokens");
    let mut order: Vec<u32> = (0..tokens).collect();
    order.sort_by_key(|&token| ids[token as usize]); // stable: tokens of one id stay in their order
    let (mut distinct, mut starts) = (Vec::new(), Vec::new());
    for (at, &token) in (0..).zip(&order) {
        let id = ids[token as usize];
        if distinct.last() != Some(&id) {
            distinct.push(id);
            starts.push(at);
        }
    }
    starts.push(tokens);
    Occurrences { distinct, starts, order }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_one_id_stand_together_in_their_order() {
        let Occurrences { distinct, starts, order } = occurrences(&[7, 2, 7, 9, 2, 7]);
        assert_eq!(distinct, [2, 7, 9]);
        assert_eq!(starts, [0, 2, 5, 6]);
        assert_eq!(order, [1, 4, 0, 2, 5, 3]);
    }
}
