//! The operations of a decoder on the processor: slices of f32, weights packed once in the layout that products read.

use super::batch::Batch;
use super::config::{Config, Heads};
use super::place::{Inputs, Lora, Place, Places, Product};
use crate::tensor::ops::{self, Attention, HeadForward, HeadGradients, HeadLora, HeadWant, RopeTable};
use crate::tensor::{self, Dtype, Matrix};
use std::convert::Infallible;
use std::sync::Arc;

/// The processor.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    /// Storage of the frozen matrices.
    pub dtype: Dtype,
}

type Done<T = ()> = Result<T, Infallible>;

/// Does not go wrong.
pub(crate) fn sure<T>(done: Done<T>) -> T {
    let Ok(done) = done;
    done
}

impl Heads {
    pub(crate) fn on_host(self) -> Attention {
        Attention { heads: self.heads, kv_heads: self.kv_heads, head_size: self.head_dim }
    }
}

impl<'a> Lora<'a, Host> {
    fn halves(&self) -> HeadLora<'a> {
        HeadLora { a: self.a.value, b: self.b.value, rank: self.rank, scale: self.scale }
    }
}

/// `y += b + scale B A x`, and `low` = A x if there is an adapter.
fn add_rest(y: &mut [f32], low: Option<&mut Vec<f32>>, x: &[f32], product: Product<'_, Host>) {
    let Product { bias, lora, out, input, .. } = product;
    if let Some(bias) = bias {
        ops::bias_add(y, bias);
    }
    let Some(Lora { a, b, rank, scale }) = lora else { return };
    let rows = x.len() / input;
    let mut scratch = Vec::new();
    let low = low.unwrap_or_else(|| {
        scratch = vec![0.0; rows * rank];
        &mut scratch
    });
    tensor::gemm(low, rows, rank, input, 1.0, x, false, a.value, true, false);
    tensor::gemm(y, rows, out, rank, scale, low, false, b.value, true, true);
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

impl Place for Host {
    type Error = Infallible;
    type Values = Vec<f32>;
    type Floats = Vec<f32>;
    type Matrix = Matrix;
    type Ids = Vec<u32>;
    type Starts = Vec<usize>;
    type Whole = ();
    type Angles = Arc<RopeTable>;
    // The processor has no other memory.
    type Leaving = Vec<f32>;
    type Parked = Vec<f32>;
    type Arriving = Vec<f32>;

    fn values(&self, len: usize) -> Done<Vec<f32>> {
        Ok(vec![0.0; len])
    }

    fn floats(&self, len: usize) -> Done<Vec<f32>> {
        Ok(vec![0.0; len])
    }

    fn angles(&self, config: &Config, positions: usize) -> Done<Arc<RopeTable>> {
        Ok(Arc::new(RopeTable::new(positions, config.head_dim, config.rope_theta)))
    }

    fn inputs(&self, batch: &Batch, angles: Arc<RopeTable>) -> Done<Inputs<Host>> {
        Ok(Inputs {
            ids: batch.ids.to_vec(),
            targets: batch.targets.to_vec(),
            rows: batch.rows.iter().map(|&row| row as u32).collect(),
            positions: batch.positions().collect(),
            starts: batch.starts().collect(),
            slopes: Vec::new(),
            longest: batch.lengths.iter().copied().max().unwrap_or(0),
            angles,
            whole: (),
        })
    }

    fn ids(&self, ids: &[u32]) -> Done<Vec<u32>> {
        Ok(ids.to_vec())
    }

    fn wide(&self, values: &Vec<f32>) -> Done<Vec<f32>> {
        Ok(values.clone())
    }

    fn slopes(&self, inputs: &mut Inputs<Host>, dlogprobs: &[f32]) -> Done {
        inputs.slopes = dlogprobs.to_vec();
        Ok(())
    }

    fn leave(&self, values: Vec<f32>) -> Done<Vec<f32>> {
        Ok(values)
    }

    fn leaving<'l>(&self, leaving: &'l Vec<f32>) -> &'l Vec<f32> {
        leaving
    }

    fn left(&self, leaving: Vec<f32>) -> Vec<f32> {
        leaving
    }

    fn fetch(&self, parked: Vec<f32>) -> Done<Vec<f32>> {
        Ok(parked)
    }

    fn arrived(&self, arriving: Vec<f32>) -> Vec<f32> {
        arriving
    }

    fn embed(&self, y: &mut Vec<f32>, table: &Matrix, ids: &Vec<u32>) -> Done {
        ops::embedding_forward(y, table, ids);
        Ok(())
    }

    fn embed_backward(&self, dw: &mut Vec<f32>, dy: &Vec<f32>, ids: &[u32]) -> Done {
        ops::embedding_backward(dw, dy, ids);
        Ok(())
    }

    fn rmsnorm(&self, y: &mut Vec<f32>, rstd: &mut Vec<f32>, x: &Vec<f32>, weight: &Vec<f32>, eps: f32) -> Done {
        ops::rmsnorm_forward(y, rstd, x, weight, eps);
        Ok(())
    }

    fn rmsnorm_backward(
        &self,
        dx: &mut Vec<f32>,
        dw: Option<&mut Vec<f32>>,
        dy: &Vec<f32>,
        x: &Vec<f32>,
        weight: &Vec<f32>,
        rstd: &Vec<f32>,
        add: bool,
    ) -> Done {
        ops::rmsnorm_backward(dx, dw.map(|dw| &mut dw[..]), dy, x, weight, rstd, add);
        Ok(())
    }

    fn linears<const N: usize>(
        &self,
        mut ys: [&mut Vec<f32>; N],
        lows: [Option<&mut Vec<f32>>; N],
        x: &Vec<f32>,
        products: [Product<'_, Host>; N],
    ) -> Done {
        let rows = x.len() / products[0].input;
        if N == 1 {
            tensor::linear(ys[0], x, rows, products[0].weight, false);
        } else {
            let together = ys.iter_mut().zip(products).map(|(y, product)| (&mut y[..], product.weight));
            tensor::linears(&mut together.collect::<Vec<_>>(), x, rows);
        }
        for ((y, low), product) in ys.into_iter().zip(lows).zip(products) {
            add_rest(y, low, x, product);
        }
        Ok(())
    }

    fn linears_of_step<const N: usize>(
        &self,
        ys: [&mut Vec<f32>; N],
        _low: Option<&Vec<f32>>,
        x: &Vec<f32>,
        products: [Product<'_, Host>; N],
    ) -> Done {
        self.linears(ys, [const { None }; N], x, products)
    }

    fn linear_of_step(
        &self,
        y: &mut Vec<f32>,
        _low: Option<&Vec<f32>>,
        x: &Vec<f32>,
        product: Product<'_, Host>,
        onto: bool,
    ) -> Done {
        if onto {
            let mut whole = vec![0.0; y.len()];
            self.linears([&mut whole], [None], x, [product])?;
            add(y, &whole);
            return Ok(());
        }
        self.linears([y], [None], x, [product])
    }

    fn linear_backward(
        &self,
        sums: &mut [Vec<f32>],
        places: Places,
        dx: Option<(&mut Vec<f32>, bool)>,
        dy: &Vec<f32>,
        x: &Vec<f32>,
        low: Option<&Vec<f32>>,
        product: Product<'_, Host>,
    ) -> Done {
        let Product { weight, lora, out, input, .. } = product;
        let rows = dy.len() / out;
        if let Some(at) = places.weight {
            tensor::gemm(&mut sums[at], out, input, rows, 1.0, dy, true, x, false, true);
        }
        if let Some(at) = places.bias {
            ops::bias_backward(&mut sums[at], dy);
        }
        let mut dlow = Vec::new();
        if let (Some(Lora { b, rank, scale, .. }), Some((da, db)), Some(low)) = (lora, places.pair(sums), low) {
            dlow = vec![0.0; rows * rank];
            tensor::gemm(&mut dlow, rows, rank, out, scale, dy, false, b.value, false, false);
            tensor::gemm(db, out, rank, rows, scale, dy, true, low, false, true);
            tensor::gemm(da, rank, input, rows, 1.0, &dlow, true, x, false, true);
        }
        if let Some((dx, add)) = dx {
            tensor::linear_backward(dx, dy, rows, weight, add);
            if let Some(Lora { a, rank, .. }) = lora {
                tensor::gemm(dx, rows, input, rank, 1.0, &dlow, false, a.value, false, true);
            }
        }
        Ok(())
    }

    fn rope(
        &self,
        x: &mut Vec<f32>,
        heads: usize,
        angles: &Arc<RopeTable>,
        positions: &Vec<u32>,
        inverse: bool,
    ) -> Done {
        ops::rope(x, heads, angles, positions, inverse);
        Ok(())
    }

    fn attention(
        &self,
        y: &mut Vec<f32>,
        lse: &mut Vec<f32>,
        [q, k, v]: [&Vec<f32>; 3],
        inputs: &Inputs<Host>,
        heads: Heads,
    ) -> Done {
        ops::attention_forward(y, lse, q, k, v, &inputs.starts, heads.on_host());
        Ok(())
    }

    fn attention_backward(
        &self,
        [dq, dk, dv]: [&mut Vec<f32>; 3],
        dy: &Vec<f32>,
        [q, k, v]: [&Vec<f32>; 3],
        y: &Vec<f32>,
        lse: &Vec<f32>,
        inputs: &Inputs<Host>,
        heads: Heads,
    ) -> Done {
        ops::attention_backward(dq, dk, dv, dy, q, k, v, y, lse, &inputs.starts, heads.on_host());
        Ok(())
    }

    fn swiglu(&self, y: &mut Vec<f32>, gate: &Vec<f32>, up: &Vec<f32>) -> Done {
        ops::swiglu_forward(y, gate, up);
        Ok(())
    }

    fn swiglu_backward(
        &self,
        dgate: &mut Vec<f32>,
        dup: &mut Vec<f32>,
        dy: &Vec<f32>,
        gate: &Vec<f32>,
        up: &Vec<f32>,
    ) -> Done {
        ops::swiglu_backward(dgate, dup, dy, gate, up);
        Ok(())
    }

    fn add(&self, x: &mut Vec<f32>, y: &Vec<f32>) -> Done {
        add(x, y);
        Ok(())
    }

    fn gather(&self, y: &mut Vec<f32>, x: &Vec<f32>, rows: &Vec<u32>, width: usize) -> Done {
        for (y, &row) in y.chunks_exact_mut(width).zip(rows) {
            y.copy_from_slice(&x[row as usize * width..][..width]);
        }
        Ok(())
    }

    fn scatter(&self, x: &mut Vec<f32>, y: &Vec<f32>, rows: &Vec<u32>, width: usize) -> Done {
        for (y, &row) in y.chunks_exact(width).zip(rows) {
            add(&mut x[row as usize * width..][..width], y);
        }
        Ok(())
    }

    fn head(&self, normed: &Vec<f32>, inputs: &Inputs<Host>, product: Product<'_, Host>) -> Done<[Vec<f32>; 2]> {
        let lora = product.lora.map(|lora| lora.halves());
        let HeadForward { logprob, lse, .. } =
            ops::head_logprob_forward(normed, product.weight, lora, &inputs.targets, HeadWant::default());
        Ok([logprob, lse])
    }

    fn head_backward(
        &self,
        sums: &mut [Vec<f32>],
        places: Places,
        dnormed: &mut Vec<f32>,
        normed: &Vec<f32>,
        lse: &Vec<f32>,
        inputs: &Inputs<Host>,
        product: Product<'_, Host>,
    ) -> Done {
        let mut wanted = HeadGradients::default();
        match (places.lora, places.weight) {
            (Some(_), _) => wanted.lora = places.pair(sums).map(|(a, b)| (&mut a[..], &mut b[..])),
            (None, Some(at)) => wanted.weight = Some(&mut sums[at]),
            (None, None) => {}
        }
        let (weight, lora) = (product.weight, product.lora.map(|lora| lora.halves()));
        ops::head_logprob_backward(dnormed, wanted, &inputs.slopes, normed, weight, lora, &inputs.targets, lse);
        Ok(())
    }
}
