//! The innermost loops: one tile of C, a few rows by a few vectors, held in registers.
//!
//! Everything is measured in words of 4 bytes. A word of an operand is one f32, or two bf16 that
//! follow each other along the summed dimension (the earlier one in the low half). The right
//! operand comes in panels of [`NR`] columns, `[step][NR]`; the left one in rows with a stride.
//!
//! A tile starts from zero or from what is in C, and adds the products in ascending order, one
//! fused multiply-add each. This is what makes a result independent of tiling and blocking.

use crate::tensor::Isa;

/// Columns of a panel of the right operand. Part of no result.
pub(super) const NR: usize = 32;

/// What the words are, and how they are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Words {
    /// f32 times f32.
    F32,
    /// bf16 pairs times bf16 pairs by the processor's own instruction.
    PairsByPairs,
    /// f32 (already rounded to bf16, two words per step) times bf16 pairs, widened when loaded.
    F32ByPairs,
}

/// One tile: `c[i][j] (= or +=) sum over steps`, for `i < rows` and `j < 32 * panels` (or 16).
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// How many words of each factor are multiplied.
    pub steps: usize,
    /// The first word of the first factor.
    pub left: *const u32,
    /// Words from one row of it to the next.
    pub left_stride: usize,
    /// The first word of the second factor.
    pub right: *const u32,
    /// From one panel to the next.
    pub panel_stride: usize,
    /// The first element of the result.
    pub c: *mut f32,
    /// Elements from one row of it to the next.
    pub c_stride: usize,
    /// Start from zero instead of C.
    pub fresh: bool,
}

/// Rows of the largest tile.
pub(super) fn tile_rows(isa: Isa) -> usize {
    match isa {
        Isa::Avx512Bf16 | Isa::Avx512 => 12,
        Isa::Avx2 => 6,
        Isa::Portable => 4,
    }
}

/// Panels that a tile of so few rows takes at once: one or two rows alone would wait for the
/// latency of each addition, so they work on more columns.
pub(super) fn tile_panels(isa: Isa, rows: usize) -> usize {
    match (isa, rows) {
        (Isa::Avx512Bf16 | Isa::Avx512, 1) => 4,
        (Isa::Avx512Bf16 | Isa::Avx512, 2..=3) => 2,
        _ => 1,
    }
}

/// Computes the tile for `rows <= tile_rows(isa)` and `panels` equal to 1 or `tile_panels(isa, rows)`.
/// With `narrow` (then `panels` is 1) only the first 16 columns are computed.
///
/// # Safety
/// The pointers of `tile` must be valid for all words named by its sizes, C for exclusive writing,
/// and the processor must have `isa`.
pub(super) unsafe fn run(isa: Isa, words: Words, rows: usize, panels: usize, narrow: bool, tile: &Tile) {
    debug_assert!(rows >= 1 && rows <= tile_rows(isa));
    #[cfg(not(target_arch = "x86_64"))]
    let _ = panels; // only x86 has tiles of several panels
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 if words == Words::PairsByPairs => x86::pairs_512(rows, panels, narrow, tile),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 | Isa::Avx512 => x86::f32_512(words == Words::F32ByPairs, rows, panels, narrow, tile),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::f32_256(words == Words::F32ByPairs, rows, narrow, tile),
            _ => portable::run(words == Words::F32ByPairs, rows, narrow, tile),
        }
    }
}

mod portable {
    use super::{NR, Tile};

    /// Columns done together: with 4 rows, 16 vectors of NEON's 32.
    const WIDTH: usize = 16;

    pub(super) unsafe fn run(pairs: bool, rows: usize, narrow: bool, tile: &Tile) {
        let halves = if narrow { 1 } else { NR / WIDTH };
        for half in 0..halves {
            // SAFETY: the caller's promise; a half panel lies inside the panel and inside C's tile.
            unsafe {
                let tile = Tile { right: tile.right.add(half * WIDTH), c: tile.c.add(half * WIDTH), ..*tile };
                match (rows, pairs) {
                    (1, false) => half_tile::<1, false>(&tile),
                    (2, false) => half_tile::<2, false>(&tile),
                    (3, false) => half_tile::<3, false>(&tile),
                    (_, false) => half_tile::<4, false>(&tile),
                    (1, true) => half_tile::<1, true>(&tile),
                    (2, true) => half_tile::<2, true>(&tile),
                    (3, true) => half_tile::<3, true>(&tile),
                    (_, true) => half_tile::<4, true>(&tile),
                }
            }
        }
    }

    unsafe fn half_tile<const ROWS: usize, const PAIRS: bool>(tile: &Tile) {
        let mut sums = [[0.0f32; WIDTH]; ROWS];
        // SAFETY: the caller's promise: `steps` words per row of the left operand (twice that for
        // pairs), `steps` rows of NR words of the right one, ROWS x WIDTH of C.
        unsafe {
            if !tile.fresh {
                for (i, sums) in sums.iter_mut().enumerate() {
                    *sums = tile.c.add(i * tile.c_stride).cast::<[f32; WIDTH]>().read_unaligned();
                }
            }
            for step in 0..tile.steps {
                let right = tile.right.add(step * NR).cast::<[u32; WIDTH]>().read_unaligned();
                if PAIRS {
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let left = tile.left.add(i * tile.left_stride + 2 * step).cast::<f32>();
                        let (low, high) = (*left, *left.add(1));
                        for (sum, word) in sums.iter_mut().zip(right) {
                            *sum = low.mul_add(f32::from_bits(word << 16), *sum);
                            *sum = high.mul_add(f32::from_bits(word & 0xffff_0000), *sum);
                        }
                    }
                } else {
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let left = *tile.left.add(i * tile.left_stride + step).cast::<f32>();
                        for (sum, word) in sums.iter_mut().zip(right) {
                            *sum = left.mul_add(f32::from_bits(word), *sum);
                        }
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                tile.c.add(i * tile.c_stride).cast::<[f32; WIDTH]>().write_unaligned(*sums);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(clippy::needless_range_loop, reason = "registers are named by row and vector in all arrays alike")]
mod x86 {
    use super::{NR, Tile};
    use std::arch::x86_64::*;

    /// Calls `$f::<rows, vectors>` for a number of rows known at run time only.
    macro_rules! by_rows {
        ($f:ident, $rows:expr, $vectors:literal, [$($r:literal)*], $tile:expr) => {
            match $rows {
                $($r => $f::<$r, $vectors>($tile),)*
                _ => unreachable!("a tile has no more rows than `tile_rows`"),
            }
        };
    }

    macro_rules! by_shape_512 {
        ($f:ident, $rows:expr, $panels:expr, $narrow:expr, $tile:expr) => {
            match ($panels, $narrow) {
                (4, _) => by_rows!($f, $rows, 8, [1], $tile),
                (2, _) => by_rows!($f, $rows, 4, [2 3], $tile),
                (_, false) => by_rows!($f, $rows, 2, [1 2 3 4 5 6 7 8 9 10 11 12], $tile),
                (_, true) => by_rows!($f, $rows, 1, [1 2 3 4 5 6 7 8 9 10 11 12], $tile),
            }
        };
    }

    /// # Safety
    /// As [`super::run`]; AVX-512 and its bf16 part.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn pairs_512(rows: usize, panels: usize, narrow: bool, tile: &Tile) {
        // SAFETY: the caller's promise.
        unsafe { by_shape_512!(pairs_512_tile, rows, panels, narrow, tile) }
    }

    /// # Safety
    /// As [`super::run`]; AVX-512.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn f32_512(pairs: bool, rows: usize, panels: usize, narrow: bool, tile: &Tile) {
        // SAFETY: the caller's promise.
        unsafe {
            if pairs {
                by_shape_512!(wide_512_tile, rows, panels, narrow, tile)
            } else {
                by_shape_512!(f32_512_tile, rows, panels, narrow, tile)
            }
        }
    }

    /// # Safety
    /// As [`super::run`]; AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn f32_256(pairs: bool, rows: usize, narrow: bool, tile: &Tile) {
        // SAFETY: the caller's promise; the second half of a panel lies 16 words and 16 columns on.
        unsafe {
            if rows == 1 && !narrow {
                return if pairs { wide_256_tile::<1, 4>(tile) } else { f32_256_tile::<1, 4>(tile) };
            }
            let halves = if narrow { 1 } else { 2 };
            for half in 0..halves {
                let tile = &Tile { right: tile.right.add(16 * half), c: tile.c.add(16 * half), ..*tile };
                if pairs {
                    by_rows!(wide_256_tile, rows, 2, [1 2 3 4 5 6], tile)
                } else {
                    by_rows!(f32_256_tile, rows, 2, [1 2 3 4 5 6], tile)
                }
            }
        }
    }

    /// Defines a tile of ROWS x VECTORS vectors. `$step` gets the accumulators, the left row
    /// pointers' base, and the pointer to the right operand at this step.
    macro_rules! tile_kernel {
        ($name:ident, $features:literal, $lanes:literal, $zero:ident, $load:ident, $store:ident, |$sums:ident, $left:ident, $stride:ident, $step:ident, $vectors:ident| $body:block) => {
            #[target_feature(enable = $features)]
            unsafe fn $name<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
                const PER_PANEL: usize = NR / $lanes;
                // SAFETY: the caller's promise: left and right hold `steps` steps for ROWS rows and
                // VECTORS vectors, C holds the tile.
                unsafe {
                    let mut $sums = [[$zero(); VECTORS]; ROWS];
                    if !tile.fresh {
                        for i in 0..ROWS {
                            for v in 0..VECTORS {
                                $sums[i][v] = $load(tile.c.add(i * tile.c_stride + v * $lanes));
                            }
                        }
                    }
                    let $left = tile.left;
                    let $stride = tile.left_stride;
                    for $step in 0..tile.steps {
                        let mut $vectors = [std::ptr::null::<u32>(); VECTORS];
                        for v in 0..VECTORS {
                            let panel = tile.right.add(v / PER_PANEL * tile.panel_stride);
                            $vectors[v] = panel.add($step * NR + v % PER_PANEL * $lanes);
                        }
                        $body
                    }
                    for i in 0..ROWS {
                        for v in 0..VECTORS {
                            $store(tile.c.add(i * tile.c_stride + v * $lanes), $sums[i][v]);
                        }
                    }
                }
            }
        };
    }

    tile_kernel!(
        f32_512_tile,
        "avx512f",
        16,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        |sums, left, stride, step, vectors| {
            let mut right = [_mm512_setzero_ps(); VECTORS];
            for v in 0..VECTORS {
                right[v] = _mm512_loadu_ps(vectors[v].cast());
            }
            for i in 0..ROWS {
                let a = _mm512_set1_ps(*left.add(i * stride + step).cast());
                for v in 0..VECTORS {
                    sums[i][v] = _mm512_fmadd_ps(a, right[v], sums[i][v]);
                }
            }
        }
    );

    tile_kernel!(
        pairs_512_tile,
        "avx512f,avx512bw,avx512bf16",
        16,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        |sums, left, stride, step, vectors| {
            let mut right = [_mm512_setzero_si512(); VECTORS];
            for v in 0..VECTORS {
                right[v] = _mm512_loadu_si512(vectors[v].cast());
            }
            for i in 0..ROWS {
                let a = _mm512_set1_epi32(*left.add(i * stride + step).cast());
                for v in 0..VECTORS {
                    // The two types are the same 512 bits.
                    let (a, b) = (
                        std::mem::transmute::<__m512i, __m512bh>(a),
                        std::mem::transmute::<__m512i, __m512bh>(right[v]),
                    );
                    sums[i][v] = _mm512_dpbf16_ps(sums[i][v], a, b);
                }
            }
        }
    );

    tile_kernel!(
        wide_512_tile,
        "avx512f",
        16,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        |sums, left, stride, step, vectors| {
            let mut low = [_mm512_setzero_ps(); VECTORS];
            let mut high = [_mm512_setzero_ps(); VECTORS];
            for v in 0..VECTORS {
                let words = _mm512_loadu_si512(vectors[v].cast());
                low[v] = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words));
                high[v] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
            }
            for i in 0..ROWS {
                let a = left.add(i * stride + 2 * step).cast::<f32>();
                for v in 0..VECTORS {
                    sums[i][v] = _mm512_fmadd_ps(_mm512_set1_ps(*a), low[v], sums[i][v]);
                }
                for v in 0..VECTORS {
                    sums[i][v] = _mm512_fmadd_ps(_mm512_set1_ps(*a.add(1)), high[v], sums[i][v]);
                }
            }
        }
    );

    tile_kernel!(
        f32_256_tile,
        "avx2,fma",
        8,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        |sums, left, stride, step, vectors| {
            let mut right = [_mm256_setzero_ps(); VECTORS];
            for v in 0..VECTORS {
                right[v] = _mm256_loadu_ps(vectors[v].cast());
            }
            for i in 0..ROWS {
                let a = _mm256_set1_ps(*left.add(i * stride + step).cast());
                for v in 0..VECTORS {
                    sums[i][v] = _mm256_fmadd_ps(a, right[v], sums[i][v]);
                }
            }
        }
    );

    tile_kernel!(
        wide_256_tile,
        "avx2,fma",
        8,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        |sums, left, stride, step, vectors| {
            for half in 0..2 {
                let mut right = [_mm256_setzero_ps(); VECTORS];
                for v in 0..VECTORS {
                    let words = _mm256_loadu_si256(vectors[v].cast());
                    right[v] = _mm256_castsi256_ps(if half == 0 {
                        _mm256_slli_epi32::<16>(words)
                    } else {
                        _mm256_and_si256(words, _mm256_set1_epi32(0xffff_0000_u32 as i32))
                    });
                }
                for i in 0..ROWS {
                    let a = _mm256_set1_ps(*left.add(i * stride + 2 * step + half).cast());
                    for v in 0..VECTORS {
                        sums[i][v] = _mm256_fmadd_ps(a, right[v], sums[i][v]);
                    }
                }
            }
        }
    );
}
