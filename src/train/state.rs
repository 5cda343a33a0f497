//! Pieces of an optimizer's state, as checkpoints write and read them.

/// One named piece of an optimizer's state, as a checkpoint holds it.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// Floats.
    F32(Vec<f32>),
    /// Codes of 8-bit states.
    U8(Vec<u8>),
}

/// Borrowed state, to be written.
#[derive(Debug, Clone, Copy)]
pub(crate) enum StateRef<'a> {
    F32(&'a [f32]),
    U8(&'a [u8]),
}

/// Borrowed state, to be read into.
pub(crate) enum StateMut<'a> {
    F32(&'a mut [f32]),
    U8(&'a mut [u8]),
}
