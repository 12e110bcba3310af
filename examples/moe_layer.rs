//! The sparse layer in a transformer block of your own, trained for a few steps.
//!
//! ```sh
//! cargo run --release --example moe_layer
//! ```
//!
//! The five lines that make a dense block sparse are numbered. The task is one that experts suit: tokens come from eight
//! clusters, and each cluster is to be turned by a rotation of its own.

mod support;

use std::process::ExitCode;

use burn::{
    config::Config,
    module::Module,
    nn::{LayerNorm, LayerNormConfig},
    optim::{AdamWConfig, GradientsParams},
    tensor::{Device, Distribution, Tensor},
};
use burn_moe::{AuxiliaryLossConfig, MoeFeedForward, MoeFeedForwardConfig, Routing, finite::check_finite, stats::RoutingStats};

#[derive(Config, Debug)]
struct BlockConfig {
    d_model: usize,
    d_ff: usize,
}

#[derive(Module, Debug)]
struct Block {
    norm: LayerNorm,
    moe: MoeFeedForward,
}

impl BlockConfig {
    fn init(&self, device: &Device) -> Block {
        let moe = MoeFeedForwardConfig::new(self.d_model, self.d_ff, 8).init(device); // 1
        Block { norm: LayerNormConfig::new(self.d_model).init(device), moe }
    }
}

impl Block {
    fn forward(&self, x: Tensor<2>, routings: &mut Vec<Routing>) -> Tensor<2> {
        let moe = self.moe.forward(self.norm.forward(x.clone())); // 2
        routings.push(moe.routing); // 3
        x + moe.output // 4
    }
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::default().autodiff();
    device.seed(0);
    let (d_model, clusters, steps) = (16, 8, 300);
    let centres = Tensor::<2>::random([clusters, d_model], Distribution::Normal(0.0, 2.0), &device);
    let turns = Tensor::<3>::random([clusters, d_model, d_model], Distribution::Normal(0.0, 0.25), &device);
    let batch = || {
        let noise = Tensor::<3>::random([clusters, 32, d_model], Distribution::Normal(0.0, 0.5), &device);
        let x = centres.clone().unsqueeze_dim::<3>(1) + noise;
        let y = x.clone().matmul(turns.clone());
        (x.reshape([clusters * 32, d_model]), y.reshape([clusters * 32, d_model]))
    };

    let mut block = BlockConfig::new(d_model, 32).init(&device);
    let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).init();
    let auxiliary = AuxiliaryLossConfig::new().init();
    println!("{block}");
    let mut first = None;
    for step in 1..=steps {
        let (x, y) = batch();
        let mut routings = Vec::new();
        let task = (block.forward(x, &mut routings) - y).square().mean();
        let loss = task.clone() + auxiliary.forward(&routings).total; // 5
        check_finite("loss", &loss)?;
        let gradients = GradientsParams::from_grads(loss.backward(), &block);
        block = optimizer.step(3e-3, block, gradients);

        let task = task.into_scalar::<f32>();
        first.get_or_insert(task);
        if step == 1 || step % 100 == 0 {
            let stats = RoutingStats::new(&routings[0]);
            let (dropped, peak) = (100.0 * stats.dropped, stats.peak_load());
            println!("step {step:>3}: error {task:.4}, {dropped:.1} % of choices dropped, busiest expert {peak:.2} times the mean");
        }
    }
    let (x, y) = batch();
    let mut routings = Vec::new();
    let error = (block.valid().forward(x.inner(), &mut routings) - y.inner()).square().mean().into_scalar::<f32>();
    println!("at inference, where nothing is dropped: error {error:.4}, from {:.4} at the first step", first.unwrap_or_default());
    Ok(())
}
