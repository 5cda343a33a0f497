//! Embedding: rows bit by bit, and a gradient with the bits of the CPU's.

use crate::support::{
    bf16_numbers, bytes, close, detector_is_silent, gpu, numbers, same_bits_on_every_schedule, values, wide,
};
use half::bf16;
use pipe::cuda::Gpu;
use pipe::cuda::ops::embedding::{backward, forward};
use pipe::problem::Problem;
use pipe::tensor::ops::{embedding::reference, embedding_backward};

struct Case {
    table: Vec<bf16>,
    /// What the gradient is added to.
    dw: Vec<f32>,
    dy: Vec<bf16>,
    ids: Vec<u32>,
    width: usize,
}

impl Case {
    fn new(vocabulary: usize, width: usize, tokens: usize) -> Case {
        // Squares: some ids come often, some never; the last row comes too.
        let ids = (1..=tokens).map(|t| (vocabulary - 1) as u32 - (t * t % vocabulary) as u32).collect();
        Case {
            table: bf16_numbers(vocabulary * width, "table"),
            dw: numbers(vocabulary * width, "dw"),
            dy: bf16_numbers(tokens * width, "dy"),
            ids,
            width,
        }
    }

    /// y, dw.
    fn run(&self, gpu: &Gpu) -> Result<Vec<Vec<u8>>, Problem> {
        let (table, ids) = (gpu.upload(&self.table)?, gpu.upload(&self.ids)?);
        let mut y = gpu.alloc(self.ids.len() * self.width)?;
        forward(&mut y, &table, &ids)?;
        let (mut dw, dy) = (gpu.upload(&self.dw)?, gpu.upload(&self.dy)?);
        backward(&mut dw, &dy, &self.ids)?;
        Ok(vec![bytes(&y)?, bytes(&dw)?])
    }
}

/// Rows of the table, their width, tokens: one token, widths that are no multiple of eight or more than a block's
/// 1024 columns, many tokens of one id.
const SHAPES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (11, 5, 7), (50, 8, 41), (97, 200, 61), (3, 1030, 17), (2, 24, 301)];

#[test]
fn rows_are_copied_and_gradients_have_the_bits_of_the_cpus() {
    for (vocabulary, width, tokens) in SHAPES {
        let what = format!("{tokens} of {vocabulary} rows of {width}");
        let case = Case::new(vocabulary, width, tokens);
        let results = same_bits_on_every_schedule(|gpu| case.run(gpu));
        let y: Vec<bf16> = values(&results[0]);
        assert!(wide(&y) == reference::forward(&wide(&case.table), width, &case.ids), "{what}");

        let dw: Vec<f32> = values(&results[1]);
        let gradient = reference::backward(&wide(&case.dy), vocabulary, &case.ids);
        let want: Vec<f64> = case.dw.iter().zip(gradient).map(|(dw, add)| f64::from(*dw) + add).collect();
        close(&dw, &want, 1e-6, &what);

        let mut cpu = case.dw.clone();
        let dy: Vec<f32> = case.dy.iter().map(|x| x.to_f32()).collect();
        embedding_backward(&mut cpu, &dy, &case.ids);
        assert!(dw == cpu, "{what}: other bits than the CPU's");
    }
}

#[test]
fn an_id_beyond_the_table_spoils_its_row_only() {
    for width in [5, 16] {
        let mut case = Case::new(7, width, 4);
        case.ids[2] = 7;
        let gpu = gpu();
        let (table, ids) = (gpu.upload(&case.table).unwrap(), gpu.upload(&case.ids).unwrap());
        let mut y = gpu.alloc::<bf16>(4 * width).unwrap();
        forward(&mut y, &table, &ids).unwrap();
        for (t, row) in y.download().unwrap().chunks_exact(width).enumerate() {
            match t {
                2 => assert!(row.iter().all(|x| x.is_nan())),
                _ => assert_eq!(row, &case.table[case.ids[t] as usize * width..][..width]),
            }
        }
    }
}

#[test]
#[should_panic(expected = "id 7 with 7 rows")]
fn a_gradient_for_an_id_beyond_the_table_is_refused() {
    let mut case = Case::new(7, 5, 4);
    case.ids[1] = 7;
    let gpu = gpu();
    let (mut dw, dy) = (gpu.upload(&case.dw).unwrap(), gpu.upload(&case.dy).unwrap());
    let _ = backward(&mut dw, &dy, &case.ids);
}

#[test]
fn nothing_is_read_or_written_that_should_not_be() {
    for (vocabulary, width, tokens) in SHAPES {
        let case = Case::new(vocabulary, width, tokens);
        detector_is_silent(|gpu| case.run(gpu));
    }
}

#[test]
fn no_tokens_are_nothing() {
    let case = Case::new(5, 8, 0);
    let results = same_bits_on_every_schedule(|gpu| case.run(gpu));
    assert!(results[0].is_empty());
    assert_eq!(values::<f32>(&results[1]), case.dw);
}
