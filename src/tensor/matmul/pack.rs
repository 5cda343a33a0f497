//! Copies into the layout the kernels read. Only moves (and, for bf16, one rounding): no sums.

use super::kernels::NR;
use crate::tensor::Isa;
use crate::tensor::isa::by_isa;

/// A cache line, so that buffers of them are aligned for the widest vectors.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line([u32; 16]);

/// From this many bytes on a buffer asks for large pages: reading it in order is a fifth faster then.
const LARGE: usize = 8 << 20;

/// A zeroed, aligned buffer of at least `words` words.
pub(super) fn lines(words: usize) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::with_capacity(words.div_ceil(16));
    #[cfg(target_os = "linux")]
    if size_of::<Line>() * lines.capacity() >= LARGE {
        const PAGE: usize = 4096;
        let start = lines.as_mut_ptr().map_addr(|at| at.next_multiple_of(PAGE));
        let bytes = size_of::<Line>() * lines.capacity() - PAGE;
        // SAFETY: these bytes lie in memory that was just allocated; the advice changes none of it, and may be refused.
        unsafe { libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE) };
    }
    // Written for the first time here, after the advice.
    lines.resize(words.div_ceil(16), Line([0; 16]));
    lines
}

/// Nearest bf16, ties to even; a NaN stays a NaN. In the low half of the result.
#[inline(always)]
pub(super) fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { bits >> 16 | 0x40 } else { rounded }
}

by_isa! {
    /// `to[i] = from[i] * factor`.
    pub(super) fn scaled_row(to: &mut [u32], from: &[f32], factor: f32) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = (*from * factor).to_bits();
        }
    }
}

/// Pairs of neighbours, rounded to bf16, in one word each; a missing last partner is zero.
/// With the processor's own conversion subnormal numbers become zero, as in its products.
pub(super) fn pair_row(isa: Isa, to: &mut [u32], from: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512Bf16 {
        let whole = (from.len() / 32).min(to.len() / 16);
        // SAFETY: `whole` times 32 numbers and 16 words are there; an `Isa` is made for processors that have it.
        unsafe { x86::pairs(to.as_mut_ptr(), from.as_ptr(), whole) };
        return pair_slowly(isa, &mut to[16 * whole..], &from[32 * whole..]);
    }
    pair_slowly(isa, to, from);
}

by_isa! {
    /// [`pair_row`] that keeps subnormal numbers, for weights: what is stored is the same on every machine.
    pub(super) fn pair_slowly(to: &mut [u32], from: &[f32]) {
        let pairs = from.chunks_exact(2);
        if let ([last], Some(to)) = (pairs.remainder(), to.get_mut(from.len() / 2)) {
            *to = bf16_bits(*last);
        }
        for (to, pair) in to.iter_mut().zip(pairs) {
            *to = bf16_bits(pair[0]) | bf16_bits(pair[1]) << 16;
        }
    }
}

by_isa! {
    /// Rounded to bf16 but kept as f32.
    pub(super) fn rounded_row(to: &mut [u32], from: &[f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = bf16_bits(*from) << 16;
        }
    }
}

by_isa! {
    /// Pairs along the other dimension: `from` is one row of a bf16 panel, NR columns by two rows
    /// (low and high half); `even` and `odd` get these rows with neighbouring columns paired.
    fn pair_columns(even: &mut [u32; NR / 2], odd: &mut [u32; NR / 2], from: &[u32; NR]) {
        for i in 0..NR / 2 {
            let (a, b) = (from[2 * i], from[2 * i + 1]);
            even[i] = a & 0xffff | b << 16;
            odd[i] = a >> 16 | b & 0xffff_0000;
        }
    }
}

/// [`transpose`] of a square whose size the function knows: to and from, each with its stride.
type TransposeSquare = unsafe fn(*mut u32, usize, *const u32, usize);

/// `to[c * to_stride + r] = from[r * from_stride + c]` for `r < rows`, `c < columns`.
///
/// # Safety
/// All words named must lie inside the two buffers, which may not overlap, and the processor must
/// have `isa`.
pub(super) unsafe fn transpose(
    isa: Isa,
    (to, to_stride): (*mut u32, usize),
    (from, from_stride): (*const u32, usize),
    rows: usize,
    columns: usize,
) {
    #[cfg(target_arch = "x86_64")]
    let (square, fast): (usize, TransposeSquare) = match isa {
        Isa::Avx512Bf16 | Isa::Avx512 => (16, x86::transpose_16),
        Isa::Avx2 => (8, x86::transpose_8),
        Isa::Portable => (4, transpose_4),
    };
    #[cfg(not(target_arch = "x86_64"))]
    let (square, fast): (usize, TransposeSquare) = {
        let _ = isa; // only x86 has more than one path
        (4, transpose_4)
    };
    let (full_rows, full_columns) = (rows / square * square, columns / square * square);
    // SAFETY: the caller's promise; squares and edges cover each (r, c) once.
    unsafe {
        for c in (0..full_columns).step_by(square) {
            for r in (0..full_rows).step_by(square) {
                fast(to.add(c * to_stride + r), to_stride, from.add(r * from_stride + c), from_stride);
            }
        }
        for c in 0..columns {
            let first = if c < full_columns { full_rows } else { 0 };
            for r in first..rows {
                *to.add(c * to_stride + r) = *from.add(r * from_stride + c);
            }
        }
    }
}

/// # Safety
/// As [`transpose`], for a square of 4.
unsafe fn transpose_4(to: *mut u32, to_stride: usize, from: *const u32, from_stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut square = [[0; 4]; 4];
        for (r, row) in square.iter_mut().enumerate() {
            *row = from.add(r * from_stride).cast::<[u32; 4]>().read_unaligned();
        }
        for c in 0..4 {
            let column = square.map(|row| row[c]);
            to.add(c * to_stride).cast::<[u32; 4]>().write_unaligned(column);
        }
    }
}

/// Repacks a block of panels for the product with the transposed matrix: 32 columns `[k]` by the
/// NR rows of one panel become `[row][NR]` (f32) or `[row pair][NR]` (bf16).
/// `from` is the panel at the first of these columns; `columns <= NR` of them are real.
///
/// # Safety
/// `from` holds `columns` words rows of NR (half of that, rounded up, when `pairs`); `to` holds NR
/// rows of NR words (half of that when `pairs`); `isa` is there.
pub(super) unsafe fn turn_panel(isa: Isa, to: *mut u32, from: *const u32, columns: usize, pairs: bool) {
    // SAFETY: the caller's promise.
    unsafe {
        if !pairs {
            if columns < NR {
                to.write_bytes(0, NR * NR);
            }
            transpose(isa, (to, NR), (from, NR), columns, NR);
        } else {
            let mut paired = [[0u32; NR / 2]; NR];
            for pair in 0..columns.div_ceil(2) {
                let [even, odd] = &mut paired[2 * pair..][..2] else { unreachable!("two rows were asked for") };
                pair_columns(isa, even, odd, &*from.add(pair * NR).cast::<[u32; NR]>());
            }
            transpose(isa, (to, NR), (paired.as_ptr().cast(), NR / 2), NR, NR / 2);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(
    clippy::needless_range_loop,
    reason = "the index is that of a register in several arrays, and of a row in memory"
)]
mod x86 {
    use std::arch::x86_64::*;

    /// `count` times 32 numbers to 16 words.
    ///
    /// # Safety
    /// Both must be there, and AVX-512 with its bf16 part.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn pairs(to: *mut u32, from: *const f32, count: usize) {
        // SAFETY: the caller's promise; the vector types are the same 512 bits.
        unsafe {
            for i in 0..count {
                let (low, high) = (_mm512_loadu_ps(from.add(32 * i)), _mm512_loadu_ps(from.add(32 * i + 16)));
                let pairs = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(to.add(16 * i).cast(), pairs);
            }
        }
    }

    /// # Safety
    /// As [`super::transpose`], for a square of 16; AVX-512.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn transpose_16(to: *mut u32, to_stride: usize, from: *const u32, from_stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut r = [_mm512_setzero_si512(); 16];
            for i in 0..16 {
                r[i] = _mm512_loadu_si512(from.add(i * from_stride).cast());
            }
            // Squares of 2, then 4 inside each 128-bit lane, then the lanes themselves.
            let mut s = r;
            for i in 0..8 {
                s[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
                s[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..4 {
                r[4 * i] = _mm512_unpacklo_epi64(s[4 * i], s[4 * i + 2]);
                r[4 * i + 1] = _mm512_unpackhi_epi64(s[4 * i], s[4 * i + 2]);
                r[4 * i + 2] = _mm512_unpacklo_epi64(s[4 * i + 1], s[4 * i + 3]);
                r[4 * i + 3] = _mm512_unpackhi_epi64(s[4 * i + 1], s[4 * i + 3]);
            }
            for i in 0..4 {
                s[i] = _mm512_shuffle_i32x4::<0x88>(r[i], r[4 + i]);
                s[4 + i] = _mm512_shuffle_i32x4::<0xdd>(r[i], r[4 + i]);
                s[8 + i] = _mm512_shuffle_i32x4::<0x88>(r[8 + i], r[12 + i]);
                s[12 + i] = _mm512_shuffle_i32x4::<0xdd>(r[8 + i], r[12 + i]);
            }
            for i in 0..4 {
                r[i] = _mm512_shuffle_i32x4::<0x88>(s[i], s[8 + i]);
                r[8 + i] = _mm512_shuffle_i32x4::<0xdd>(s[i], s[8 + i]);
                r[4 + i] = _mm512_shuffle_i32x4::<0x88>(s[4 + i], s[12 + i]);
                r[12 + i] = _mm512_shuffle_i32x4::<0xdd>(s[4 + i], s[12 + i]);
            }
            for i in 0..16 {
                _mm512_storeu_si512(to.add(i * to_stride).cast(), r[i]);
            }
        }
    }

    /// # Safety
    /// As [`super::transpose`], for a square of 8; AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn transpose_8(to: *mut u32, to_stride: usize, from: *const u32, from_stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut r = [_mm256_setzero_si256(); 8];
            for i in 0..8 {
                r[i] = _mm256_loadu_si256(from.add(i * from_stride).cast());
            }
            let mut s = r;
            for i in 0..4 {
                s[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
                s[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..2 {
                r[4 * i] = _mm256_unpacklo_epi64(s[4 * i], s[4 * i + 2]);
                r[4 * i + 1] = _mm256_unpackhi_epi64(s[4 * i], s[4 * i + 2]);
                r[4 * i + 2] = _mm256_unpacklo_epi64(s[4 * i + 1], s[4 * i + 3]);
                r[4 * i + 3] = _mm256_unpackhi_epi64(s[4 * i + 1], s[4 * i + 3]);
            }
            for i in 0..4 {
                s[i] = _mm256_permute2x128_si256::<0x20>(r[i], r[4 + i]);
                s[4 + i] = _mm256_permute2x128_si256::<0x31>(r[i], r[4 + i]);
            }
            for i in 0..8 {
                _mm256_storeu_si256(to.add(i * to_stride).cast(), s[i]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transpose_moves_every_word_once_on_every_instruction_set() {
        for isa in Isa::available() {
            for (rows, columns) in [(1, 1), (16, 16), (33, 17), (12, 64), (31, 40), (0, 3)] {
                let from: Vec<u32> = (0..rows * columns).map(|i| i as u32 + 1).collect();
                let stride = rows + 3;
                let mut to = vec![0; columns * stride];
                // SAFETY: both buffers are as large as the sizes say.
                unsafe { transpose(isa, (to.as_mut_ptr(), stride), (from.as_ptr(), columns), rows, columns) };
                for c in 0..columns {
                    for r in 0..stride {
                        let want = if r < rows { from[r * columns + c] } else { 0 };
                        assert_eq!(to[c * stride + r], want, "{isa:?} {rows}x{columns} at {r},{c}");
                    }
                }
            }
        }
    }

    #[test]
    fn bf16_rounds_to_nearest_even_like_the_half_crate() {
        let random = crate::random::Stream::named(5, &["bf16"]);
        let some = (0..10_000).map(|i| f32::from_bits(random.u64(i) as u32));
        for x in some.chain([0.0, -0.0, f32::INFINITY, f32::MAX, f32::MIN_POSITIVE, f32::NAN, 1.003_906_3]) {
            let want = half::bf16::from_f32(x);
            let got = half::bf16::from_bits(bf16_bits(x) as u16);
            assert!(got == want || got.is_nan() && want.is_nan(), "{x}");
        }
    }
}
