//! RMSNorm: y[r, c] = x[r, c] * rstd\[r\] * w\[c\], rstd\[r\] = 1 / sqrt(mean over c of x[r, c]^2 + eps).
//! Zhang and Sennrich, "Root mean square layer normalization" (2019).
//!
//! Gradients, with g\[c\] = dy\[c\] * w\[c\]:
//! dx\[c\] = rstd * (g\[c\] - x\[c\] * rstd^2 * mean over c of g\[c\] x\[c\]);  dw\[c\] = sum over r of dy x rstd.

use super::rows_per_task;
use crate::tensor::Isa;
use crate::tensor::isa::by_isa;
use crate::tensor::vector::dot_on;
use rayon::prelude::*;

/// Columns whose weight gradient one task sums.
const COLUMNS: usize = 64;

by_isa! {
    fn scale_row(y: &mut [f32], x: &[f32], w: &[f32], rstd: f32) {
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = *x * rstd * *w;
        }
    }
}

by_isa! {
    /// dx = rstd * g - slope * x, or += with `add`.
    fn backward_row(dx: &mut [f32], g: &[f32], x: &[f32], rstd: f32, slope: f32, add: bool) {
        for ((dx, g), x) in dx.iter_mut().zip(g).zip(x) {
            let value = (*g).mul_add(rstd, -(slope * *x));
            *dx = if add { *dx + value } else { value };
        }
    }
}

by_isa! {
    fn product_row(y: &mut [f32], a: &[f32], b: &[f32]) {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = *a * *b;
        }
    }
}

by_isa! {
    fn weight_row(dw: &mut [f32], dy: &[f32], x: &[f32], rstd: f32) {
        for ((dw, dy), x) in dw.iter_mut().zip(dy).zip(x) {
            *dw = (*x * rstd).mul_add(*dy, *dw);
        }
    }
}

/// y [R, C] = and rstd \[R\] =, from x [R, C] and w \[C\].
pub fn rmsnorm_forward(y: &mut [f32], rstd: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
    let channels = w.len();
    assert!(y.len() == x.len() && x.len() == rstd.len() * channels);
    if channels == 0 {
        return;
    }
    let (isa, rows) = (Isa::best(), rows_per_task(channels));
    let tasks = y.par_chunks_mut(rows * channels).zip(rstd.par_chunks_mut(rows)).zip(x.par_chunks(rows * channels));
    tasks.for_each(|((y, rstd), x)| {
        for ((y, rstd), x) in y.chunks_exact_mut(channels).zip(rstd).zip(x.chunks_exact(channels)) {
            *rstd = 1.0 / (dot_on(isa, x, x) / channels as f32 + eps).sqrt();
            scale_row(isa, y, x, w, *rstd);
        }
    });
}

/// dx [R, C] = (+= with `add`) and dw \[C\] +=, from dy, x, w and the forward's rstd.
pub fn rmsnorm_backward(
    dx: &mut [f32],
    dw: Option<&mut [f32]>,
    dy: &[f32],
    x: &[f32],
    w: &[f32],
    rstd: &[f32],
    add: bool,
) {
    let channels = w.len();
    assert!(dx.len() == x.len() && dy.len() == x.len() && x.len() == rstd.len() * channels);
    if channels == 0 {
        return;
    }
    let (isa, rows) = (Isa::best(), rows_per_task(channels));
    let operands = dy.par_chunks(rows * channels).zip(x.par_chunks(rows * channels)).zip(rstd.par_chunks(rows));
    dx.par_chunks_mut(rows * channels).zip(operands).for_each_init(
        || vec![0.0; channels],
        |scaled, (dx, ((dy, x), rstd))| {
            let rows = dx.chunks_exact_mut(channels).zip(dy.chunks_exact(channels)).zip(x.chunks_exact(channels));
            for (((dx, dy), x), rstd) in rows.zip(rstd) {
                product_row(isa, scaled, dy, w);
                let slope = rstd * rstd * rstd * (dot_on(isa, scaled, x) / channels as f32);
                backward_row(isa, dx, scaled, x, *rstd, slope, add);
            }
        },
    );
    let Some(dw) = dw else { return };
    assert_eq!(dw.len(), channels);
    dw.par_chunks_mut(COLUMNS).enumerate().for_each(|(part, dw)| {
        let columns = part * COLUMNS..part * COLUMNS + dw.len();
        for ((dy, x), rstd) in dy.chunks_exact(channels).zip(x.chunks_exact(channels)).zip(rstd) {
            weight_row(isa, dw, &dy[columns.clone()], &x[columns.clone()], *rstd);
        }
    });
}

/// The definition, in f64.
pub mod reference {
    /// y [R, C] from x [R, C] and w \[C\].
    pub fn forward(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
        let mut y = Vec::with_capacity(x.len());
        for x in x.chunks_exact(w.len()) {
            let rstd = (x.iter().map(|x| x * x).sum::<f64>() / w.len() as f64 + eps).sqrt().recip();
            y.extend(x.iter().zip(w).map(|(x, w)| x * rstd * w));
        }
        y
    }

    /// (dx [R, C], dw \[C\]).
    pub fn backward(dy: &[f64], x: &[f64], w: &[f64], eps: f64) -> (Vec<f64>, Vec<f64>) {
        let channels = w.len();
        let (mut dx, mut dw) = (Vec::with_capacity(x.len()), vec![0.0; channels]);
        for (dy, x) in dy.chunks_exact(channels).zip(x.chunks_exact(channels)) {
            let rstd = (x.iter().map(|x| x * x).sum::<f64>() / channels as f64 + eps).sqrt().recip();
            let mean = (0..channels).map(|c| dy[c] * w[c] * x[c]).sum::<f64>() / channels as f64;
            for c in 0..channels {
                dx.push(rstd * (dy[c] * w[c] - x[c] * rstd * rstd * mean));
                dw[c] += dy[c] * x[c] * rstd;
            }
        }
        (dx, dw)
    }
}
