//! The learning rate at each step, as transformers' `get_scheduler` defines it.
//!
//! With `w` warm-up steps out of `n`, step `i` counted from 0:
//!
//! | curve | i < w | later, with p = (i - w) / (n - w) |
//! |---|---|---|
//! | constant | i / w | 1 |
//! | linear | i / w | 1 - p |
//! | cosine | i / w | (1 + cos(pi p)) / 2 |
//! | cosine with restarts | i / w | (1 + cos(pi (cycles p mod 1))) / 2, 0 from p = 1 |
//!
//! With warm-up the first step has rate 0. `w = ceil(n * warmup_ratio)`.

use std::f64::consts::PI;

/// How the rate falls after warm-up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Curve {
    /// It stays.
    Constant,
    /// To zero in a straight line.
    Linear,
    /// To zero along half a wave.
    Cosine,
    /// As `Cosine`, begun anew at the full rate.
    CosineRestarts {
        /// How many times it falls.
        cycles: f64,
    },
}

/// A learning rate per step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// How it falls after warm-up.
    pub curve: Curve,
    /// The full rate, reached at the end of warm-up.
    pub learning_rate: f64,
    /// Updates before the full rate is reached.
    pub warmup_steps: u64,
    /// All updates, those of warm-up included.
    pub total_steps: u64,
}

impl Schedule {
    /// With `ceil(total_steps * warmup_ratio)` steps of warm-up.
    pub fn new(curve: Curve, learning_rate: f64, warmup_ratio: f64, total_steps: u64) -> Schedule {
        let warmup_steps = (total_steps as f64 * warmup_ratio).ceil() as u64;
        Schedule { curve, learning_rate, warmup_steps, total_steps }
    }

    /// The rate used in the update of `step`, counted from 0.
    pub fn rate(&self, step: u64) -> f64 {
        self.learning_rate * self.multiplier(step)
    }

    /// [`Schedule::rate`] as a part of the full rate.
    pub fn multiplier(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let after = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = (step - self.warmup_steps) as f64 / after;
        match self.curve {
            Curve::Constant => 1.0,
            Curve::Linear => (self.total_steps.saturating_sub(step) as f64 / after).max(0.0),
            Curve::Cosine => (0.5 * (1.0 + (PI * progress).cos())).max(0.0),
            Curve::CosineRestarts { .. } if progress >= 1.0 => 0.0,
            Curve::CosineRestarts { cycles } => (0.5 * (1.0 + (PI * ((cycles * progress) % 1.0)).cos())).max(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(schedule: Schedule, expected: &[(u64, f64)]) {
        for &(step, value) in expected {
            let got = schedule.multiplier(step);
            assert!((got - value).abs() <= 1e-12, "step {step}: {got}, expected {value}");
        }
    }

    #[test]
    fn warm_up_starts_at_zero_and_its_length_rounds_up() {
        let schedule = Schedule::new(Curve::Constant, 2.0, 0.3, 9);
        assert_eq!(schedule.warmup_steps, 3);
        close(schedule, &[(0, 0.0), (1, 1.0 / 3.0), (2, 2.0 / 3.0), (3, 1.0), (9, 1.0)]);
        assert_eq!(schedule.rate(3), 2.0);
    }

    #[test]
    fn linear_falls_to_zero() {
        close(Schedule::new(Curve::Linear, 1.0, 0.05, 17), &[(0, 0.0), (1, 1.0), (2, 0.9375), (9, 0.5), (17, 0.0)]);
    }

    #[test]
    fn cosine_is_half_way_in_the_middle() {
        let schedule = Schedule::new(Curve::Cosine, 1.0, 0.0, 10);
        close(schedule, &[(0, 1.0), (5, 0.5), (1, 0.975_528_258_147_576_8), (10, 0.0)]);
    }

    #[test]
    fn restarts_jump_back_up_and_end_at_zero() {
        let schedule = Schedule::new(Curve::CosineRestarts { cycles: 2.0 }, 1.0, 0.05, 20);
        close(
            schedule,
            &[(0, 0.0), (1, 1.0), (10, 0.006_819_348_298_638_839), (11, 0.993_180_651_701_361_3), (20, 0.0)],
        );
    }

    #[test]
    fn a_run_shorter_than_its_warm_up_does_not_divide_by_zero() {
        close(Schedule::new(Curve::Cosine, 1.0, 1.0, 3), &[(0, 0.0), (2, 2.0 / 3.0), (3, 1.0)]);
        assert!(Schedule::new(Curve::Linear, 1.0, 0.5, 0).multiplier(0).is_finite());
    }
}
