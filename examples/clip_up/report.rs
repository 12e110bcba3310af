//! The figures of a run, as a table and as JSON.

use std::collections::BTreeMap;

use burn_moe::{
    Cost,
    train::{Evaluation, PairedBootstrap, TrainedArm, data::ImageTextSet, paired_bootstrap},
};
use serde_json::{Value, json};

/// One row of the table.
pub(crate) struct Outcome<'a> {
    pub(crate) name: &'a str,
    pub(crate) evaluation: &'a Evaluation,
    pub(crate) cost: Cost,
    pub(crate) dropped: f64,
}

impl<'a> Outcome<'a> {
    pub(crate) fn of(name: &'a str, arm: &'a TrainedArm, cost: Cost) -> Self {
        Self { name, evaluation: last(arm), cost, dropped: arm.dropped }
    }

    pub(crate) fn json(&self) -> Value {
        let (t2i, i2t) = (self.evaluation.retrieval.text_to_image, self.evaluation.retrieval.image_to_text);
        json!({
            "t2i_r1": t2i.r1, "t2i_r5": t2i.r5, "t2i_r10": t2i.r10,
            "i2t_r1": i2t.r1, "i2t_r5": i2t.r5, "i2t_r10": i2t.r10,
            "gflops_per_pair": self.cost.gflops(),
            "params_total": self.cost.params_total,
            "params_active": self.cost.params_active,
            "dropped_in_training": self.dropped,
            "t2i_r1_by_language": r1_by_language(self.evaluation),
            "layers": self.evaluation.layers,
            "truncated_captions": self.evaluation.truncated,
        })
    }
}

pub(crate) fn last(arm: &TrainedArm) -> &Evaluation {
    &arm.history.last().expect("there is an evaluation at the end").1
}

/// Recall after each number of steps, with intervals over images.
pub(crate) fn history(test: &ImageTextSet, arm: &TrainedArm) -> Value {
    let row = |(step, e): &(usize, Evaluation)| {
        let PairedBootstrap { difference: r1, low, high } = interval(test, e);
        let (i2t_r1, by_language) = (e.retrieval.image_to_text.r1, r1_by_language(e));
        json!({ "step": step, "t2i_r1": r1, "t2i_r1_interval": [low, high], "i2t_r1": i2t_r1, "t2i_r1_by_language": by_language })
    };
    arm.history.iter().map(row).collect()
}

fn r1_by_language(evaluation: &Evaluation) -> BTreeMap<&String, f64> {
    evaluation.by_language.iter().map(|(language, recall)| (language, recall.r1)).collect()
}

/// Whether each query found its image.
fn hits(evaluation: &Evaluation) -> Vec<f64> {
    evaluation.retrieval.text_ranks.iter().map(|&rank| f64::from(rank == 0)).collect()
}

/// Text to image R@1 with its interval; queries of one image depend on each other.
pub(crate) fn interval(test: &ImageTextSet, evaluation: &Evaluation) -> PairedBootstrap {
    let hits = hits(evaluation);
    paired_bootstrap(&vec![0.0; hits.len()], &hits, &images(test), 0)
}

/// What the sparse model gained over the dense one.
pub(crate) fn gain(test: &ImageTextSet, dense: &TrainedArm, sparse: &TrainedArm) -> PairedBootstrap {
    paired_bootstrap(&hits(last(dense)), &hits(last(sparse)), &images(test), 0)
}

/// The same for the captions of each language.
pub(crate) fn gain_by_language(test: &ImageTextSet, dense: &TrainedArm, sparse: &TrainedArm) -> Vec<(String, PairedBootstrap)> {
    let (dense, sparse, images) = (hits(last(dense)), hits(last(sparse)), images(test));
    let mut queries: BTreeMap<&String, Vec<usize>> = BTreeMap::new();
    for (query, (_, caption)) in test.queries().enumerate() {
        if let Some(language) = &caption.language {
            queries.entry(language).or_default().push(query);
        }
    }
    let of = |values: &[f64], queries: &[usize]| queries.iter().map(|&query| values[query]).collect::<Vec<f64>>();
    let gain = |(language, queries): (&String, Vec<usize>)| {
        let images: Vec<usize> = queries.iter().map(|&query| images[query]).collect();
        (language.clone(), paired_bootstrap(&of(&dense, &queries), &of(&sparse, &queries), &images, 0))
    };
    queries.into_iter().map(gain).collect()
}

/// The image of each query.
fn images(test: &ImageTextSet) -> Vec<usize> {
    test.queries().map(|(image, _)| image).collect()
}

/// A difference in percentage points, with its interval.
pub(crate) fn points(difference: &PairedBootstrap) -> String {
    let PairedBootstrap { difference, low, high } = difference;
    format!("{:+.2} points (95 % interval {:+.2} to {:+.2})", 100.0 * difference, 100.0 * low, 100.0 * high)
}

/// Text to image R@1 of each language, where the test set knows languages.
pub(crate) fn print_languages(results: &[Outcome]) {
    let languages = || results[0].evaluation.by_language.keys();
    if languages().count() < 2 {
        return;
    }
    println!("text to image R@1 by language, %:");
    println!("{:<16}{}", "", languages().map(|language| format!(" {language:>7}")).collect::<String>());
    for row in results {
        let recalls = row.evaluation.by_language.values().map(|recall| format!(" {:>7.2}", 100.0 * recall.r1));
        println!("{:<16}{}", row.name, recalls.collect::<String>());
    }
    println!();
}

pub(crate) fn print_table(results: &[Outcome], truncated_in_training: usize) {
    println!(
        "\n{:<16} {:^23} {:^23} {:>11} {:>10} {:>10} {:>8}",
        "", "text to image, %", "image to text, %", "GFLOPs per", "parameters", "parameters", "dropped"
    );
    println!(
        "{:<16} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>11} {:>10} {:>10} {:>8}",
        "", "R@1", "R@5", "R@10", "R@1", "R@5", "R@10", "pair", "total", "active", "choices"
    );
    for row in results {
        let (t2i, i2t) = (row.evaluation.retrieval.text_to_image, row.evaluation.retrieval.image_to_text);
        print!("{:<16}", row.name);
        for recall in [t2i.r1, t2i.r5, t2i.r10, i2t.r1, i2t.r5, i2t.r10] {
            print!(" {:>7.2}", 100.0 * recall);
        }
        let Cost { params_total, params_active, .. } = row.cost;
        println!(" {:>11.5} {params_total:>10} {params_active:>10} {:>7.2}%", row.cost.gflops(), 100.0 * row.dropped);
    }
    for layer in results.iter().flat_map(|row| &row.evaluation.layers) {
        let load: Vec<String> = layer.stats.load.iter().map(|share| format!("{:.0}", 100.0 * share)).collect();
        println!("load of {}, % by expert: {} (entropy {:.2} nats)", layer.path, load.join(" "), layer.stats.entropy);
    }
    let truncated: usize = results.last().map_or(0, |row| row.evaluation.truncated);
    println!(
        "captions that did not fit the context and were cut: {truncated} of the test set, {truncated_in_training} in training"
    );
    println!();
}
