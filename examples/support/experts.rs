//! What the experts know: which tokens of the test set each of them is the first choice of.

use std::{collections::BTreeMap, error::Error, path::Path};

use burn::{
    module::Module,
    tensor::{Device, Int, Tensor},
};
use burn_moe::{
    Routing,
    clip::{Clip, tokenizer::ClipTokenizer},
    train::data::{Caption, ImageTextSet},
};
use plotters::prelude::*;
use serde_json::{Value, json};

use super::canvas::{self, Area, PALETTE};

/// Samples in one forward pass.
const BATCH: usize = 256;
/// Drawings in the picture.
const DRAWINGS: usize = 12;

/// First choices of one routed block.
pub(crate) struct Known {
    /// Path in the model.
    path: String,
    /// Of each property of a token the values, and for each value how many tokens each expert is the first choice of.
    properties: Vec<(&'static str, BTreeMap<String, Vec<usize>>)>,
    /// For a block of the text tower: the words of each expert that are most its own.
    words: Vec<Vec<String>>,
    /// For a block of the vision tower: the first expert of each patch of some images, `None` where it has none.
    patches: Vec<(usize, Vec<Option<usize>>)>,
}

impl Known {
    pub(crate) fn json(&self) -> Value {
        let properties: serde_json::Map<_, _> = self
            .properties
            .iter()
            .map(|(name, counts)| (name.to_string(), json!({ "first_choices": counts, "information": information(counts) })))
            .collect();
        json!({ "path": self.path, "by": properties, "words": self.words })
    }

    fn counts(&self, property: &str) -> Option<&BTreeMap<String, Vec<usize>>> {
        self.properties.iter().find(|(name, _)| *name == property).map(|(_, counts)| counts)
    }
}

/// How much the first expert of a token tells of the property, in bits: the mutual information of both.
fn information(counts: &BTreeMap<String, Vec<usize>>) -> f64 {
    let sum = |row: &Vec<usize>| row.iter().sum::<usize>() as f64;
    let total: f64 = counts.values().map(sum).sum();
    let experts = counts.values().next().map_or(0, Vec::len);
    let of_expert: Vec<f64> = (0..experts).map(|expert| counts.values().map(|row| row[expert] as f64).sum()).collect();
    let cells =
        counts.values().flat_map(|row| row.iter().zip(&of_expert).map(move |(count, expert)| (*count as f64, sum(row), *expert)));
    cells
        .filter(|(count, ..)| *count > 0.0)
        .map(|(count, row, expert)| count / total * (count * total / (row * expert)).log2())
        .sum()
}

/// The first expert of every token of a routing, `None` for padding and where nothing has a slot.
fn first_experts(routing: &Routing) -> Vec<Option<usize>> {
    let plan = &routing.plan;
    let row_expert = plan.row_expert();
    plan.choice_row()
        .chunks_exact(plan.num_choices())
        .map(|rows| usize::try_from(rows[0]).ok().map(|row| row_expert[row]))
        .collect()
}

/// Passes the test set through the model and counts. A tower without routed blocks has none.
pub(crate) fn look_into(
    model: &Clip,
    test: &ImageTextSet,
    tokenizer: &ClipTokenizer,
    context_length: usize,
    device: &Device,
) -> Vec<Known> {
    let model = model.valid();
    let mut known = look_at_patches(&model, test, device);
    known.extend(look_at_words(&model, test, tokenizer, context_length, device));
    known
}

fn look_at_patches(model: &Clip, test: &ImageTextSet, device: &Device) -> Vec<Known> {
    let blocks: Vec<usize> = model.vision.encoder.routed_blocks().collect();
    let new = |block: &usize| Known {
        path: format!("vision.encoder.blocks.{block}"),
        properties: Vec::new(),
        words: Vec::new(),
        patches: Vec::new(),
    };
    let mut known: Vec<Known> = blocks.iter().map(new).collect();
    let chosen: Vec<usize> = (0..DRAWINGS.min(test.len())).map(|place| place * test.len() / DRAWINGS.min(test.len())).collect();
    for &image in &chosen {
        let output = model.encode_image(test.images(image..image + 1, device));
        for (known, routing) in known.iter_mut().zip(&output.routings) {
            // The class token, if there is one, is the first.
            let ahead = usize::from(model.vision.class_embedding.is_some());
            known.patches.push((image, first_experts(routing)[ahead..].to_vec()));
        }
    }
    known
}

fn look_at_words(
    model: &Clip,
    test: &ImageTextSet,
    tokenizer: &ClipTokenizer,
    context_length: usize,
    device: &Device,
) -> Vec<Known> {
    let blocks: Vec<usize> = model.text.encoder.routed_blocks().collect();
    let captions: Vec<&Caption> = test.queries().map(|(_, caption)| caption).collect();
    // For each block: by language, by kind, by position, by word.
    let mut counts: Vec<[BTreeMap<String, Vec<usize>>; 4]> = blocks.iter().map(|_| Default::default()).collect();
    for batch in captions.chunks(BATCH) {
        let texts: Vec<&String> = batch.iter().map(|caption| &caption.text).collect();
        let tokens = tokenizer.tokenize(&texts, context_length);
        let names: Vec<Name> = tokens.ids.iter().map(|&id| Name::of(id, tokenizer)).collect();
        let ids: Tensor<2, Int> = tokens.tensor(device);
        let output = model.encode_text(ids);
        for ((block, routing), counts) in blocks.iter().zip(&output.routings).zip(&mut counts) {
            let experts = routing.plan.num_experts();
            assert_eq!(routing.plan.num_tokens(), names.len(), "block {block} routes every token of the batch");
            for (place, expert) in first_experts(routing).into_iter().enumerate() {
                let Some(expert) = expert else { continue };
                let (caption, position, name) = (batch[place / tokens.len], place % tokens.len, &names[place]);
                let language = caption.language.clone().unwrap_or_else(|| "all".into());
                let values = [language, name.kind.to_string(), position_name(position).to_string(), name.text.clone()];
                for (counts, value) in counts.iter_mut().zip(values) {
                    counts.entry(value).or_insert_with(|| vec![0; experts])[expert] += 1;
                }
            }
        }
    }
    let known = blocks.iter().zip(counts).map(|(block, [language, kind, position, word])| Known {
        path: format!("text.encoder.blocks.{block}"),
        words: own_words(&word),
        properties: vec![("language", language), ("kind of token", kind), ("position", position)],
        patches: Vec::new(),
    });
    known.collect()
}

/// With a space in front of one digit, so that they sort.
fn position_name(position: usize) -> &'static str {
    match position {
        0..=2 => " 1 to 3",
        3..=5 => " 4 to 6",
        6..=9 => " 7 to 10",
        10..=14 => "11 to 15",
        _ => "beyond 15",
    }
}

/// A token as a reader sees it.
struct Name {
    text: String,
    kind: &'static str,
}

impl Name {
    fn of(id: i32, tokenizer: &ClipTokenizer) -> Self {
        let end = tokenizer.vocab_size() as i32 - 1;
        let decoded = tokenizer.decode(&[id]);
        let is_end_of_word = decoded.ends_with(' ');
        let text = decoded.trim().to_string();
        let kind = match text.as_str() {
            _ if id == end - 1 => "start of text",
            _ if id == end => "end of text",
            text if !text.chars().any(char::is_alphanumeric) => "sign",
            _ if is_end_of_word => "end of a word",
            _ => "inside a word",
        };
        Self { text: if is_end_of_word { format!("{text}_") } else { text }, kind }
    }
}

/// For each expert up to five words, seen at least 30 times, of which it is the first choice most often, and more often than it is on average.
fn own_words(counts: &BTreeMap<String, Vec<usize>>) -> Vec<Vec<String>> {
    let experts = counts.values().next().map_or(0, Vec::len);
    let own = |expert: usize| {
        let share = |row: &Vec<usize>| row[expert] as f64 / row.iter().sum::<usize>() as f64;
        let all: Vec<usize> = (0..experts).map(|expert| counts.values().map(|row| row[expert]).sum()).collect();
        let mut words: Vec<(&String, f64, usize)> = counts
            .iter()
            .filter(|(word, row)| row.iter().sum::<usize>() >= 30 && !word.starts_with('<') && share(row) > share(&all))
            .map(|(word, row)| (word, share(row), row[expert]))
            .collect();
        words.sort_by(|a, b| b.1.total_cmp(&a.1).then(b.2.cmp(&a.2)));
        words.into_iter().take(5).map(|(word, ..)| word.clone()).collect()
    };
    (0..experts).map(own).collect()
}

/// The text tower's block whose experts tell most of the language, and the last routed block of the vision tower.
pub(crate) fn draw(path: &Path, known: &[Known], test: &ImageTextSet) -> Result<(), Box<dyn Error>> {
    let tells = |known: &Known| known.counts("language").map_or(0.0, information);
    let text = known.iter().filter(|known| known.path.starts_with("text")).max_by(|a, b| tells(a).total_cmp(&tells(b)));
    let vision = known.iter().rfind(|known| known.path.starts_with("vision"));
    // The rows of the table, and the lines of words below it.
    let rows = text.map_or(0, |known| known.properties.iter().map(|(_, counts)| counts.len() as u32 + 1).sum());
    canvas::write(path, (1240, (160 + 22 * rows).max(560)), |root| {
        let (left, right) = root.split_horizontally(700);
        if let Some(text) = text {
            draw_text(&left, text)?;
        }
        if let Some(vision) = vision {
            draw_patches(&right, vision, test)?;
        }
        Ok(())
    })
}

/// A table of shares: one row for each value of a property, one column for each expert.
fn draw_text(area: &Area, known: &Known) -> Result<(), Box<dyn Error>> {
    let block = canvas::block_name(&known.path);
    let area = area.titled(&format!("First experts of tokens, {block}, % of each row"), canvas::TITLE)?;
    let (left, row_height) = (150, 22);
    let mut y = 6;
    let experts = known.words.len();
    let width = 530 / experts.max(1) as i32;
    for expert in 0..experts {
        area.draw(&Text::new(format!("{expert}"), (left + expert as i32 * width + width / 2 - 6, y + 4), canvas::label()))?;
    }
    for (name, counts) in &known.properties {
        area.draw(&Text::new(format!("by {name}"), (12, y + 4), canvas::label().color(&BLACK)))?;
        y += row_height;
        for (value, row) in counts {
            area.draw(&Text::new(value.trim().to_string(), (24, y + 4), canvas::label()))?;
            let total = row.iter().sum::<usize>().max(1);
            for (expert, count) in row.iter().enumerate() {
                let share = *count as f64 / total as f64;
                canvas::cell(&area, (left + expert as i32 * width, y), (width, row_height), share, row.len())?;
            }
            y += row_height;
        }
        y += 4;
    }
    if experts <= 8 {
        area.draw(&Text::new("its words", (12, y + 4), canvas::label()))?;
        for (expert, words) in known.words.iter().enumerate() {
            for (line, word) in words.iter().enumerate() {
                let at = (left + expert as i32 * width + 2, y + 4 + line as i32 * 18);
                area.draw(&Text::new(word.chars().take(8).collect::<String>(), at, canvas::label()))?;
            }
        }
    }
    Ok(())
}

/// Drawings with each patch tinted by its first expert.
fn draw_patches(area: &Area, known: &Known, test: &ImageTextSet) -> Result<(), Box<dyn Error>> {
    let block = canvas::block_name(&known.path);
    let area = area.titled(&format!("First expert of each patch, {block}"), canvas::TITLE)?;
    let (across, shown) = (4, 128);
    let side = test.image_size() as i32;
    for (place, (image, experts)) in known.patches.iter().enumerate() {
        let place = place as i32;
        let (left, top) = (12 + place % across * (shown + 6), 8 + place / across * (shown + 8));
        let patches = (experts.len() as f64).sqrt().round() as i32;
        let pixels = test.image(*image);
        for (y, x) in (0..shown).flat_map(|y| (0..shown).map(move |x| (y, x))) {
            let (column, row) = (x * side / shown, y * side / shown);
            let rgb = &pixels[(row * side + column) as usize * 3..][..3];
            let expert = experts[(row * patches / side * patches + column * patches / side) as usize];
            let tint = expert.map_or(WHITE, |expert| PALETTE[expert % PALETTE.len()]);
            let mix = |own: u8, tint: u8| ((u16::from(own) * 11 + u16::from(tint) * 9) / 20) as u8;
            let color = RGBColor(mix(rgb[0], tint.0), mix(rgb[1], tint.1), mix(rgb[2], tint.2));
            area.draw_pixel((left + x, top + y), &color)?;
        }
    }
    let top = 8 + known.patches.len().div_ceil(across as usize) as i32 * (shown + 8) + 8;
    let experts = known.patches.iter().flat_map(|(_, experts)| experts).flatten().max().map_or(0, |most| most + 1);
    for expert in 0..experts {
        let x = 12 + expert as i32 * 64;
        let color = PALETTE[expert % PALETTE.len()];
        area.draw(&Rectangle::new([(x, top), (x + 18, top + 18)], color.filled()))?;
        area.draw(&Text::new(format!("{expert}"), (x + 24, top + 1), canvas::label()))?;
    }
    area.draw(&Text::new("expert", (12, top + 24), canvas::label()))?;
    Ok(())
}
