//! Bias: one rounding, and a gradient whose order of additions depends on the number of rows only.

use crate::support::{
    bf16_numbers, bytes, close, detector_is_silent, finds, numbers, rounded, same_bits_on_every_schedule, values, wide,
};
use half::bf16;
use pipe::cuda::Gpu;
use pipe::cuda::ops::bias::{add, backward};
use pipe::problem::Problem;
use pipe::tensor::ops::bias::reference;

struct Case {
    /// Is x of the sum, and dy of the gradient.
    x: Vec<bf16>,
    b: Vec<f32>,
}

impl Case {
    fn new(rows: usize, columns: usize) -> Case {
        Case { x: bf16_numbers(rows * columns, "x"), b: numbers(columns, "b") }
    }

    /// x + b, and b + the gradient.
    fn run(&self, gpu: &Gpu) -> Result<Vec<Vec<u8>>, Problem> {
        let (mut x, b) = (gpu.upload(&self.x)?, gpu.upload(&self.b)?);
        add(&mut x, &b)?;
        let (dy, mut db) = (gpu.upload(&self.x)?, gpu.upload(&self.b)?);
        backward(&mut db, &dy)?;
        Ok(vec![bytes(&x)?, bytes(&db)?])
    }
}

/// Rows and columns: slices of 64 rows and tiles of 256 columns, one and several and cut off; in the last, slices
/// are longer because there are 64 of them.
const SHAPES: [(usize, usize); 8] = [(1, 1), (3, 7), (64, 8), (65, 13), (127, 256), (130, 264), (200, 521), (4200, 3)];

#[test]
fn sums_follow_their_definition() {
    for (rows, columns) in SHAPES {
        let what = format!("{rows} x {columns}");
        let case = Case::new(rows, columns);
        let results = same_bits_on_every_schedule(|gpu| case.run(gpu));
        let x: Vec<bf16> = values(&results[0]);
        let sums: Vec<f32> = case.x.iter().enumerate().map(|(at, x)| x.to_f32() + case.b[at % columns]).collect();
        assert!(x == rounded(&sums), "{what}: not the f32 sums, rounded once");
        close(&x, &reference::forward(&wide(&case.x), &wide(&case.b)), 1.0 / 256.0, &what);

        let gradient = reference::backward(&wide(&case.x), columns);
        let want: Vec<f64> = case.b.iter().zip(gradient).map(|(b, sum)| f64::from(*b) + sum).collect();
        close(&values::<f32>(&results[1]), &want, 2e-6, &what);
    }
}

#[test]
fn a_column_has_the_same_bits_alone_and_among_others() {
    let (rows, columns) = (203, 265);
    let case = Case::new(rows, columns);
    let db: Vec<f32> = values(&same_bits_on_every_schedule(|gpu| case.run(gpu))[1]);
    for column in [0, 7, 255, 256, 264] {
        let x = case.x.iter().skip(column).step_by(columns).copied().collect();
        let alone = Case { x, b: vec![case.b[column]] };
        assert_eq!(values::<f32>(&same_bits_on_every_schedule(|gpu| alone.run(gpu))[1]), [db[column]]);
    }
}

#[test]
fn nothing_is_read_or_written_that_should_not_be() {
    for (rows, columns) in SHAPES {
        let case = Case::new(rows, columns);
        detector_is_silent(|gpu| case.run(gpu));
    }
}

#[test]
fn a_missing_barrier_is_found() {
    let case = Case::new(65, 264);
    let found = finds("BIAS_NO_BARRIER", |gpu| case.run(gpu));
    let report = found.detector.expect("the detector sees it");
    assert!(report.contains("bias.cu"), "{report}");
    assert!(found.schedules > 0, "no schedule shows it");
}

#[test]
fn no_rows_are_nothing() {
    let case = Case::new(0, 5);
    let results = same_bits_on_every_schedule(|gpu| case.run(gpu));
    assert!(results[0].is_empty());
    assert_eq!(values::<f32>(&results[1]), case.b);
}
