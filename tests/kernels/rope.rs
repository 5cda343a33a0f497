//! Rotary position embedding: forth and back on odd shapes, the table, and tokens on their own.

use crate::support::{
    as_good_as, bf16_numbers, bytes, detector_is_silent, gpu, same_bits_on_every_schedule, through_bf16, values, wide,
};
use half::bf16;
use pipe::cuda::Gpu;
use pipe::cuda::ops::rope::{Table, rotate};
use pipe::problem::Problem;
use pipe::tensor::ops::{RopeTable, rope, rope::reference};

const THETA: f32 = 10_000.0;

/// Positions of the tables below.
const POSITIONS: usize = 70;

struct Case {
    x: Vec<bf16>,
    heads: usize,
    head_dim: usize,
    positions: Vec<u32>,
}

impl Case {
    fn new(tokens: usize, heads: usize, head_dim: usize) -> Case {
        let x = bf16_numbers(tokens * heads * head_dim, "x");
        // As packed sequences have them: they begin anew.
        let positions = (0..tokens as u32).map(|t| (t * 3 + 1) % POSITIONS as u32).collect();
        Case { x, heads, head_dim, positions }
    }

    fn run(&self, gpu: &Gpu, inverse: bool) -> Result<Vec<Vec<u8>>, Problem> {
        let table = Table::upload(gpu, POSITIONS, self.head_dim, THETA)?;
        let (mut x, positions) = (gpu.upload(&self.x)?, gpu.upload(&self.positions)?);
        rotate(&mut x, self.heads, &table, &positions, inverse)?;
        Ok(vec![bytes(&x)?])
    }

    fn turned(&self, inverse: bool) -> Vec<bf16> {
        values(&same_bits_on_every_schedule(|gpu| self.run(gpu, inverse))[0])
    }

    /// x with the halves of each head exchanged.
    fn exchanged(&self, x: &[f64]) -> Vec<f64> {
        let half = self.head_dim / 2;
        x.chunks_exact(2 * half).flat_map(|head| [&head[half..], &head[..half]].concat()).collect()
    }

    fn reference(&self, inverse: bool) -> Vec<f64> {
        let forward = |x: &[f64]| reference::forward(x, self.heads, self.head_dim, f64::from(THETA), &self.positions);
        let x = wide(&self.x);
        // Seen with the halves exchanged, a turn is a turn back.
        if inverse { self.exchanged(&forward(&self.exchanged(&x))) } else { forward(&x) }
    }
}

/// Tokens, heads, elements of a head: pairs alone, halves that are no multiple of eight, several blocks.
const SHAPES: [(usize, usize, usize); 8] =
    [(1, 1, 2), (3, 2, 6), (5, 7, 16), (7, 3, 64), (37, 2, 34), (101, 5, 16), (67, 3, 64), (9, 14, 128)];

#[test]
fn it_turns_forth_and_back_with_one_rounding() {
    for (tokens, heads, head_dim) in SHAPES {
        let case = Case::new(tokens, heads, head_dim);
        for inverse in [false, true] {
            let want = case.reference(inverse);
            // Angles are f32: up to 70, they are known to 4e-6.
            let what = format!("{tokens} x {heads} x {head_dim}, back: {inverse}");
            as_good_as(&case.turned(inverse), &through_bf16(&want), &want, 1e-5, &what);
        }
    }
}

#[test]
fn the_table_has_the_bits_of_the_cpus() {
    for head_dim in [2, 6, 64] {
        let device = Table::upload(&gpu(), POSITIONS, head_dim, THETA).unwrap();
        assert_eq!(device.positions(), POSITIONS);
        // Turned, the pair (1, 0) is the cosine and the sine.
        let half = head_dim / 2;
        let mut units = [vec![1.0; half], vec![0.0; half]].concat().repeat(POSITIONS);
        let positions: Vec<u32> = (0..POSITIONS as u32).collect();
        rope(&mut units, 1, &RopeTable::new(POSITIONS, head_dim, THETA), &positions, false);
        let (cos, sin) = (device.cos.download().unwrap(), device.sin.download().unwrap());
        for (position, unit) in units.chunks_exact(head_dim).enumerate() {
            assert_eq!(unit[..half], cos[position * half..][..half]);
            assert_eq!(unit[half..], sin[position * half..][..half]);
        }
    }
}

#[test]
fn a_token_is_turned_alike_alone_and_among_others() {
    let case = Case::new(19, 3, 34);
    let together = case.turned(false);
    let width = case.heads * case.head_dim;
    for t in 0..19 {
        let x = case.x[t * width..][..width].to_vec();
        let alone = Case { x, positions: vec![case.positions[t]], ..case };
        assert_eq!(values::<bf16>(&alone.run(&gpu(), false).unwrap()[0]), together[t * width..][..width]);
    }
}

#[test]
fn a_position_beyond_the_table_spoils_its_token_only() {
    for head_dim in [6, 64] {
        let mut case = Case::new(5, 2, head_dim);
        let good = case.turned(false);
        case.positions[1] = POSITIONS as u32;
        case.positions[3] = u32::MAX;
        let width = 2 * head_dim;
        for (t, (got, good)) in case.turned(false).chunks_exact(width).zip(good.chunks_exact(width)).enumerate() {
            match t {
                1 | 3 => assert!(got.iter().all(|x| x.is_nan())),
                _ => assert_eq!(got, good),
            }
        }
    }
}

#[test]
fn nothing_is_read_or_written_that_should_not_be() {
    for (tokens, heads, head_dim) in [(1, 1, 2), (37, 2, 34), (41, 3, 64)] {
        let case = Case::new(tokens, heads, head_dim);
        detector_is_silent(|gpu| case.run(gpu, true));
    }
}

#[test]
fn no_tokens_are_nothing() {
    assert!(Case::new(0, 3, 8).turned(false).is_empty());
}
