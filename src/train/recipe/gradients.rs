//! The gradients of a model's parameters as a whole.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor};

use crate::train::ranks::{RankError, Ranks};

/// Values that ranks sum at a time.
const BUCKET: usize = 1 << 22;

/// Adds `more` to `total`, as 32-bit floats.
pub(super) fn accumulate<M: Module>(model: &M, total: &mut GradientsParams, mut more: GradientsParams) {
    struct Accumulate<'a>(&'a mut GradientsParams, &'a mut GradientsParams);
    impl ModuleVisitor for Accumulate<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let Self(total, more) = self;
            let Some(more) = more.remove::<D>(param.id) else { return };
            let more = more.cast(DType::F32);
            let sum = match total.remove::<D>(param.id) {
                Some(total) => total + more,
                None => more,
            };
            total.register(param.id, sum);
        }
    }
    model.visit(&mut Accumulate(total, &mut more));
}

/// The root of the sum of squares of all gradients, which are on one device: it is waited for once.
pub(in crate::train) fn global_norm<M: Module>(model: &M, gradients: &GradientsParams) -> f64 {
    struct Squares<'a>(&'a GradientsParams, Vec<Tensor<1>>);
    impl ModuleVisitor for Squares<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.0.get::<D>(param.id) {
                self.1.push(gradient.cast(DType::F32).square().sum());
            }
        }
    }
    let mut squares = Squares(gradients, Vec::new());
    model.visit(&mut squares);
    if squares.1.is_empty() {
        return 0.0;
    }
    Tensor::cat(squares.1, 0).into_data().iter::<f32>().map(f64::from).sum::<f64>().sqrt()
}

/// Gradients of norm `norm` brought to at most `most`, with PyTorch's guard against dividing by zero.
pub(in crate::train) fn scale_to<M: Module>(model: &M, gradients: &mut GradientsParams, norm: f64, most: f64) {
    let factor = most / (norm + 1e-6);
    if factor >= 1.0 {
        return;
    }
    struct Scale<'a>(&'a mut GradientsParams, f64);
    impl ModuleVisitor for Scale<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.0.remove::<D>(param.id) {
                self.0.register(param.id, gradient * self.1);
            }
        }
    }
    model.visit(&mut Scale(gradients, factor));
}

/// Sums the gradients of all trainable parameters over all ranks; one that a rank has none of counts as zeros.
pub(super) fn sum_over_ranks<M: Module>(model: &M, gradients: &mut GradientsParams, ranks: &dyn Ranks) -> Result<(), RankError> {
    /// Gradients one after the other, and where they go back to.
    struct Sum<'a> {
        gradients: &'a mut GradientsParams,
        ranks: &'a dyn Ranks,
        waiting: Vec<Tensor<1>>,
        size: usize,
        summed: Vec<Tensor<1>>,
        error: Option<RankError>,
    }
    impl Sum<'_> {
        fn flush(&mut self) {
            let parts = std::mem::take(&mut self.waiting);
            self.size = 0;
            if parts.is_empty() || self.error.is_some() {
                return;
            }
            let lengths: Vec<usize> = parts.iter().map(|part| part.dims()[0]).collect();
            match self.ranks.sum_tensor(Tensor::cat(parts, 0)) {
                Ok(sum) => self.summed.extend(sum.split_with_sizes(lengths, 0)),
                Err(error) => self.error = Some(error),
            }
        }
    }
    impl ModuleVisitor for Sum<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val();
            if !value.is_require_grad() {
                return;
            }
            let count = value.shape().num_elements();
            let gradient = match self.gradients.remove::<D>(param.id) {
                Some(gradient) => gradient.cast(DType::F32).reshape([count]),
                None => Tensor::zeros([count], (&value.device().inner(), DType::F32)),
            };
            if self.size > 0 && self.size + count > BUCKET {
                self.flush();
            }
            self.waiting.push(gradient);
            self.size += count;
        }
    }
    /// The reverse, in the same order.
    struct Back<'a>(&'a mut GradientsParams, std::vec::IntoIter<Tensor<1>>);
    impl ModuleVisitor for Back<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val();
            if value.is_require_grad() {
                let sum = self.1.next().expect("as many as there are parameters");
                self.0.register(param.id, sum.reshape::<D, _>(value.shape()));
            }
        }
    }
    let mut sum = Sum { gradients, ranks, waiting: Vec::new(), size: 0, summed: Vec::new(), error: None };
    model.visit(&mut sum);
    sum.flush();
    let Sum { gradients, summed, error, .. } = sum;
    match error {
        Some(error) => Err(error),
        None => {
            model.visit(&mut Back(gradients, summed.into_iter()));
            Ok(())
        }
    }
}
