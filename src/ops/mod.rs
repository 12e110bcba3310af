//! The backend seam: moving rows and multiplying them by their expert's weights.
//!
//! This room knows tensors only: no module, no configuration, no plan.

mod reference;

pub(crate) use reference::{combine, dispatch, grouped_linear};
