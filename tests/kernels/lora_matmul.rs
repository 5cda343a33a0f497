//! The linear layer with an adapter against plain loops in `f64`.

use crate::support::{
    HOPPER, PORTABLE, as_good_as, bf16_numbers, bytes, close, detector_is_silent, finds, gpu, numbers, on, on_device,
    on_each_kind_of_device, same_bits_on_every_schedule, schedules, through_bf16, values, wide,
};
use emulator::Schedule;
use half::bf16;
use pipe::cuda::Gpu;
use pipe::cuda::ops::lora_matmul::{self, Dims, Gradients, Lora, Rows};
use pipe::problem::Problem;

/// What a run leaves in its buffers, each a list of bytes.
type Bits = Result<Vec<Vec<u8>>, Problem>;

/// A power of two would hide a rounding in the wrong place.
const SCALE: f32 = 1.7;

/// m, n, k, rank: decoded rows, tiles of 64 x 32 and of 128 x 128, with tails; ranks below and above a tile's 64;
/// extents that are multiples of 8, even, and odd. The last two are for tiles of 128 x 256 and steps of 64: tails in
/// every extent, more steps than stages, a rank of two steps.
const SHAPES: [(usize, usize, usize, usize); 10] = [
    (1, 1, 1, 1),
    (1, 40, 264, 16),
    (13, 35, 67, 5),
    (16, 24, 40, 130),
    (67, 72, 136, 8),
    (150, 50, 30, 12),
    (257, 136, 104, 8),
    (259, 131, 19, 3),
    (130, 264, 72, 8),
    (70, 33, 328, 72),
];

/// What a layer is given, of a size that keeps results near 1, and what is in y, dx and the gradients before.
struct Layer {
    dims: Dims,
    rank: usize,
    x: Vec<bf16>,
    w: Vec<bf16>,
    a: Vec<bf16>,
    b: Vec<bf16>,
    bias: Vec<f32>,
    dy: Vec<bf16>,
    y: Vec<bf16>,
    dx: Vec<bf16>,
    da: Vec<f32>,
    db: Vec<f32>,
    dw: Vec<f32>,
}

impl Layer {
    fn new((m, n, k, rank): (usize, usize, usize, usize)) -> Layer {
        let shrunk = |len: usize, by: usize, name: &str| -> Vec<bf16> {
            let by = (by.max(1) as f32).sqrt();
            numbers(len, name).iter().map(|x| bf16::from_f32(x / by)).collect()
        };
        Layer {
            dims: Dims { m, n, k },
            rank,
            x: bf16_numbers(m * k, "x"),
            w: shrunk(n * k, k, "w"),
            a: shrunk(rank * k, k, "a"),
            b: shrunk(n * rank, rank, "b"),
            bias: numbers(n, "bias"),
            dy: bf16_numbers(m * n, "dy"),
            y: bf16_numbers(m * n, "y"),
            dx: bf16_numbers(m * k, "dx"),
            da: numbers(rank * k, "da"),
            db: numbers(n * rank, "db"),
            dw: numbers(n * k, "dw"),
        }
    }

    /// The same with so many of its first rows.
    fn first_rows(&self, m: usize) -> Layer {
        let mut less = Layer::new((m, self.dims.n, self.dims.k, self.rank));
        for (less, all) in
            [(&mut less.x, &self.x), (&mut less.y, &self.y), (&mut less.dy, &self.dy), (&mut less.dx, &self.dx)]
        {
            let len = less.len();
            less.copy_from_slice(&all[..len]);
        }
        less
    }

    /// y and low, bits. With `add`, y is added to and there is a bias.
    fn forward(&self, gpu: &Gpu, add: bool) -> Bits {
        let Dims { m, n, .. } = self.dims;
        let [x, w, a, b] = [&self.x, &self.w, &self.a, &self.b].map(|values| gpu.upload(values));
        let (x, w, a, b) = (x?, w?, a?, b?);
        let bias = gpu.upload(&self.bias)?;
        let mut y = if add { gpu.upload(&self.y)? } else { gpu.alloc(m * n)? };
        let mut low = gpu.alloc(m * self.rank)?;
        let lora = Lora { a: &a, b: &b, rank: self.rank, scale: SCALE };
        let bias = add.then_some(&bias);
        lora_matmul::forward(&mut y, Some(&mut low), &x, &w, bias, Some(lora), self.dims, Rows::Sequences, add)?;
        let mut unkept = if add { gpu.upload(&self.y)? } else { gpu.alloc(m * n)? };
        lora_matmul::forward(&mut unkept, None, &x, &w, bias, Some(lora), self.dims, Rows::Sequences, add)?;
        assert!(bytes(&y)? == bytes(&unkept)?, "y does not depend on whether low is kept");
        Ok(vec![bytes(&y)?, bytes(&low)?])
    }

    /// dx, da and db, bits.
    fn backward(&self, gpu: &Gpu, low: &[bf16], add: bool) -> Bits {
        let Dims { m, k, .. } = self.dims;
        let [dy, x, low, w] = [&self.dy[..], &self.x, low, &self.w].map(|values| gpu.upload(values));
        let (dy, x, low, w) = (dy?, x?, low?, w?);
        let (a, b) = (gpu.upload(&self.a)?, gpu.upload(&self.b)?);
        let mut dx = if add { gpu.upload(&self.dx)? } else { gpu.alloc(m * k)? };
        let (mut da, mut db) = (gpu.upload(&self.da)?, gpu.upload(&self.db)?);
        let lora = Lora { a: &a, b: &b, rank: self.rank, scale: SCALE };
        let grads = Gradients { da: &mut da, db: &mut db };
        lora_matmul::backward(Some((&mut dx, add)), Some(grads), &dy, &x, Some(&low), &w, Some(lora), self.dims)?;
        Ok(vec![bytes(&dx)?, bytes(&da)?, bytes(&db)?])
    }

    /// dw, bits.
    fn weight_gradient(&self, gpu: &Gpu) -> Bits {
        let (dy, x, mut dw) = (gpu.upload(&self.dy)?, gpu.upload(&self.x)?, gpu.upload(&self.dw)?);
        lora_matmul::weight_gradient(&mut dw, &dy, &x, self.dims)?;
        Ok(vec![bytes(&dw)?])
    }

    /// low as the forward kernel has to round it.
    fn low(&self) -> Vec<bf16> {
        let Dims { m, k, .. } = self.dims;
        let low = product(&wide(&self.x), &transposed(&wide(&self.a), k), m, k, self.rank);
        low.iter().map(|x| bf16::from_f64(*x)).collect()
    }
}

/// p [m, l] q [l, n].
fn product(p: &[f64], q: &[f64], m: usize, l: usize, n: usize) -> Vec<f64> {
    let mut out = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..l {
            let (factor, row) = (p[i * l + j], &q[j * n..][..n]);
            out[i * n..][..n].iter_mut().zip(row).for_each(|(out, q)| *out += factor * q);
        }
    }
    out
}

/// Of a matrix with so many columns.
fn transposed(x: &[f64], cols: usize) -> Vec<f64> {
    (0..cols).flat_map(|c| x.iter().skip(c).step_by(cols).copied()).collect()
}

fn scaled(x: &[f64], by: f32) -> Vec<f64> {
    x.iter().map(|x| x * f64::from(by)).collect()
}

fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// (y, low), each intermediate result passed through `store`.
fn forward_law(layer: &Layer, add: bool, store: fn(&[f64]) -> Vec<f64>) -> (Vec<f64>, Vec<f64>) {
    let Dims { m, n, k } = layer.dims;
    let x = wide(&layer.x);
    let low = store(&product(&x, &transposed(&wide(&layer.a), k), m, k, layer.rank));
    let up = store(&product(&low, &transposed(&wide(&layer.b), layer.rank), m, layer.rank, n));
    let base = store(&product(&x, &transposed(&wide(&layer.w), k), m, k, n));
    let mut y = store(&sum(&base, &store(&scaled(&up, SCALE))));
    if add {
        let bias: Vec<f64> = wide(&layer.bias).iter().copied().cycle().take(m * n).collect();
        y = store(&sum(&store(&sum(&y, &bias)), &wide(&layer.y)));
    }
    (y, low)
}

/// (dx, da, db), each intermediate result passed through `store`; da and db are f32.
fn backward_law(
    layer: &Layer,
    low: &[bf16],
    add: bool,
    store: fn(&[f64]) -> Vec<f64>,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let Dims { m, n, k } = layer.dims;
    let dy = wide(&layer.dy);
    let dlow = store(&scaled(&store(&product(&dy, &wide(&layer.b), m, n, layer.rank)), SCALE));
    let base = store(&product(&dy, &wide(&layer.w), m, n, k));
    let mut dx = store(&sum(&base, &store(&product(&dlow, &wide(&layer.a), m, layer.rank, k))));
    if add {
        dx = store(&sum(&dx, &wide(&layer.dx)));
    }
    let da = product(&transposed(&dlow, layer.rank), &wide(&layer.x), layer.rank, m, k);
    let db = scaled(&product(&transposed(&dy, n), &wide(low), n, m, layer.rank), SCALE);
    (dx, sum(&da, &wide(&layer.da)), sum(&db, &wide(&layer.db)))
}

fn exact(x: &[f64]) -> Vec<f64> {
    x.to_vec()
}

/// As good as the plain composition; of few values, which may be right by chance, within two roundings.
#[track_caller]
fn good(got: &[bf16], plain: &[f64], want: &[f64], what: &str) {
    close(got, want, 2f64.powi(-7), what);
    if want.len() > 100 {
        as_good_as(got, plain, want, 1e-6, what);
    }
}

#[test]
fn forward_follows_its_definition() {
    for shape in SHAPES {
        let layer = Layer::new(shape);
        for add in [false, true] {
            let ((y, low), (plain_y, plain_low)) =
                (forward_law(&layer, add, exact), forward_law(&layer, add, through_bf16));
            on_each_kind_of_device(|| {
                let results = same_bits_on_every_schedule(|gpu| layer.forward(gpu, add));
                good(&values::<bf16>(&results[0]), &plain_y, &y, &format!("y of {shape:?}, add {add}"));
                good(&values::<bf16>(&results[1]), &plain_low, &low, &format!("low of {shape:?}"));
            });
        }
    }
}

#[test]
fn backward_follows_its_definition() {
    // The first of these has three parts of m. The others are for dx by warpgroups: tails in every extent, one tile of
    // columns and two, part of a warpgroup's rows, more steps than stages.
    let more = [(1100, 9, 16, 2), (1, 328, 40, 24), (63, 72, 264, 8), (130, 200, 136, 72)];
    for shape in SHAPES.into_iter().chain(more) {
        let layer = Layer::new(shape);
        let low = layer.low();
        let add = shape.0 % 2 == 0;
        let (dx, da, db) = backward_law(&layer, &low, add, exact);
        let (plain_dx, plain_da, _) = backward_law(&layer, &low, add, through_bf16);
        on_each_kind_of_device(|| {
            let results = same_bits_on_every_schedule(|gpu| layer.backward(gpu, &low, add));
            good(&values::<bf16>(&results[0]), &plain_dx, &dx, &format!("dx of {shape:?}, add {add}"));
            let got_da = values::<f32>(&results[1]);
            close(&got_da, &da, 2f64.powi(-7), &format!("da of {shape:?}"));
            if da.len() > 30 {
                as_good_as(&got_da, &plain_da, &da, 1e-6, &format!("da of {shape:?}"));
            }
            close(&values::<f32>(&results[2]), &db, 2e-6, &format!("db of {shape:?}"));
        });
    }
}

#[test]
fn the_gradient_of_a_weight_follows_its_definition() {
    for shape in SHAPES {
        let layer = Layer::new(shape);
        let Dims { m, n, k } = layer.dims;
        let results = same_bits_on_every_schedule(|gpu| layer.weight_gradient(gpu));
        let want = product(&transposed(&wide(&layer.dy), n), &wide(&layer.x), n, m, k);
        close(&values::<f32>(&results[0]), &sum(&want, &wide(&layer.dw)), 2e-6, &format!("dw of {shape:?}"));
    }
}

#[test]
fn without_an_adapter_it_is_the_plain_product() {
    on_each_kind_of_device(the_plain_product);
}

fn the_plain_product() {
    for shape in [(3, 17, 24, 0), (70, 33, 40, 0), (257, 16, 9, 0)] {
        let layer = Layer::new(shape);
        let Dims { m, n, k } = layer.dims;
        let run = |gpu: &Gpu, of_rank_0: bool| -> Bits {
            let (x, w, dy) = (gpu.upload(&layer.x)?, gpu.upload(&layer.w)?, gpu.upload(&layer.dy)?);
            let none = gpu.alloc::<bf16>(0)?;
            let lora = of_rank_0.then_some(Lora { a: &none, b: &none, rank: 0, scale: SCALE });
            let (mut y, mut dx) = (gpu.alloc(m * n)?, gpu.alloc(m * k)?);
            lora_matmul::forward(&mut y, None, &x, &w, None, lora, layer.dims, Rows::Sequences, false)?;
            lora_matmul::backward(Some((&mut dx, false)), None, &dy, &x, None, &w, lora, layer.dims)?;
            Ok(vec![bytes(&y)?, bytes(&dx)?])
        };
        let results = same_bits_on_every_schedule(|gpu| run(gpu, false));
        assert_eq!(results, same_bits_on_every_schedule(|gpu| run(gpu, true)));
        let y = product(&wide(&layer.x), &transposed(&wide(&layer.w), k), m, k, n);
        let dx = product(&wide(&layer.dy), &wide(&layer.w), m, n, k);
        good(&values::<bf16>(&results[0]), &through_bf16(&y), &y, &format!("y of {shape:?}"));
        good(&values::<bf16>(&results[1]), &through_bf16(&dx), &dx, &format!("dx of {shape:?}"));
    }
}

/// The three forward kernels, by numbers of rows: large tiles, medium ones, a decoded row.
#[test]
fn a_row_has_the_same_bits_in_any_batch() {
    on_each_kind_of_device(rows_have_the_same_bits_in_any_batch);
}

fn rows_have_the_same_bits_in_any_batch() {
    let layer = Layer::new((300, 40, 296, 24));
    let low = layer.low();
    let device = crate::support::gpu();
    let all = layer.forward(&device, true).unwrap();
    let all_back = layer.backward(&device, &low, true).unwrap();
    for m in [1, 2, 16, 17, 100] {
        let less = layer.first_rows(m);
        for (less, all) in less.forward(&device, true).unwrap().iter().zip(&all) {
            assert!(*less == all[..less.len()], "the first {m} rows");
        }
        let dx = &less.backward(&device, &low[..m * 24], true).unwrap()[0];
        assert!(*dx == all_back[0][..dx.len()], "dx of the first {m} rows");
    }
}

#[test]
fn a_row_of_dx_by_warpgroups_has_the_same_bits_in_any_batch() {
    let layer = Layer::new((130, 40, 264, 24));
    let dx = |layer: &Layer| {
        let low = vec![bf16::ZERO; layer.dims.m * 24];
        on(HOPPER, || layer.backward(&gpu(), &low, true).unwrap()).swap_remove(0)
    };
    let all = dx(&layer);
    for m in [1, 63, 64, 65, 129] {
        let less = dx(&layer.first_rows(m));
        assert!(less == all[..less.len()], "the first {m} rows");
    }
}

#[test]
fn the_detector_is_silent() {
    for shape in [(1, 33, 264, 7), (67, 72, 136, 8), (257, 40, 72, 16), (70, 35, 19, 3)] {
        let layer = Layer::new(shape);
        let low = layer.low();
        on_each_kind_of_device(|| {
            detector_is_silent(|gpu| {
                layer.forward(gpu, true)?;
                layer.backward(gpu, &low, true)?;
                layer.weight_gradient(gpu)
            });
        });
    }
}

/// By warpgroups: rows whose tensor copies cannot begin, or too few of them, are multiplied by the other kernels.
#[test]
fn the_kernels_by_warpgroups_run_where_they_can() {
    let shows_a_fault = |kind, shape| {
        let layer = Layer::new(shape);
        let watched = Schedule { detector: true, fault: Some("FULL"), ..Schedule::default() };
        on(kind, || emulator::with(watched, || layer.forward(&gpu(), false)).is_err())
    };
    if on_device() {
        return;
    }
    for (kind, shape, by_warpgroups) in [
        (HOPPER, (64, 16, 72, 8), true),
        (HOPPER, (64, 9, 72, 0), true),
        (PORTABLE, (64, 16, 72, 8), false),
        (HOPPER, (1, 16, 72, 8), true),
        (HOPPER, (64, 16, 76, 8), false),
        (HOPPER, (64, 16, 72, 4), false),
    ] {
        assert_eq!(shows_a_fault(kind, shape), by_warpgroups, "{shape:?}");
    }
    let dx_shows_a_fault = |kind, shape| {
        let layer = Layer::new(shape);
        let low = layer.low();
        let watched = Schedule { detector: true, fault: Some("FULL"), ..Schedule::default() };
        on(kind, || emulator::with(watched, || layer.backward(&gpu(), &low, false)).is_err())
    };
    for (kind, shape, by_warpgroups) in [
        (HOPPER, (1, 16, 72, 8), true),
        (HOPPER, (3, 8, 16, 0), true),
        (PORTABLE, (64, 16, 72, 8), false),
        (HOPPER, (64, 16, 76, 8), false),
        (HOPPER, (64, 12, 72, 8), false),
        (HOPPER, (64, 16, 72, 4), false),
    ] {
        assert_eq!(dx_shows_a_fault(kind, shape), by_warpgroups, "dx, {shape:?}");
    }
}

#[test]
fn planted_faults_of_the_kernels_by_warpgroups_are_found() {
    let layer = Layer::new((70, 33, 328, 72));
    for fault in ["FULL", "EMPTY", "RELEASE", "SCALE"] {
        let found = on(HOPPER, || finds(fault, |gpu| layer.forward(gpu, false)));
        assert!(found.detector.is_some() && found.schedules > 0, "{fault}: {found:?}");
    }
    let (layer, low) = (Layer::new((70, 328, 40, 8)), vec![bf16::ZERO; 70 * 8]);
    for fault in ["FULL", "EMPTY", "RELEASE"] {
        let found = on(HOPPER, || finds(fault, |gpu| layer.backward(gpu, &low, false)));
        assert!(found.detector.is_some() && found.schedules > 0, "{fault} in dx: {found:?}");
    }
}

/// Each kernel that is a tile by itself: a report ends a run at the first launch that has one.
#[test]
fn planted_faults_are_found() {
    let layers = [(3, 24, 392, 8), (67, 40, 200, 0), (257, 24, 136, 0)].map(Layer::new);
    let [decode, few, many] = &layers;
    let plain = |layer: &Layer, gpu: &Gpu| -> Bits {
        let (x, w) = (gpu.upload(&layer.x)?, gpu.upload(&layer.w)?);
        let mut y = gpu.alloc(layer.y.len())?;
        lora_matmul::forward(&mut y, None, &x, &w, None, None, layer.dims, Rows::Sequences, false)?;
        Ok(vec![bytes(&y)?])
    };
    let low = decode.low();
    let runs: [&dyn Fn(&Gpu) -> Bits; 6] = [
        &|gpu| plain(decode, gpu),
        &|gpu| plain(few, gpu),
        &|gpu| plain(many, gpu),
        &|gpu| decode.forward(gpu, false),
        &|gpu| decode.backward(gpu, &low, false),
        &|gpu| many.weight_gradient(gpu),
    ];
    for (i, run) in runs.iter().enumerate() {
        // Without the barrier after the wait, other threads' copies may not be there, or be overwritten too early; with
        // a wait for one group fewer, not even the thread's own are; without the bound on rows, an operand is read past
        // its end.
        for fault in ["BARRIER", "WAIT", "BOUND"] {
            let found = finds(fault, run);
            assert!(found.detector.is_some(), "{fault} in run {i}: {found:?}");
        }
        // Where reader and writer disagree about places every access is in order, and every result is wrong.
        let found = finds("SWIZZLE", run);
        assert_eq!(found.schedules, schedules().len(), "run {i}: {found:?}");
    }
}
