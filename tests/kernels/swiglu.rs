//! SwiGLU: against its definition, and gates so large that the exponential overflows.

use crate::support::{
    as_good_as, bf16_numbers, bytes, detector_is_silent, rounded, same_bits_on_every_schedule, through_bf16, values,
    wide,
};
use half::bf16;
use pipe::cuda::Gpu;
use pipe::cuda::ops::swiglu::{backward, forward};
use pipe::problem::Problem;
use pipe::tensor::ops::swiglu::reference;

struct Case {
    gate: Vec<bf16>,
    up: Vec<bf16>,
    dy: Vec<bf16>,
}

impl Case {
    fn new(n: usize) -> Case {
        Case { gate: bf16_numbers(n, "gate"), up: bf16_numbers(n, "up"), dy: bf16_numbers(n, "dy") }
    }

    /// y, dgate, dup.
    fn run(&self, gpu: &Gpu) -> Result<Vec<Vec<u8>>, Problem> {
        let n = self.dy.len();
        let (gate, up, dy) = (gpu.upload(&self.gate)?, gpu.upload(&self.up)?, gpu.upload(&self.dy)?);
        let (mut y, mut dgate, mut dup) = (gpu.alloc(n)?, gpu.alloc(n)?, gpu.alloc(n)?);
        forward(&mut y, &gate, &up)?;
        backward(&mut dgate, &mut dup, &dy, &gate, &up)?;
        Ok(vec![bytes(&y)?, bytes(&dgate)?, bytes(&dup)?])
    }

    fn results(&self) -> [Vec<bf16>; 3] {
        let results = same_bits_on_every_schedule(|gpu| self.run(gpu));
        [0, 1, 2].map(|i| values(&results[i]))
    }

    fn reference(&self) -> [Vec<f64>; 3] {
        let [gate, up, dy] = [&self.gate, &self.up, &self.dy].map(|x| wide(x));
        let (dgate, dup) = reference::backward(&dy, &gate, &up);
        [reference::forward(&gate, &up), dgate, dup]
    }
}

#[test]
fn it_rounds_once() {
    // Less than eight, eight, and the last of a block's 2048.
    for n in [1, 7, 8, 9, 2047, 2048, 2049, 5003] {
        let case = Case::new(n);
        for ((got, want), what) in case.results().iter().zip(&case.reference()).zip(["y", "dgate", "dup"]) {
            as_good_as(got, &through_bf16(want), want, 1e-6, &format!("{what} of {n}"));
        }
    }
}

#[test]
fn large_gates_do_not_overflow() {
    let gates = [-3e38, -300.0, -100.0, -89.0, -88.0, -20.0, -0.0, 0.0, 20.0, 88.0, 89.0, 100.0, 300.0];
    let ones = vec![bf16::ONE; gates.len()];
    let case = Case { gate: rounded(&gates), up: ones.clone(), dy: ones };
    for (got, want) in case.results().iter().zip(&case.reference()) {
        for ((got, want), gate) in got.iter().zip(want).zip(gates) {
            let error = (got.to_f64() - want).abs();
            assert!(error <= want.abs() / 256.0 + 1e-30, "{gate}: {got} instead of {want}");
        }
    }
}

#[test]
fn an_element_has_the_same_bits_wherever_it_stands() {
    let case = Case::new(2061);
    let whole = case.results();
    let from = 2043;
    let cut = |x: &[bf16]| x[from..].to_vec();
    let part = Case { gate: cut(&case.gate), up: cut(&case.up), dy: cut(&case.dy) }.results();
    for (whole, part) in whole.iter().zip(&part) {
        assert_eq!(whole[from..], part[..]);
    }
}

#[test]
fn nothing_is_read_or_written_that_should_not_be() {
    for n in [1, 13, 2048, 2053] {
        let case = Case::new(n);
        detector_is_silent(|gpu| case.run(gpu));
    }
}

#[test]
fn no_elements_are_nothing() {
    assert!(Case::new(0).results().iter().all(Vec::is_empty));
}
