//! Memory against time while training. None of it changes a bit of any result.

/// How many layers keep only their input and compute the rest again during the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Recompute {
    /// Keep everything: fastest, most memory.
    None,
    /// Keep the inputs of layers: `[T, H]` each, about a third more time.
    #[default]
    All,
    /// The first `n` layers as `All`, the others as `None`.
    First(usize),
    /// As few as there is memory for, decided for each batch.
    Fit,
}

impl Recompute {
    pub(super) fn of(self, layer: usize) -> bool {
        match self {
            Recompute::None => false,
            // Undecided, the careful way.
            Recompute::All | Recompute::Fit => true,
            Recompute::First(n) => layer < n,
        }
    }
}

/// How a training step goes about its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Which layers are computed twice.
    pub recompute: Recompute,
    /// On a device: the inputs of layers wait in the host's memory for the backward pass.
    pub offload: bool,
    /// On a device: steps whose shape comes again are captured and launched as a whole, where there is the memory.
    pub graphs: bool,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy { recompute: Recompute::default(), offload: false, graphs: true }
    }
}
