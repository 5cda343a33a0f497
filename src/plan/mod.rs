//! Manifest to [`Plan`]: names resolved, defaults filled, axes multiplied out, cells ordered. No I/O.
//!
//! [`resolve`] makes the plan, or tells everything that is wrong with the manifest in one go.
//! [`fingerprint`] says, in named parts, what a cell would compute. [`schema`] is the manifest
//! language as JSON Schema, from the same key tables that validation reads.
mod axes;
mod cell;
mod fingerprint;
mod graph;
mod resolve;
mod schema;
mod select;

pub use cell::{Axes, AxisValue, Cell, CellId, Input, Plan, Source};
pub use fingerprint::{Arithmetic, Change, Fingerprint, fingerprint};
pub use graph::Graph;
pub use resolve::{CELLS_MAX, resolve};
pub use schema::schema;
