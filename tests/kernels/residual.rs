//! The residual stream: sums rounded once, rows taken out and put back bit by bit.

use crate::support::{bf16_numbers, bytes, detector_is_silent, rounded, same_bits_on_every_schedule, values};
use half::bf16;
use pipe::cuda::Gpu;
use pipe::cuda::ops::residual::{add, gather_rows, scatter_rows};
use pipe::problem::Problem;

/// The formulas, as read.
mod reference {
    pub fn gather<T: Copy>(x: &[T], rows: &[u32], width: usize) -> Vec<T> {
        rows.iter().flat_map(|&row| x[row as usize * width..][..width].to_vec()).collect()
    }

    pub fn scatter<T: Copy>(dx: &mut [T], dy: &[T], rows: &[u32], width: usize) {
        for (dy, &row) in dy.chunks_exact(width).zip(rows) {
            dx[row as usize * width..][..width].copy_from_slice(dy);
        }
    }
}

fn sum(gpu: &Gpu, n: usize) -> Result<Vec<Vec<u8>>, Problem> {
    let (mut x, y) = (gpu.upload(&bf16_numbers(n, "x"))?, gpu.upload(&bf16_numbers(n, "y"))?);
    add(&mut x, &y)?;
    Ok(vec![bytes(&x)?])
}

#[test]
fn sums_are_rounded_once() {
    for n in [0, 1, 7, 8, 9, 2047, 2048, 2049, 5003] {
        let got: Vec<bf16> = values(&same_bits_on_every_schedule(|gpu| sum(gpu, n))[0]);
        let (x, y) = (bf16_numbers(n, "x"), bf16_numbers(n, "y"));
        let sums: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x.to_f32() + y.to_f32()).collect();
        assert!(got == rounded(&sums), "{n} elements");
    }
}

struct Case {
    x: Vec<bf16>,
    dy: Vec<bf16>,
    rows: Vec<u32>,
    width: usize,
}

impl Case {
    /// Takes every third row, from the last on.
    fn new(there: usize, width: usize) -> Case {
        let rows: Vec<u32> = (0..there as u32).rev().step_by(3).collect();
        let dy = bf16_numbers(rows.len() * width, "dy");
        Case { x: bf16_numbers(there * width, "x"), dy, rows, width }
    }

    /// The rows of x, and zeros with the rows of dy.
    fn run(&self, gpu: &Gpu) -> Result<Vec<Vec<u8>>, Problem> {
        let (x, dy, rows) = (gpu.upload(&self.x)?, gpu.upload(&self.dy)?, gpu.upload(&self.rows)?);
        let (mut y, mut dx) = (gpu.alloc(self.dy.len())?, gpu.zeros(self.x.len())?);
        gather_rows(&mut y, &x, &rows, self.width)?;
        scatter_rows(&mut dx, &dy, &rows, self.width)?;
        Ok(vec![bytes(&y)?, bytes(&dx)?])
    }

    fn results(&self) -> [Vec<bf16>; 2] {
        let results = same_bits_on_every_schedule(|gpu| self.run(gpu));
        [values(&results[0]), values(&results[1])]
    }
}

/// Rows and their width.
const SHAPES: [(usize, usize); 6] = [(1, 1), (2, 8), (11, 5), (70, 72), (301, 17), (5, 2056)];

#[test]
fn rows_are_taken_and_put_back_bit_by_bit() {
    for (there, width) in SHAPES {
        let case = Case::new(there, width);
        let [y, dx] = case.results();
        assert!(y == reference::gather(&case.x, &case.rows, width), "{there} x {width}");
        let mut want = vec![bf16::ZERO; case.x.len()];
        reference::scatter(&mut want, &case.dy, &case.rows, width);
        assert!(dx == want, "{there} x {width}");
    }
}

#[test]
fn a_row_out_of_range_gives_nan_and_takes_nothing() {
    for width in [5, 16] {
        let mut case = Case::new(9, width);
        let [good_y, mut good_dx] = case.results();
        good_dx[case.rows[1] as usize * width..][..width].fill(bf16::ZERO);
        case.rows[1] = 9;
        let [y, dx] = case.results();
        assert!(y[width..2 * width].iter().all(|x| x.is_nan()));
        assert!(y[..width] == good_y[..width] && y[2 * width..] == good_y[2 * width..]);
        assert_eq!(dx, good_dx);
    }
}

#[test]
fn nothing_is_read_or_written_that_should_not_be() {
    for n in [1, 13, 2053] {
        detector_is_silent(|gpu| sum(gpu, n));
    }
    for (there, width) in SHAPES {
        let case = Case::new(there, width);
        detector_is_silent(|gpu| case.run(gpu));
    }
}

#[test]
fn no_rows_are_nothing() {
    let case = Case { rows: vec![], dy: vec![], ..Case::new(3, 8) };
    let [y, dx] = case.results();
    assert!(y.is_empty() && dx.iter().all(|x| *x == bf16::ZERO));
}
