//! What work says of itself while it goes on.

/// What a stage reports while it runs. The terminal decides what is shown.
pub trait Progress: Sync {
    /// Work known in advance: `total` of `unit` ("steps", "records", "problems").
    fn begin(&self, total: u64, unit: &'static str);
    /// Done so far, out of `total`.
    fn at(&self, done: u64);
    /// A short line of numbers beside the bar (`loss 1.234  lr 3.0e-4`).
    fn note(&self, text: &str);
    /// Something the user should know after the run too (a dropped row, a slow path).
    fn warn(&self, text: &str);
}
